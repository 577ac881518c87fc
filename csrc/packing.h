#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "windows.h"

namespace megalrps {

constexpr int64_t kLongestPacked = int64_t{1} << 24;

// How documents are packed; megalrps/data/packing.py has the rule.
struct Packing {
    size_t block;             // documents packed with one another
    int64_t sequence_length;  // a sample has one slot more
};

// The pieces of documents in some samples: those of sample i are [bounds[i], bounds[i + 1]).
struct PackedPieces {
    std::vector<int64_t> bounds;
    std::vector<int64_t> starts;   // in tokens of the dataset
    std::vector<int64_t> lengths;  // tokens
};

// Where the rows of packed samples are written, one after the other.
struct PackedRows {
    int64_t* tokens;   // sequence_length + 1 a row
    int32_t* starts;   // sequence_length a row
    bool* counted;     // sequence_length a row
};

// Samples of all documents of an index, up to and with each block of them (the last may have fewer documents).
// Throws std::invalid_argument for a packing that cannot be, DamagedIndex.
std::vector<int64_t> count_packed(const DatasetIndex& index, const Packing& packing);

// The pieces in samples `numbers`; `ends` as count_packed gives them. Throws as it does, and std::invalid_argument for
// a number that no sample has; where blocks do not have the samples that `ends` says, DamagedIndex.
PackedPieces packed_pieces(const DatasetIndex& index, const Packing& packing, std::span<const int64_t> ends,
                           std::span<const int64_t> numbers);

// Writes rows of pieces of `lengths` tokens, [bounds[i], bounds[i + 1]) in row i, filled up with `padding`; `tokens`
// are those of all pieces, end to end. Throws std::invalid_argument where they do not fit one another.
void fill_packed(std::span<const int64_t> tokens, std::span<const int64_t> bounds, std::span<const int64_t> lengths,
                 size_t sequence_length, int64_t padding, const PackedRows& rows);

}  // namespace megalrps
