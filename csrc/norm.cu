// The sum of squares of a flat buffer on a GPU, in the order that csrc/norm.h fixes: one block adds up a piece, then
// one block adds up the pieces. There are no atomics, so the bits are the same at every launch and on every device;
// with -fmad=false they are those of csrc/norm.cpp.
//
// Unmeasured on a GPU: its speed, and so the length of a piece.

#include "norm.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda.h"
#include "group.cuh"

namespace megalrps {
namespace {

constexpr int kWarp = 32;

// The sum over the block of one number a thread, in neighbouring pairs; thread 0 has it. For 4 to 32 warps.
template <int kThreads, typename T>
__device__ T add_threads(T sum) {
    constexpr int kWarps = kThreads / kWarp;
    static_assert(kThreads % kWarp == 0 && kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0);
    __shared__ T warps[kWarps];
    for (int distance = 1; distance < kWarp; distance *= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, distance);
    }
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = warps[threadIdx.x % kWarps];
    for (int distance = 1; distance < kWarps; distance *= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, distance);
    }
    return sum;
}

// A thread has as many lanes as a load of 128 bits has numbers.
template <typename Stored>
constexpr int kGroup = 16 / sizeof(Stored);
template <typename Stored>
constexpr int kThreads = kLanes / kGroup<Stored>;

template <typename Stored>
__global__ void __launch_bounds__(kThreads<Stored>)
    sum_pieces(const Stored* values, size_t elements, float* partials) {
    constexpr int N = kGroup<Stored>;
    const size_t start = size_t{blockIdx.x} * kPiece + threadIdx.x * N;
    float lanes[N] = {};
    if (size_t{blockIdx.x + 1} * kPiece <= elements) {
#pragma unroll 8
        for (size_t row = 0; row < kPiece; row += kLanes) {
            const auto group = load_group<N>(values + start + row);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                lanes[i] = add_square(lanes[i], load<float>(group.at[i]));
            }
        }
    } else {
        for (size_t at = start; at < elements; at += kLanes) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (at + i < elements) lanes[i] = add_square(lanes[i], load<float>(values[at + i]));
            }
        }
    }
#pragma unroll
    for (int width = N / 2; width > 0; width /= 2) {
#pragma unroll
        for (int lane = 0; lane < width; ++lane) {
            lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1];
        }
    }
    const float sum = add_threads<kThreads<Stored>>(lanes[0]);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kLanes) sum_partials(const float* partials, size_t count, double* result) {
    double lane = 0;
    for (size_t piece = threadIdx.x; piece < count; piece += kLanes) {
        lane += partials[piece];
    }
    const double sum = add_threads<kLanes>(lane);
    if (threadIdx.x == 0) *result = sum;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), size_t blocks, int threads, void* stream, Arguments... arguments) {
    cudaLaunchConfig_t where{};
    where.gridDim = static_cast<unsigned>(blocks);
    where.blockDim = threads;
    where.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&where, kernel, arguments...);
}

template <typename Stored>
cudaError_t launch_pieces(const void* values, size_t elements, float* partials, void* stream) {
    return launch(&sum_pieces<Stored>, pieces_of(elements), kThreads<Stored>, stream,
                  static_cast<const Stored*>(values), elements, partials);
}

}  // namespace

const char* sum_of_squares_cuda(const void* values, size_t elements, FloatType type, float* partials, double* result,
                                void* stream) {
    if (type != FloatType::float32 && type != FloatType::bfloat16) {
        return "on a GPU a sum of squares is of float32 or bfloat16";
    }
    const size_t pieces = pieces_of(elements);
    cudaError_t error = cudaSuccess;
    if (pieces > 0) {
        error = type == FloatType::float32 ? launch_pieces<float>(values, elements, partials, stream)
                                           : launch_pieces<BFloat16>(values, elements, partials, stream);
    }
    if (error == cudaSuccess) {
        error = launch(&sum_partials, 1, kLanes, stream, static_cast<const float*>(partials), pieces, result);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace megalrps
