#pragma once

// Stands in for CUDA's header of this name, so that a C++ compiler can build csrc/*.cu for a processor and the tests
// can run the kernels, tails, shuffles and all, where there is no GPU. It is found first only by who asks for it
// (-I csrc/emulated); no installed binary holds any of it.
//
// A block's threads are fibers of one thread, resumed in turn. Each runs to its next barrier before any passes it,
// which __syncthreads promises for a block and a shuffle only for a warp; blocks run one after another. So wrong indices
// and wrong sums show here. A missing __syncthreads may not, and speed is another matter.

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static  // blocks run one after another

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulated {

constexpr size_t kStack = size_t{1} << 16;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStack);
    bool ended = false;
    double exchanged;  // holds a float exactly
};

inline int attributes[] = {2, 8, 0};  // multiprocessors, compute capability
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;  // by thread
inline std::function<void()> kernel;

inline void wait_for_all() {
    Fiber& self = fibers[threadIdx.x];
    swapcontext(&self.context, &scheduler);
}

inline void run_thread() {
    kernel();
    fibers[threadIdx.x].ended = true;
}

inline void run_block(unsigned threads) {
    fibers.resize(threads);
    for (Fiber& fiber : fibers) {
        fiber.ended = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, &run_thread, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (unsigned thread = 0; thread < threads; ++thread) {
            if (fibers[thread].ended) continue;
            threadIdx.x = thread;
            swapcontext(&scheduler, &fibers[thread].context);
            alive = alive || !fibers[thread].ended;
        }
    }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait_for_all(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    const unsigned other = threadIdx.x ^ static_cast<unsigned>(lanes);
    emulated::fibers[threadIdx.x].exchanged = value;
    emulated::wait_for_all();
    const T received = static_cast<T>(emulated::fibers[other].exchanged);
    emulated::wait_for_all();  // read by all before any writes the next
    return received;
}

template <typename T>
T __ldcs(const T* address) {
    return *address;
}
template <typename T>
void __stcs(T* address, T value) {
    *address = value;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoDevice };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
};
struct cudaLaunchConfig_t {
    unsigned gridDim, blockDim;
    cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulation"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    return *value = emulated::attributes[which], cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
    return *blocks = 1, cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* where, void (*kernel)(Parameters...), Arguments... arguments) {
    gridDim.x = where->gridDim;
    emulated::kernel = [&] { kernel(arguments...); };
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        emulated::run_block(where->blockDim);
    }
    return cudaSuccess;
}
