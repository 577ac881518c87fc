#pragma once

#include <cstddef>

#include "numbers.h"

namespace megalrps {

// The sum of squares of a flat buffer, in an order that the number of elements alone decides: not threads, not vector
// width, not the device. So csrc/norm.cpp and csrc/norm.cu give the same bits, of float32 and of the same numbers in
// bfloat16.
//
// The buffer is cut into pieces of kPiece elements. Element i of a piece is squared and added to lane i % kLanes, in
// float32 (in float64 for a float64 buffer); what is missing from the last piece counts as zero. The lanes are added in
// neighbouring pairs until one sum is left: the piece's. Sum p of the pieces is added to lane p % kLanes in float64,
// and these lanes are added in pairs again. With 32 elements a lane and 10 pairings no rounding error grows with the
// buffer: below (1 + 31 + 10) 2^-24 of the sum, and the errors of many elements largely cancel.
constexpr size_t kLanes = 1024;
constexpr size_t kPiece = 32 * kLanes;

constexpr size_t pieces_of(size_t elements) { return elements / kPiece + (elements % kPiece != 0); }

template <typename T>
MEGALRPS_INLINE T add_square(T sum, T value) {
    return sum + value * value;
}

// Infinite where a square or a sum exceeds the type that is added up in, NaN where a value is. Types: float32, float64,
// bfloat16; std::invalid_argument for others, and for instructions that are not there.
double sum_of_squares(const void* values, size_t elements, FloatType type, int threads, Instructions instructions);

}  // namespace megalrps
