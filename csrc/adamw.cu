// The fused AdamW update on a GPU; csrc/adamw_element.h holds the formula, and csrc/adamw.cpp computes the same bits:
// nvcc is told -fmad=false, and rounds division and square root correctly and keeps subnormal numbers unless told
// otherwise. Of a NaN only that it is one is the same. To round every product should cost nothing, because the kernel
// waits for memory: it moves 30 bytes for an element.
//
// Unmeasured on a GPU: its speed, and so the size of the grid and of a thread's group.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "adamw_element.h"
#include "cuda.h"
#include "group.cuh"

namespace megalrps {
namespace {

constexpr int kThreads = 256;
// Elements of a thread at a time: 128 bits of float32, and of its neighbours' 16-bit numbers 64, which a warp moves as
// whole sectors just as well. Eight would be 128 bits of 16-bit numbers, but would leave every float32 access of a warp
// with gaps of 16 bytes: half-filled sectors.
constexpr int kGroup = 4;

template <typename First, typename Second, typename Copy>
struct Memory {
    float* param;
    const float* grad;
    First* exp_avg;
    Second* exp_avg_sq;
    Copy* narrow;
    size_t elements;
};

template <typename First, typename Second, typename Copy>
__device__ __forceinline__ void update_group(const Memory<First, Second, Copy>& memory, const Factors<float>& factors,
                                             size_t at) {
    auto param = load_group<kGroup>(memory.param + at);
    const auto grad = load_group<kGroup>(memory.grad + at);
    auto exp_avg = load_group<kGroup>(memory.exp_avg + at);
    auto exp_avg_sq = load_group<kGroup>(memory.exp_avg_sq + at);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
        param.at[i] = update_element(factors, param.at[i], grad.at[i], exp_avg.at[i], exp_avg_sq.at[i]);
    }
    store_group(param, memory.param + at);
    store_group(exp_avg, memory.exp_avg + at);
    store_group(exp_avg_sq, memory.exp_avg_sq + at);
    if constexpr (!std::is_same_v<Copy, Nothing>) {
        Group<Copy, kGroup> narrow;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            store(param.at[i], narrow.at[i]);
        }
        store_group(narrow, memory.narrow + at);
    }
}

template <typename First, typename Second, typename Copy>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(Memory<First, Second, Copy> memory, Factors<float> factors, const float* gradient_scale,
                 const float* found_inf) {
    if (found_inf != nullptr && *found_inf != 0.0F) return;
    if (gradient_scale != nullptr) factors.gradient_scale = *gradient_scale;
    const size_t first = size_t{blockIdx.x} * kThreads + threadIdx.x;
    const size_t stride = size_t{gridDim.x} * kThreads;
    const size_t groups = memory.elements / kGroup;
    for (size_t group = first; group < groups; group += stride) {
        update_group(memory, factors, group * kGroup);
    }
    const size_t at = groups * kGroup + first;  // the tail: fewer elements than a group has, one a thread
    if (at < memory.elements) {
        const float moved = update_element(factors, memory.param[at], memory.grad[at], memory.exp_avg[at],
                                           memory.exp_avg_sq[at]);
        memory.param[at] = moved;
        if constexpr (!std::is_same_v<Copy, Nothing>) {
            store(moved, memory.narrow[at]);
        }
    }
}

// As many blocks as the device holds at a time: each reads the two scalars once, and all end together.
template <typename Kernel>
cudaError_t blocks_of(Kernel* kernel, size_t elements, unsigned* blocks) {
    int device = 0, processors = 0, resident = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0);
    const size_t needed = (elements / kGroup + kThreads) / kThreads;  // at least one, for the tail
    *blocks = static_cast<unsigned>(std::min(needed, static_cast<size_t>(processors) * std::max(resident, 1)));
    return error;
}

template <typename First, typename Second, typename Copy>
const char* launch(const AdamwMemory& given, const Factors<float>& factors, const float* gradient_scale,
                   const float* found_inf, void* stream) {
    const Memory<First, Second, Copy> memory{
        .param = static_cast<float*>(given.param),
        .grad = static_cast<const float*>(given.grad),
        .exp_avg = static_cast<First*>(given.exp_avg),
        .exp_avg_sq = static_cast<Second*>(given.exp_avg_sq),
        .narrow = static_cast<Copy*>(given.narrow),
        .elements = given.elements,
    };
    const auto kernel = &adamw_kernel<First, Second, Copy>;
    unsigned blocks = 0;
    cudaError_t error = blocks_of(kernel, memory.elements, &blocks);
    if (error == cudaSuccess) {
        cudaLaunchConfig_t where{};
        where.gridDim = blocks;
        where.blockDim = kThreads;
        where.stream = static_cast<cudaStream_t>(stream);
        error = cudaLaunchKernelEx(&where, kernel, memory, factors, gradient_scale, found_inf);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

using Launch = const char* (*)(const AdamwMemory&, const Factors<float>&, const float*, const float*, void*);

template <typename First, typename Second>
Launch with_copy(FloatType copy) {
    switch (copy) {
        case FloatType::none: return &launch<First, Second, Nothing>;
        case FloatType::bfloat16: return &launch<First, Second, BFloat16>;
        case FloatType::float16: return &launch<First, Second, Float16>;
        default: return nullptr;
    }
}

Launch choose(const AdamwMemory& memory) {
    for (const FloatType moment : {memory.exp_avg_type, memory.exp_avg_sq_type}) {
        if (moment != FloatType::float32 && moment != FloatType::bfloat16) return nullptr;
    }
    const bool wide_second = memory.exp_avg_sq_type == FloatType::float32;
    if (memory.exp_avg_type == FloatType::float32) {
        return wide_second ? with_copy<float, float>(memory.narrow_type)
                           : with_copy<float, BFloat16>(memory.narrow_type);
    }
    return wide_second ? with_copy<BFloat16, float>(memory.narrow_type)
                       : with_copy<BFloat16, BFloat16>(memory.narrow_type);
}

}  // namespace

const char* adamw_cuda(const AdamwMemory& memory, const AdamwFactors& factors, const float* gradient_scale,
                       const float* found_inf, void* stream) {
    const Launch launch = choose(memory);
    if (launch == nullptr || memory.type != FloatType::float32) {
        return "on a GPU parameters are float32, moments float32 or bfloat16, a narrow copy bfloat16 or float16";
    }
    if (memory.elements == 0) return nullptr;
    const Factors<float> rounded{
        .gradient_scale = 1.0F,
        .first_weight = static_cast<float>(factors.first_weight),
        .second_decay = static_cast<float>(factors.second_decay),
        .second_weight = static_cast<float>(factors.second_weight),
        .epsilon = static_cast<float>(factors.epsilon),
        .decay = static_cast<float>(factors.decay),
        .update_size = static_cast<float>(factors.update_size),
    };
    return launch(memory, rounded, gradient_scale, found_inf, stream);
}

}  // namespace megalrps
