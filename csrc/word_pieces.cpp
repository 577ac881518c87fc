#include "word_pieces.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>

namespace megalrps {

namespace {

constexpr uint32_t none = NumberTable::absent;
constexpr uint32_t white_space = ' ';  // the mark U+2581 stands for a space in pieces, and is the same in a text
constexpr uint32_t mark = 0x2581;

uint64_t pair_key(uint32_t left, uint32_t right) { return uint64_t{left} << 32 | right; }

// The code point at `at`, which moves behind it. The text is valid UTF-8 to its end.
uint32_t next_code_point(std::string_view text, size_t& at) {
    const auto byte = [&](size_t offset) { return static_cast<uint32_t>(static_cast<uint8_t>(text[at + offset])); };
    const uint32_t first = byte(0);
    if (first < 0x80) {
        at += 1;
        return first;
    }
    uint32_t code_point;
    if (first < 0xE0) {
        code_point = (first & 0x1F) << 6 | (byte(1) & 0x3F);
        at += 2;
    } else if (first < 0xF0) {
        code_point = (first & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
        at += 3;
        if (code_point == mark) return white_space;
    } else {
        code_point = (first & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
        at += 4;
    }
    return code_point;
}

}  // namespace

void NumberTable::insert(uint64_t key, uint32_t value) {
    if (2 * (used_ + 1) > slots_.size()) {
        std::vector<Slot> old(2 * slots_.size());
        old.swap(slots_);
        used_ = 0;
        for (const Slot& slot : old) {
            if (slot.key != UINT64_MAX) insert(slot.key, slot.value);
        }
    }
    const size_t last = slots_.size() - 1;
    size_t at = scatter(key) & last;
    while (slots_[at].key != UINT64_MAX && slots_[at].key != key) at = (at + 1) & last;
    used_ += slots_[at].key == UINT64_MAX;
    slots_[at] = {key, value};
}

uint32_t NumberTable::find(uint64_t key) const {
    const size_t last = slots_.size() - 1;
    size_t at = scatter(key) & last;
    while (slots_[at].key != key) {
        if (slots_[at].key == UINT64_MAX) return absent;
        at = (at + 1) & last;
    }
    return slots_[at].value;
}

WordPieces::WordPieces(std::span<const ScoredPiece> pieces, std::span<const int32_t> byte_ids, bool prefix,
                       size_t memory_bytes)
    : prefix_(prefix),
      byte_ids_(byte_ids.begin(), byte_ids.end()),
      ascii_neighbours_(128 * 128),
      ascii_characters_(128, none),
      memory_(memory_bytes) {
    if (byte_ids.size() != 256) throw std::invalid_argument("byte_ids must be 256");
    std::vector<SpelledPiece> spelled;
    for (const ScoredPiece& piece : pieces) {
        if (piece.text.empty() || std::isnan(piece.score) || piece.id < 0) {
            throw std::invalid_argument("a piece has a text, a score that is a number and an id from 0 on");
        }
        // A space itself is in no text: there, too, it is the mark. A piece that holds one never comes about.
        if (piece.text.find(' ') == std::string::npos) spelled.push_back(spell(piece));
    }
    SymbolNames names;
    for (const SpelledPiece& piece : spelled) add_characters(piece, names);
    add_pieces(spelled, names);
    for (const SpelledPiece& piece : spelled) {
        const std::string_view text = piece.text;
        const uint32_t merged = names.find(text);
        for (size_t i = 0; i + 1 < piece.ends.size(); ++i) {
            const uint32_t left = names.find(text.substr(0, piece.ends[i]));
            if (left == none) continue;
            const uint32_t right = names.find(text.substr(piece.ends[i]));
            if (right != none) merges_.insert(pair_key(left, right), merged);
        }
    }
}

uint32_t WordPieces::SymbolNames::find(std::string_view text) const {
    for (uint64_t key = hash_bytes(text) >> 1;; ++key) {
        const uint32_t number = numbers_.find(key);
        if (number == none || texts_[number] == text) return number;
    }
}

void WordPieces::SymbolNames::add(std::string_view text) {
    uint64_t key = hash_bytes(text) >> 1;
    while (numbers_.find(key) != none) ++key;
    numbers_.insert(key, static_cast<uint32_t>(texts_.size()));
    texts_.push_back(text);
}

WordPieces::SpelledPiece WordPieces::spell(const ScoredPiece& piece) {
    SpelledPiece spelled{{}, {}, {}, piece.score, piece.id};
    for (size_t at = 0; at < piece.text.size();) {
        const size_t begin = at;
        const uint32_t code_point = next_code_point(piece.text, at);
        if (code_point == white_space) {
            spelled.text += ' ';
        } else {
            spelled.text.append(piece.text, begin, at - begin);
        }
        spelled.code_points.push_back(code_point);
        spelled.ends.push_back(static_cast<uint32_t>(spelled.text.size()));
    }
    return spelled;
}

void WordPieces::add_characters(const SpelledPiece& piece, SymbolNames& names) {
    uint32_t begin = 0;
    for (size_t i = 0; i < piece.ends.size(); ++i) {
        const uint32_t code_point = piece.code_points[i];
        if (symbol_of(code_point) == none) {
            const auto symbol = static_cast<uint32_t>(symbols_.size());
            names.add(std::string_view(piece.text).substr(begin, piece.ends[i] - begin));
            if (code_point < 128) ascii_characters_[code_point] = symbol;
            characters_.insert(code_point, symbol);
            symbols_.push_back({none, -1, code_point});
        }
        begin = piece.ends[i];
        if (i == 0) continue;
        const uint32_t last = piece.code_points[i - 1];
        if ((last | code_point) < 128) {
            ascii_neighbours_[last * 128 + code_point] = 1;
        } else {
            neighbours_.insert(pair_key(last, code_point), 1);
        }
    }
}

void WordPieces::add_pieces(std::span<const SpelledPiece> spelled, SymbolNames& names) {
    std::vector<float> scores;
    for (const SpelledPiece& piece : spelled) scores.push_back(piece.score);
    std::sort(scores.begin(), scores.end(), std::greater<>());
    scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
    for (const SpelledPiece& piece : spelled) {
        const auto place = std::lower_bound(scores.begin(), scores.end(), piece.score, std::greater<>());
        uint32_t number = names.find(piece.text);
        if (number == none) {
            number = static_cast<uint32_t>(symbols_.size());
            names.add(piece.text);
            symbols_.push_back({none, -1, none});
        }
        Symbol& symbol = symbols_[number];
        if (symbol.id >= 0) throw std::invalid_argument("a piece occurs twice");
        symbol.rank = static_cast<uint32_t>(place - scores.begin());
        symbol.id = piece.id;
    }
}

uint32_t WordPieces::symbol_of(uint32_t code_point) const {
    return code_point < 128 ? ascii_characters_[code_point] : characters_.find(code_point);
}

bool WordPieces::joined(uint32_t left, uint32_t right) const {
    if ((left | right) < 128) return ascii_neighbours_[left * 128 + right] != 0;
    return neighbours_.find(pair_key(left, right)) != none;
}

size_t WordPieces::word_end(std::string_view text, size_t at) const {
    uint32_t last = next_code_point(text, at);
    // Nearly all characters are ASCII.
    const uint8_t* const neighbours = ascii_neighbours_.data();
    while (last < 128 && at < text.size()) {
        const auto next = static_cast<uint8_t>(text[at]);
        if (next >= 128) break;
        if (neighbours[last * 128 + next] == 0) return at;
        last = next;
        at += 1;
    }
    while (at < text.size()) {
        size_t next = at;
        const uint32_t code_point = next_code_point(text, next);
        if (!joined(last, code_point)) break;
        last = code_point;
        at = next;
    }
    return at;
}

void WordPieces::encode(std::string_view text, std::vector<int32_t>& ids) {
    if (text.empty()) return;
    const std::lock_guard lock(one_caller_);
    size_t at = 0;
    if (prefix_) {
        first_word_.assign(1, static_cast<char>(white_space));
        size_t next = 0;
        if (joined(white_space, next_code_point(text, next))) {
            at = word_end(text, 0);
            first_word_ += text.substr(0, at);
        }
        add_word(first_word_, WordMemory::place(first_word_, first_word_.size()), ids);
    }
    // Some words at a time: their slots of the memory are on their way while the next words' ends are looked for.
    struct Word {
        std::string_view text;
        WordMemory::Place place;
    };
    std::array<Word, 16> words;
    while (at < text.size()) {
        size_t count = 0;
        for (; count < words.size() && at < text.size(); ++count) {
            const size_t end = word_end(text, at);
            const std::string_view word = text.substr(at, end - at);
            words[count] = {word, WordMemory::place(word, text.size() - at)};
            memory_.fetch(words[count].place);
            at = end;
        }
        for (size_t i = 0; i < count; ++i) add_word(words[i].text, words[i].place, ids);
    }
}

void WordPieces::add_word(std::string_view word, WordMemory::Place place, std::vector<int32_t>& ids) {
    if (word.size() > WordMemory::longest_word) return merge_word(word, ids);
    const std::span<const int32_t> seen = memory_.find(place, word);
    if (!seen.empty()) {
        ids.insert(ids.end(), seen.begin(), seen.end());
        return;
    }
    const size_t before = ids.size();
    merge_word(word, ids);
    memory_.remember(place, word, std::span(ids).subspan(before));
}

void WordPieces::propose(uint32_t left) {
    const Node& node = nodes_[left];
    if (node.next == none) return;
    const uint32_t right_symbol = nodes_[node.next].symbol;
    const uint32_t merged = merges_.find(pair_key(node.symbol, right_symbol));
    if (merged == none) return;
    agenda_.push_back({symbols_[merged].rank, left, node.symbol, right_symbol, merged});
}

void WordPieces::merge_word(std::string_view word, std::vector<int32_t>& ids) {
    const auto later = [](const Merge& a, const Merge& b) {
        return a.rank != b.rank ? a.rank > b.rank : a.left > b.left;
    };
    nodes_.clear();
    agenda_.clear();
    for (size_t at = 0; at < word.size();) {
        const uint32_t code_point = next_code_point(word, at);
        const uint32_t symbol = symbol_of(code_point);
        // A character that no piece holds is a word of its own.
        if (symbol == none) return add_bytes(code_point, ids);
        if (nodes_.size() >= none - 1) throw std::length_error("a word has more than 2^32 characters");
        const auto here = static_cast<uint32_t>(nodes_.size());
        nodes_.push_back({symbol, here - 1, here + 1});  // before the first: none
    }
    nodes_.back().next = none;
    for (uint32_t node = 0; node + 1 < nodes_.size(); ++node) propose(node);
    std::make_heap(agenda_.begin(), agenda_.end(), later);
    while (!agenda_.empty()) {
        const Merge merge = agenda_.front();
        std::pop_heap(agenda_.begin(), agenda_.end(), later);
        agenda_.pop_back();
        Node& left = nodes_[merge.left];
        // Symbols only grow: the pair is as it was if both have the same symbols, and both are still there.
        if (left.symbol != merge.left_symbol || left.next == none) continue;
        Node& right = nodes_[left.next];
        if (right.symbol != merge.right_symbol) continue;
        left.symbol = merge.merged;
        left.next = right.next;
        right.symbol = none;
        if (left.next != none) nodes_[left.next].previous = merge.left;
        const auto push = [&](uint32_t node) {
            const size_t before = agenda_.size();
            propose(node);
            if (agenda_.size() > before) std::push_heap(agenda_.begin(), agenda_.end(), later);
        };
        if (left.previous != none) push(left.previous);
        push(merge.left);
    }
    for (uint32_t node = 0; node != none; node = nodes_[node].next) {
        const Symbol& symbol = symbols_[nodes_[node].symbol];
        if (symbol.id >= 0) {
            ids.push_back(symbol.id);
        } else {
            add_bytes(symbol.code_point, ids);
        }
    }
}

void WordPieces::add_bytes(uint32_t code_point, std::vector<int32_t>& ids) const {
    const uint32_t point = code_point == white_space ? mark : code_point;
    const auto add = [&](uint32_t byte) { ids.push_back(byte_ids_[byte]); };
    const auto add_rest = [&](int shift) { add(0x80 | (point >> shift & 0x3F)); };
    if (point < 0x80) return add(point);
    if (point < 0x800) {
        add(0xC0 | point >> 6);
    } else if (point < 0x10000) {
        add(0xE0 | point >> 12);
        add_rest(6);
    } else {
        add(0xF0 | point >> 18);
        add_rest(12);
        add_rest(6);
    }
    add_rest(0);
}

}  // namespace megalrps
