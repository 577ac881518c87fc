#pragma once

#include <cstdint>
#include <span>

namespace megalrps {

// Writes to `permuted` where the keyed permutation of [0, size) sends each of `indices`.
// Throws std::invalid_argument unless 1 <= size <= 2^62, every index lies in [0, size) and both spans have one length.
void permute(std::span<const int64_t> indices, int64_t size, std::span<const uint64_t> round_keys,
             std::span<int64_t> permuted);

}  // namespace megalrps
