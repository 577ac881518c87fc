#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "numbers.h"

namespace megalrps {

// N neighbours in memory, moved by one access of 64 or 128 bits.
template <typename T, int N>
struct alignas(N * sizeof(T)) Group {
    static_assert(N * sizeof(T) == 8 || N * sizeof(T) == 16);
    using Words = std::conditional_t<N * sizeof(T) == 16, uint4, uint2>;
    T at[N];
};

// Streaming (evict first): buffers are larger than the L2 cache, and each element is met once.
template <int N, typename T>
__device__ __forceinline__ Group<T, N> load_group(const T* group) {
    using Words = typename Group<T, N>::Words;
    return std::bit_cast<Group<T, N>>(__ldcs(reinterpret_cast<const Words*>(group)));
}

template <int N, typename T>
__device__ __forceinline__ void store_group(const Group<T, N>& values, T* group) {
    using Words = typename Group<T, N>::Words;
    __stcs(reinterpret_cast<Words*>(group), std::bit_cast<Words>(values));
}

}  // namespace megalrps
