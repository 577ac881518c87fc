// The sum of squares of a flat buffer on a processor, in the order that csrc/norm.h fixes.

#include "norm.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "threads.h"

namespace megalrps {
namespace {

constexpr size_t kElementsPerThread = size_t{1} << 20;

// Leaves the sum of all lanes, added in neighbouring pairs, in the first.
template <typename T>
MEGALRPS_INLINE T add_pairs(T* lanes) {
    for (size_t width = kLanes / 2; width > 0; width /= 2) {
        for (size_t lane = 0; lane < width; ++lane) {
            lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1];
        }
    }
    return lanes[0];
}

// Stored: what lies in memory; T: what is added up in.
template <typename T, typename Stored>
MEGALRPS_INLINE T sum_piece(const Stored* __restrict__ values, size_t count) {
    T lanes[kLanes] = {};
    size_t row = 0;
    for (; row + kLanes <= count; row += kLanes) {
        for (size_t lane = 0; lane < kLanes; ++lane) {
            lanes[lane] = add_square(lanes[lane], load<T>(values[row + lane]));
        }
    }
    for (size_t lane = 0; row + lane < count; ++lane) {
        lanes[lane] = add_square(lanes[lane], load<T>(values[row + lane]));
    }
    return add_pairs(lanes);
}

// The pieces of elements [begin, end); begin is a multiple of kPiece.
template <typename T, typename Stored>
MEGALRPS_INLINE void sum_pieces(const Stored* values, size_t begin, size_t end, double* sums) {
    for (size_t at = begin; at < end; at += kPiece) {
        sums[at / kPiece] = sum_piece<T>(values + at, std::min(kPiece, end - at));
    }
}

template <typename T, typename Stored>
void sum_baseline(const Stored* values, size_t begin, size_t end, double* sums) {
    sum_pieces<T>(values, begin, end, sums);
}

#if MEGALRPS_AVX2
template <typename T, typename Stored>
__attribute__((target("avx2"))) void sum_avx2(const Stored* values, size_t begin, size_t end, double* sums) {
    sum_pieces<T>(values, begin, end, sums);
}
#endif

template <typename T, typename Stored>
double run(const void* memory, size_t elements, int threads, Instructions instructions) {
    auto* sum = &sum_baseline<T, Stored>;
#if MEGALRPS_AVX2
    if (instructions != Instructions::baseline && has_avx2()) {
        sum = &sum_avx2<T, Stored>;
    }
#endif
    const auto* values = static_cast<const Stored*>(memory);
    std::vector<double> sums(pieces_of(elements));
    in_pieces(elements, kElementsPerThread, kPiece, threads,
              [&](size_t begin, size_t end) { sum(values, begin, end, sums.data()); });
    double lanes[kLanes] = {};
    for (size_t piece = 0; piece < sums.size(); ++piece) {
        lanes[piece % kLanes] += sums[piece];
    }
    return add_pairs(lanes);
}

}  // namespace

double sum_of_squares(const void* values, size_t elements, FloatType type, int threads, Instructions instructions) {
    if (instructions == Instructions::avx2 && !has_avx2()) {
        throw std::invalid_argument("this processor or this build has no AVX2");
    }
    switch (type) {
        case FloatType::float32: return run<float, float>(values, elements, threads, instructions);
        case FloatType::float64: return run<double, double>(values, elements, threads, instructions);
        case FloatType::bfloat16: return run<float, BFloat16>(values, elements, threads, instructions);
        default: throw std::invalid_argument("a sum of squares is of float32, float64 or bfloat16");
    }
}

}  // namespace megalrps
