// The keyed permutation of megalrps/data/permutation.py, number for number; that module defines the order and explains it.
// It includes no torch header, so one binary serves every version of torch.

#include "permutation.h"

#include <bit>
#include <stdexcept>
#include <string>

namespace megalrps {
namespace {

constexpr int64_t kLargestSize = int64_t{1} << 62;

// Number `counter` of the SplitMix64 stream that starts at `seed`.
inline uint64_t split_mix(uint64_t seed, uint64_t counter) {
    uint64_t mixed = seed + counter * 0x9E3779B97F4A7C15ULL;
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ULL;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBULL;
    return mixed ^ (mixed >> 31);
}

// The alternating Feistel network over [0, 2^(low_bits + high_bits)).
struct Feistel {
    int low_bits;
    uint64_t low_mask;
    uint64_t high_mask;
    std::span<const uint64_t> round_keys;

    Feistel(int width, std::span<const uint64_t> keys)
        : low_bits(width / 2),
          low_mask((uint64_t{1} << low_bits) - 1),
          high_mask((uint64_t{1} << (width - low_bits)) - 1),
          round_keys(keys) {}

    uint64_t operator()(uint64_t value) const {
        uint64_t low = value & low_mask;
        uint64_t high = value >> low_bits;
        for (size_t round = 0; round < round_keys.size(); ++round) {
            if (round % 2 == 0) {
                low ^= split_mix(round_keys[round], high) & low_mask;
            } else {
                high ^= split_mix(round_keys[round], low) & high_mask;
            }
        }
        return (high << low_bits) | low;
    }
};

}  // namespace

void permute(std::span<const int64_t> indices, int64_t size, std::span<const uint64_t> round_keys,
             std::span<int64_t> permuted) {
    if (size < 1 || size > kLargestSize) {
        throw std::invalid_argument("size must lie in [1, 2^62], not be " + std::to_string(size));
    }
    if (permuted.size() != indices.size()) {
        throw std::invalid_argument("as many results as indices are needed");
    }
    const Feistel feistel(std::bit_width(static_cast<uint64_t>(size - 1)), round_keys);
    for (size_t at = 0; at < indices.size(); ++at) {
        const int64_t index = indices[at];
        if (index < 0 || index >= size) {
            throw std::invalid_argument("index " + std::to_string(index) + " is outside [0, " + std::to_string(size) + ")");
        }
        // Ends, because the network is a bijection: walking on from a number inside comes back to a number inside.
        uint64_t value = static_cast<uint64_t>(index);
        do {
            value = feistel(value);
        } while (value >= static_cast<uint64_t>(size));
        permuted[at] = static_cast<int64_t>(value);
    }
}

}  // namespace megalrps
