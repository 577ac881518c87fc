// Byte-pair encoding of text by the scores of its pieces, word by word, with a memory of the words seen.
//
// The algorithm (Sennrich et al., arXiv 1508.07909, as SentencePiece applies it, arXiv 1808.06226): a text is a row of
// characters; again and again the neighbours whose concatenation is the piece of the highest score become one symbol,
// of equal scores the leftmost pair. What is left are pieces, or characters that are no piece: those become the pieces
// of their UTF-8 bytes.
//
// Why words: a merge across the place between two characters makes a piece that holds these two as neighbours. Where no
// piece does, no merge crosses, and what is left and right of the place cannot influence one another: merges happen
// there in the order in which they would if the other side were absent. So the text is cut at all such places, and each
// part, a word, has the same pieces wherever it stands.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "word_memory.h"

namespace megalrps {

// Numbers by key, open addressing; a key is never all ones.
class NumberTable {
public:
    static constexpr uint32_t absent = UINT32_MAX;

    NumberTable() : slots_(16) {}
    void insert(uint64_t key, uint32_t value);
    uint32_t find(uint64_t key) const;

private:
    struct Slot {
        uint64_t key = UINT64_MAX;
        uint32_t value = absent;
    };
    static size_t scatter(uint64_t key) {
        key *= 0x9E3779B97F4A7C15u;
        return (key ^ key >> 32) * 0xD6E8FEB86659FD93u >> 24;
    }

    std::vector<Slot> slots_;
    size_t used_ = 0;
};

struct ScoredPiece {
    std::string text;  // UTF-8; white space is U+2581
    float score;
    int32_t id;
};

class WordPieces {
public:
    // byte_ids: [256]. prefix: a space is put before every text that is not empty. memory_bytes: what the memory of
    // words may take. Throws std::invalid_argument for what is no vocabulary.
    WordPieces(std::span<const ScoredPiece> pieces, std::span<const int32_t> byte_ids, bool prefix,
               size_t memory_bytes);

    // Adds the ids of text, which is valid UTF-8, to ids. Spaces count as U+2581. Calls of several threads wait for
    // one another.
    void encode(std::string_view text, std::vector<int32_t>& ids);

private:
    struct Symbol {
        uint32_t rank;        // pieces of equal score have the same; the lowest merges first
        int32_t id;           // -1: a character that pieces hold, but that is none itself
        uint32_t code_point;  // of a character
    };
    struct Node {
        uint32_t symbol, previous, next;
    };
    struct Merge {
        uint32_t rank, left, left_symbol, right_symbol, merged;
    };

    struct SpelledPiece {
        std::string text;  // with a space where the piece has U+2581
        std::vector<uint32_t> code_points, ends;  // of its characters
        float score;
        int32_t id;
    };
    // The numbers of symbols by their text, in the order in which they were added.
    class SymbolNames {
    public:
        uint32_t find(std::string_view text) const;  // NumberTable::absent: there is none
        void add(std::string_view text);

    private:
        NumberTable numbers_;  // by hash; of two texts of one hash the second stands under the next number
        std::vector<std::string_view> texts_;
    };

    static SpelledPiece spell(const ScoredPiece& piece);
    void add_characters(const SpelledPiece& piece, SymbolNames& names);
    void add_pieces(std::span<const SpelledPiece> spelled, SymbolNames& names);
    bool joined(uint32_t left, uint32_t right) const;
    size_t word_end(std::string_view text, size_t begin) const;
    void add_word(std::string_view word, WordMemory::Place place, std::vector<int32_t>& ids);
    void merge_word(std::string_view word, std::vector<int32_t>& ids);
    void propose(uint32_t left);
    void add_bytes(uint32_t code_point, std::vector<int32_t>& ids) const;
    uint32_t symbol_of(uint32_t code_point) const;

    std::mutex one_caller_;
    bool prefix_;
    std::vector<int32_t> byte_ids_;
    std::vector<Symbol> symbols_;
    NumberTable characters_;                  // code point -> symbol
    NumberTable merges_;                      // two symbols -> the symbol that they become
    NumberTable neighbours_;                  // two code points, not both ASCII, that stand together in a piece
    std::vector<uint8_t> ascii_neighbours_;   // [128 * 128]: the same where both are
    std::vector<uint32_t> ascii_characters_;  // [128] -> symbol
    WordMemory memory_;
    std::vector<Node> nodes_;
    std::vector<Merge> agenda_;
    std::vector<int32_t> word_ids_;
    std::string first_word_;
};

}  // namespace megalrps
