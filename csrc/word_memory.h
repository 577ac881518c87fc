// What words became, in bounded memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace megalrps {

uint64_t hash_bytes(std::string_view bytes);

// The ids of words seen before; forgets all of them when it is full.
class WordMemory {
public:
    static constexpr size_t longest_word = 64;

    explicit WordMemory(size_t bytes);
    // The place of a word; of one longer than longest_word none. readable: bytes that may be read from its beginning.
    struct Place {
        uint64_t low, high;
    };
    static Place place(std::string_view word, size_t readable);
    void fetch(Place place) const { __builtin_prefetch(slots_.data() + (scatter(place) & (slots_.size() - 1))); }
    // The ids, or none; valid until the next call of remember.
    std::span<const int32_t> find(Place place, std::string_view word) const;
    void remember(Place place, std::string_view word, std::span<const int32_t> ids);

private:
    // Up to 15 bytes of a word, or its hash, with its length in the top byte of high (0: a free slot); up to three ids,
    // or the place in more_ of all of them, after the bytes of a word of more than 15.
    struct Slot {
        uint64_t low = 0, high = 0;
        uint32_t count = 0;
        int32_t ids[3] = {};
    };
    static size_t scatter(Place place);
    void grow();

    size_t most_slots_, most_more_;
    std::vector<Slot> slots_;
    std::vector<int32_t> more_;
    size_t used_ = 0;
};

}  // namespace megalrps
