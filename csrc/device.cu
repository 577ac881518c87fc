// Whether the CUDA part can be used on the current device.

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "cuda.h"

namespace megalrps {
namespace {

// Whether code for `target`, as "sm_80", "sm_90a" or "compute_80", runs on a device of capability `major`.`minor`: PTX
// on every later one, machine code on later ones of its generation, and what ends in "a" on one alone.
bool runs(const char* target, int major, int minor) {
    const char* number = std::strchr(target, '_') + 1;
    int capability = 0, length = 0;
    if (std::sscanf(number, "%d%n", &capability, &length) != 1) return false;
    const int device = 10 * major + minor;
    const char letter = number[length];
    if (letter == 'a') return device == capability;
    const bool one_generation = std::strncmp(target, "sm_", 3) == 0 || letter == 'f';
    return device >= capability && (!one_generation || major == capability / 10);
}

}  // namespace

// Makes no context: a process that has not chosen its device yet would leave one on the first.
const char* cuda_missing() {
    int devices = 0, device = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error == cudaSuccess && devices == 0) error = cudaErrorNoDevice;
    if (error == cudaSuccess) error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    char targets[] = MEGALRPS_CUDA_TARGETS;
    for (const char* target = std::strtok(targets, " "); target != nullptr; target = std::strtok(nullptr, " ")) {
        if (runs(target, major, minor)) return nullptr;
    }
    return "it was built for other devices than this one: " MEGALRPS_CUDA_TARGETS
           "; MEGALRPS_CUDA_TARGETS of setup.py chooses";
}

}  // namespace megalrps
