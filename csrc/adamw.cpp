// The fused AdamW update of megalrps/kernels/adamw.py; that module holds the formula and its torch form.
// It includes no torch header, so one binary serves every version of torch.
//
// An element's result must not depend on where it lies: an optimizer that is cut into shards meets the same element in
// the vector body of one loop and in the scalar tail of another, on one processor or the next. So every element is
// computed by the same chain of additions, multiplications, divisions and square roots, each rounded once as IEEE 754
// prescribes. Nothing is contracted into a fused multiply-add (-ffp-contract=off in setup.py) and nothing is reordered
// (no -ffast-math; the loops hold no sums over elements). Then vector width and instruction set cannot show in the bits.

#include "adamw.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef __FAST_MATH__
#error "-ffast-math would make the update depend on the place of an element"
#endif
static_assert(FLT_EVAL_METHOD == 0, "floats must be computed as floats, doubles as doubles");

#if defined(__GNUC__)
#define MEGALRPS_INLINE inline __attribute__((always_inline))
#else
#define MEGALRPS_INLINE inline
#endif

// Wheels run on processors other than the one that built them: the baseline of the architecture is always compiled, and
// on x86-64 the same source a second time for AVX2, chosen when called. Compilers without the attribute get the baseline.
// Not target_clones: that needs the loader's help (ifunc), and where AVX2 is there the baseline could not be called, so
// no test could compare the two. Not AVX-512: the AVX2 loop already waits for memory.
#if defined(__x86_64__) && defined(__GNUC__)
#define MEGALRPS_AVX2 1
#else
#define MEGALRPS_AVX2 0
#endif

namespace megalrps {
namespace {

constexpr size_t kElementsPerThread = size_t{1} << 20;
constexpr size_t kCacheLine = 64;  // elements: no two threads write to one line

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

struct Nothing {};

// Round to nearest even, as torch does; a NaN stays a NaN, of one pattern.
MEGALRPS_INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

// Round to nearest even without branches: below the smallest normal number, 2^-14, adding 1/2 makes the floating-point
// unit drop the bits that do not fit (the idea is F. Giesen's, "float->half variants").
MEGALRPS_INLINE uint16_t to_float16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t size = bits & 0x7FFFFFFF;
    const uint32_t normal = (size - (uint32_t{112} << 23) + 0xFFF + ((size >> 13) & 1)) >> 13;
    const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5F) - std::bit_cast<uint32_t>(0.5F);
    const uint32_t large = size > 0x7F800000 ? 0x7E00 : 0x7C00;
    const uint32_t finite = size < 0x38800000 ? small : normal;  // 2^-14
    return static_cast<uint16_t>(sign | (size >= 0x47800000 ? large : finite));  // 2^16
}

template <typename T>
MEGALRPS_INLINE T load(const T& stored) {
    return stored;
}
template <typename T>
MEGALRPS_INLINE T load(const BFloat16& stored) {
    return std::bit_cast<float>(static_cast<uint32_t>(stored.bits) << 16);
}

template <typename T>
MEGALRPS_INLINE void store(T value, T& stored) {
    stored = value;
}
template <typename T>
MEGALRPS_INLINE void store(T value, BFloat16& stored) {
    stored.bits = to_bfloat16(static_cast<float>(value));
}
template <typename T>
MEGALRPS_INLINE void store(T value, Float16& stored) {
    stored.bits = to_float16(static_cast<float>(value));
}

template <typename T>
struct Factors {
    T gradient_scale, first_weight, second_decay, second_weight, epsilon, decay, update_size;
};

// The update, operation for operation in the order of the torch form. T is what is computed in; First, Second: T or
// BFloat16; Copy: BFloat16, Float16 or Nothing.
template <typename T, typename First, typename Second, typename Copy>
MEGALRPS_INLINE void update(size_t count, const Factors<T> factors, T* __restrict__ param, const T* __restrict__ grad,
                            First* __restrict__ exp_avg, Second* __restrict__ exp_avg_sq, Copy* __restrict__ narrow) {
    const T first_decay = 1 - factors.first_weight;
    const bool from_old = factors.first_weight < T(0.5);  // the mean is reached from its nearer end: no cancellation
    for (size_t i = 0; i < count; ++i) {
        const T gradient = grad[i] * factors.gradient_scale;
        const T old = load<T>(exp_avg[i]);
        const T way = gradient - old;
        const T first = from_old ? old + factors.first_weight * way : gradient - way * first_decay;
        const T second = load<T>(exp_avg_sq[i]) * factors.second_decay + factors.second_weight * gradient * gradient;
        const T denominator = std::sqrt(second) + factors.epsilon;
        const T moved = param[i] * factors.decay - factors.update_size * first / denominator;
        param[i] = moved;
        store(first, exp_avg[i]);
        store(second, exp_avg_sq[i]);
        if constexpr (!std::is_same_v<Copy, Nothing>) {
            store(moved, narrow[i]);
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
    const size_t elements = memory.elements;
    const size_t pieces = std::clamp<size_t>(elements / kElementsPerThread, 1, std::max(threads, 1));
    const size_t length = (elements / pieces / kCacheLine + 1) * kCacheLine;
    std::vector<std::jthread> workers;  // joined when they go out of scope
    workers.reserve(pieces);
    for (size_t begin = length; begin < elements; begin += length) {
        const size_t end = std::min(begin + length, elements);
        try {
            workers.emplace_back([&, begin, end] { update(memory, rounded, begin, end); });
        } catch (const std::system_error&) {  // no more threads: the piece must be done all the same
            update(memory, rounded, begin, end);
        }
    }
    update(memory, rounded, 0, std::min(length, elements));
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
