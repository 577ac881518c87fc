// The kernels of csrc/*.cu on a processor, with plain names: what tests/kernels/test_native_norm.py loads by ctypes.

#include <cuda_runtime.h>

#include "../cuda.h"

extern "C" const char* emulated_adamw(const megalrps::AdamwMemory* memory, const megalrps::AdamwFactors* factors,
                                      const float* gradient_scale, const float* found_inf) {
    return megalrps::adamw_cuda(*memory, *factors, gradient_scale, found_inf, nullptr);
}

extern "C" const char* emulated_sum_of_squares(const void* values, size_t elements, int bfloat16, float* partials,
                                               double* result) {
    const auto type = bfloat16 != 0 ? megalrps::FloatType::bfloat16 : megalrps::FloatType::float32;
    return megalrps::sum_of_squares_cuda(values, elements, type, partials, result, nullptr);
}

extern "C" const char* emulated_missing(int major, int minor) {
    emulated::attributes[cudaDevAttrComputeCapabilityMajor] = major;
    emulated::attributes[cudaDevAttrComputeCapabilityMinor] = minor;
    return megalrps::cuda_missing();
}
