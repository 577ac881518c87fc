// The fused AdamW update on a processor; csrc/adamw_element.h holds the formula. It includes no torch header, so one
// binary serves every version of torch. The loops hold no sums over elements: to cut them anywhere changes no bit.

#include "adamw.h"

#include <stdexcept>
#include <type_traits>

#include "adamw_element.h"
#include "threads.h"

namespace megalrps {
namespace {

constexpr size_t kElementsPerThread = size_t{1} << 20;
constexpr size_t kCacheLine = 64;  // elements: no two threads write to one line

// Copy: BFloat16, Float16 or Nothing.
template <typename T, typename First, typename Second, typename Copy>
MEGALRPS_INLINE void update(size_t count, const Factors<T> factors, T* __restrict__ param, const T* __restrict__ grad,
                            First* __restrict__ exp_avg, Second* __restrict__ exp_avg_sq, Copy* __restrict__ narrow) {
    for (size_t i = 0; i < count; ++i) {
        param[i] = update_element(factors, param[i], grad[i], exp_avg[i], exp_avg_sq[i]);
        if constexpr (!std::is_same_v<Copy, Nothing>) {
            store(param[i], narrow[i]);
        }
    }
}

// Elements [begin, end).
template <typename T, typename First, typename Second, typename Copy>
void update_baseline(const AdamwMemory& memory, const Factors<T>& factors, size_t begin, size_t end) {
    update(end - begin, factors, static_cast<T*>(memory.param) + begin, static_cast<const T*>(memory.grad) + begin,
           static_cast<First*>(memory.exp_avg) + begin, static_cast<Second*>(memory.exp_avg_sq) + begin,
           static_cast<Copy*>(memory.narrow) + begin);
}

#if MEGALRPS_AVX2
template <typename T, typename First, typename Second, typename Copy>
__attribute__((target("avx2"))) void update_avx2(const AdamwMemory& memory, const Factors<T>& factors, size_t begin,
                                                 size_t end) {
    update(end - begin, factors, static_cast<T*>(memory.param) + begin, static_cast<const T*>(memory.grad) + begin,
           static_cast<First*>(memory.exp_avg) + begin, static_cast<Second*>(memory.exp_avg_sq) + begin,
           static_cast<Copy*>(memory.narrow) + begin);
}
#endif

template <typename T>
using Update = void (*)(const AdamwMemory&, const Factors<T>&, size_t begin, size_t end);

template <typename T, typename First, typename Second, typename Copy>
Update<T> compiled_for(Instructions instructions) {
#if MEGALRPS_AVX2
    if (instructions != Instructions::baseline && has_avx2()) {
        return &update_avx2<T, First, Second, Copy>;
    }
#endif
    return &update_baseline<T, First, Second, Copy>;
}

template <typename T, typename First, typename Second>
Update<T> with_copy(FloatType copy, Instructions instructions) {
    switch (copy) {
        case FloatType::none: return compiled_for<T, First, Second, Nothing>(instructions);
        case FloatType::bfloat16: return compiled_for<T, First, Second, BFloat16>(instructions);
        case FloatType::float16: return compiled_for<T, First, Second, Float16>(instructions);
        default: throw std::invalid_argument("a narrow copy is bfloat16 or float16");
    }
}

template <typename T>
Update<T> choose(const AdamwMemory& memory, Instructions instructions) {
    for (const FloatType moment : {memory.exp_avg_type, memory.exp_avg_sq_type}) {
        if (moment != memory.type && moment != FloatType::bfloat16) {
            throw std::invalid_argument("a moment has the type of the parameters or bfloat16");
        }
    }
    const FloatType copy = memory.narrow_type;
    const bool wide_first = memory.exp_avg_type == memory.type, wide_second = memory.exp_avg_sq_type == memory.type;
    if (wide_first) {
        return wide_second ? with_copy<T, T, T>(copy, instructions) : with_copy<T, T, BFloat16>(copy, instructions);
    }
    return wide_second ? with_copy<T, BFloat16, T>(copy, instructions)
                       : with_copy<T, BFloat16, BFloat16>(copy, instructions);
}

template <typename T>
void run(const AdamwMemory& memory, const AdamwFactors& factors, int threads, Instructions instructions) {
    const Update<T> update = choose<T>(memory, instructions);
    const Factors<T> rounded{
        .gradient_scale = static_cast<T>(factors.gradient_scale),
        .first_weight = static_cast<T>(factors.first_weight),
        .second_decay = static_cast<T>(factors.second_decay),
        .second_weight = static_cast<T>(factors.second_weight),
        .epsilon = static_cast<T>(factors.epsilon),
        .decay = static_cast<T>(factors.decay),
        .update_size = static_cast<T>(factors.update_size),
    };
    in_pieces(memory.elements, kElementsPerThread, kCacheLine, threads,
              [&](size_t begin, size_t end) { update(memory, rounded, begin, end); });
}

}  // namespace

bool has_avx2() {
#if MEGALRPS_AVX2
    return __builtin_cpu_supports("avx2") != 0;
#else
    return false;
#endif
}

void adamw(const AdamwMemory& memory, const AdamwFactors& factors, int threads, Instructions instructions) {
    if (instructions == Instructions::avx2 && !has_avx2()) {
        throw std::invalid_argument("this processor or this build has no AVX2");
    }
    if (memory.type == FloatType::float32) {
        run<float>(memory, factors, threads, instructions);
    } else if (memory.type == FloatType::float64) {
        run<double>(memory, factors, threads, instructions);
    } else {
        throw std::invalid_argument("parameters are float32 or float64");
    }
}

}  // namespace megalrps
