#include "word_memory.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace megalrps {

namespace {

constexpr size_t inline_bytes = 15;

}  // namespace

uint64_t hash_bytes(std::string_view bytes) {
    uint64_t hash = bytes.size();
    while (!bytes.empty()) {
        uint64_t part = 0;
        const size_t size = std::min<size_t>(bytes.size(), 8);
        std::memcpy(&part, bytes.data(), size);
        hash = (hash ^ part) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
        bytes.remove_prefix(size);
    }
    return hash;
}

WordMemory::WordMemory(size_t bytes)
    : most_slots_(std::max<size_t>(16, std::bit_floor(bytes / 2 / sizeof(Slot)))),
      most_more_(std::min<size_t>(bytes / 2 / sizeof(int32_t), INT32_MAX)),
      slots_(std::min<size_t>(most_slots_, 1 << 12)) {}

WordMemory::Place WordMemory::place(std::string_view word, size_t readable) {
    Place place{0, 0};
    const size_t size = word.size();
    if (size > longest_word) return place;
    if (size > inline_bytes) {
        place.low = hash_bytes(word);
    } else if (readable >= 16) {
        std::memcpy(&place.low, word.data(), 8);
        std::memcpy(&place.high, word.data() + 8, 8);
        if (size < 8) place.low &= (uint64_t{1} << 8 * size) - 1;
        place.high = size > 8 ? place.high & ((uint64_t{1} << 8 * (size - 8)) - 1) : 0;
    } else {
        std::memcpy(&place.low, word.data(), std::min<size_t>(size, 8));
        if (size > 8) std::memcpy(&place.high, word.data() + 8, size - 8);
    }
    place.high |= uint64_t{size} << 56;
    return place;
}

size_t WordMemory::scatter(Place place) {
    const uint64_t mixed = (place.low ^ std::rotl(place.high, 23)) * 0x9E3779B97F4A7C15u;
    return (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93u >> 24;
}

std::span<const int32_t> WordMemory::find(Place place, std::string_view word) const {
    const size_t last = slots_.size() - 1;
    for (size_t at = scatter(place) & last; slots_[at].high != 0; at = (at + 1) & last) {
        const Slot& slot = slots_[at];
        if (slot.low != place.low || slot.high != place.high) continue;
        if (word.size() > inline_bytes) {
            const int32_t* more = more_.data() + slot.ids[0];
            if (std::memcmp(more, word.data(), word.size()) != 0) continue;
            return {more + (word.size() + 3) / 4, slot.count};
        }
        return {slot.count <= 3 ? slot.ids : more_.data() + slot.ids[0], slot.count};
    }
    return {};
}

void WordMemory::remember(Place place, std::string_view word, std::span<const int32_t> ids) {
    const size_t cells = word.size() > inline_bytes ? (word.size() + 3) / 4 : 0;
    const bool more = cells > 0 || ids.size() > 3;
    if (2 * (used_ + 1) > slots_.size()) grow();
    if (more && more_.size() + cells + ids.size() > most_more_) {
        std::fill(slots_.begin(), slots_.end(), Slot{});
        more_.clear();
        used_ = 0;
        if (cells + ids.size() > most_more_) return;
    }
    Slot slot{place.low, place.high, static_cast<uint32_t>(ids.size()), {}};
    if (more) {
        slot.ids[0] = static_cast<int32_t>(more_.size());
        more_.resize(more_.size() + cells);
        if (cells > 0) std::memcpy(more_.data() + slot.ids[0], word.data(), word.size());
        more_.insert(more_.end(), ids.begin(), ids.end());
    } else {
        std::copy(ids.begin(), ids.end(), slot.ids);
    }
    const size_t last = slots_.size() - 1;
    size_t at = scatter(place) & last;
    while (slots_[at].high != 0) at = (at + 1) & last;
    slots_[at] = slot;
    used_ += 1;
}

void WordMemory::grow() {
    std::vector<Slot> old(std::min(2 * slots_.size(), most_slots_));
    const bool full = old.size() == slots_.size();
    old.swap(slots_);
    if (full) {
        more_.clear();
        used_ = 0;
        return;
    }
    const size_t last = slots_.size() - 1;
    for (const Slot& slot : old) {
        if (slot.high == 0) continue;
        size_t at = scatter({slot.low, slot.high}) & last;
        while (slots_[at].high != 0) at = (at + 1) & last;
        slots_[at] = slot;
    }
}

}  // namespace megalrps
