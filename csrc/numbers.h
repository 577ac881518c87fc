#pragma once

// The number types in memory and how they are read and rounded, one source for processors and GPUs: nvcc compiles these
// functions a second time for the device, so that what the tests of the C++ code prove holds for the kernels as well.

#include <bit>
#include <cfloat>
#include <cstdint>

#ifdef __FAST_MATH__
#error "-ffast-math would make a result depend on the place of an element"
#endif
static_assert(FLT_EVAL_METHOD == 0, "floats must be computed as floats, doubles as doubles");

#if defined(__CUDACC__)
#define MEGALRPS_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MEGALRPS_INLINE inline __attribute__((always_inline))
#else
#define MEGALRPS_INLINE inline
#endif

// Wheels run on processors other than the one that built them: the baseline of the architecture is always compiled, and
// on x86-64 the same source a second time for AVX2, chosen when called. Compilers without the attribute get the
// baseline. Not target_clones: that needs the loader's help (ifunc), and where AVX2 is there the baseline could not be
// called, so no test could compare the two. Not AVX-512: the AVX2 loop already waits for memory.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
#define MEGALRPS_AVX2 1
#else
#define MEGALRPS_AVX2 0
#endif

namespace megalrps {

enum class FloatType { none, float32, float64, bfloat16, float16 };

enum class Instructions { best, baseline, avx2 };

// Whether this processor and this build have the AVX2 code.
bool has_avx2();

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

}  // namespace megalrps
