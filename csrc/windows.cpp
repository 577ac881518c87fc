// Windows of tokens and where documents begin in them, number for number megalrps/data/windows.py, which explains both.
// The files are mapped, and of an index not all numbers have been read before: each that is used is checked here.

#include "windows.h"

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

namespace megalrps {
namespace {

constexpr int kGuesses = 3;

void require_window(int64_t start, size_t length, size_t count) {
    if (start < 0 || length > count || static_cast<size_t>(start) > count - length) {
        throw std::invalid_argument("a window of " + std::to_string(length) + " from " + std::to_string(start) +
                                    " leaves the " + std::to_string(count) + " tokens");
    }
}

// Copies and widens one window; true if every token is at most `highest`. A negative one is not: as an unsigned number
// it is above all that its type can hold, and `highest` is one of those.
template <typename T>
bool gather_row(const std::byte* tokens, size_t length, std::make_unsigned_t<T> highest, int64_t* row) {
    using Unsigned = std::make_unsigned_t<T>;
    Unsigned seen = 0;
    for (size_t place = 0; place < length; ++place) {
        Unsigned token;
        std::memcpy(&token, tokens + place * sizeof(T), sizeof(T));
        seen = std::max(seen, token);
        row[place] = static_cast<int64_t>(token);
    }
    return seen <= highest;
}

template <typename T>
int64_t gather_rows(const std::byte* tokens, size_t count, std::span<const int64_t> starts, size_t length,
                    uint64_t vocabulary, int64_t* rows) {
    constexpr auto kHighest = static_cast<uint64_t>(std::numeric_limits<T>::max());
    const auto highest = static_cast<std::make_unsigned_t<T>>(std::min(vocabulary - 1, kHighest));
    for (const int64_t start : starts) require_window(start, length, count);
    for (size_t row = 0; row < starts.size(); ++row) {
        const bool inside = gather_row<T>(tokens + static_cast<size_t>(starts[row]) * sizeof(T), length, highest,
                                          rows + row * length);
        if (!inside) return static_cast<int64_t>(row);
    }
    return -1;
}

// Finds documents by byte offsets; `bytes` as checked_bytes() gave it.
class DocumentSearch {
public:
    DocumentSearch(const DatasetIndex& index, int64_t bytes) : index_(index), bytes_(bytes) {}

    // The last document that begins at or before `target`, below bytes_. Offsets grow nearly evenly in real data, so a
    // few guesses come close, galloping brackets, and halving ends it: at worst a few times the steps of halving.
    size_t last_at_most(int64_t target) {
        low_ = 0;
        low_offset_ = 0;
        high_ = index_.document_count();
        high_offset_ = bytes_;
        bool above = false;
        for (int guess = 0; guess < kGuesses && high_ - low_ > 1; ++guess) {
            const double share =
                static_cast<double>(target - low_offset_) / static_cast<double>(high_offset_ - low_offset_);
            const auto step = static_cast<size_t>(share * static_cast<double>(high_ - low_));
            above = narrow(std::clamp<size_t>(low_ + step, low_ + 1, high_ - 1), target);
        }
        gallop(above, target);
        return halve(target);
    }

    // The same, from a document that is known to begin at or before `target`.
    size_t last_at_most_from(size_t document, int64_t offset, int64_t target) {
        low_ = document;
        low_offset_ = offset;
        high_ = index_.document_count();
        high_offset_ = bytes_;
        gallop(false, target);
        return halve(target);
    }

private:
    // Makes `middle`, between both ends, one of them: the low end unless it begins above `target` (true).
    bool narrow(size_t middle, int64_t target) {
        const int64_t offset = index_.document_offset(middle, bytes_);
        if (offset < low_offset_ || offset > high_offset_) {
            throw DamagedIndex("document " + std::to_string(middle) + " does not lie between its neighbours");
        }
        if (offset > target) {
            high_ = middle;
            high_offset_ = offset;
            return true;
        }
        low_ = middle;
        low_offset_ = offset;
        return false;
    }

    // Goes from one end towards the other, in steps that double, until the target lies between.
    void gallop(bool from_high, int64_t target) {
        for (size_t step = 1; high_ - low_ > step; step *= 2) {
            if (narrow(from_high ? high_ - step : low_ + step, target) != from_high) return;
        }
    }

    size_t halve(int64_t target) {
        while (high_ - low_ > 1) narrow(low_ + (high_ - low_) / 2, target);
        return low_;
    }

    const DatasetIndex& index_;
    int64_t bytes_;
    size_t low_ = 0;
    size_t high_ = 0;
    int64_t low_offset_ = 0;
    int64_t high_offset_ = 0;
};

void starts_of_row(const DatasetIndex& index, int64_t bytes, int64_t start, size_t length, int32_t* places) {
    const int64_t begin = start * index.token_bytes;
    const int64_t end = begin + static_cast<int64_t>(length) * index.token_bytes;
    DocumentSearch search(index, bytes);
    size_t document = search.last_at_most(begin);
    int64_t offset = index.joined_offset(document, bytes);
    int32_t document_place = 0;
    size_t place = 0;
    while (place < length) {
        int64_t next = index.joined_offset(document + 1, bytes);
        if (next < offset) throw DamagedIndex("document " + std::to_string(document) + " ends before it begins");
        if (next == offset && next < end) {  // documents without tokens: there may be any number
            document = search.last_at_most_from(document + 1, next, next);
            continue;
        }
        const auto until = static_cast<size_t>((std::min(next, end) - begin) / index.token_bytes);
        std::fill(places + place, places + until, document_place);
        place = until;
        document_place = static_cast<int32_t>(until);
        document += 1;
        offset = next;
    }
}

}  // namespace

int64_t DatasetIndex::checked_bytes() const {
    if (pointers.size() != lengths.size() || documents.size() == 0) {
        throw std::invalid_argument("pointers and lengths must be of one length, and documents not empty");
    }
    const size_t sequences = sequence_count();
    if (documents[0] != 0 || documents[documents.size() - 1] != static_cast<int64_t>(sequences)) {
        throw DamagedIndex("the documents do not run from 0 to the number of sequences");
    }
    if (sequences == 0) return 0;
    const int64_t last = pointers[sequences - 1];
    const int64_t length = lengths[sequences - 1];
    constexpr int64_t kLongest = std::numeric_limits<int64_t>::max() / 2;
    if (pointers[0] != 0 || last < 0 || last > kLongest || (last & (token_bytes - 1)) != 0 || length < 0) {
        throw DamagedIndex("the first or last sequence lies nowhere");
    }
    return last + length * token_bytes;
}

int64_t DatasetIndex::document_offset(size_t document, int64_t bytes) const {
    const int64_t sequence = documents[document];
    if (sequence == static_cast<int64_t>(sequence_count())) return bytes;
    if (sequence < 0 || sequence > static_cast<int64_t>(sequence_count())) {
        throw DamagedIndex("document " + std::to_string(document) + " begins with no sequence of the dataset");
    }
    const int64_t offset = pointers[static_cast<size_t>(sequence)];
    if (offset < 0 || offset > bytes || (offset & (token_bytes - 1)) != 0) {
        throw DamagedIndex("sequence " + std::to_string(sequence) + " begins with no token of the dataset");
    }
    return offset;
}

int64_t DatasetIndex::joined_offset(size_t document, int64_t bytes) const {
    const int64_t offset = document_offset(document, bytes);
    const auto sequence = static_cast<size_t>(documents[document]);
    if (sequence > 0) {
        const int64_t before = pointers[sequence - 1];
        if (before < 0 || before > offset || offset - before != int64_t{lengths[sequence - 1]} * token_bytes) {
            throw DamagedIndex("sequence " + std::to_string(sequence - 1) + " does not end where the next begins");
        }
    }
    return offset;
}

int64_t gather(TokenType type, const std::byte* tokens, size_t count, std::span<const int64_t> starts, size_t length,
               uint64_t vocabulary, int64_t* rows) {
    if (vocabulary == 0) throw std::invalid_argument("a vocabulary has at least one token");
    switch (type) {
        case TokenType::uint8: return gather_rows<uint8_t>(tokens, count, starts, length, vocabulary, rows);
        case TokenType::int8: return gather_rows<int8_t>(tokens, count, starts, length, vocabulary, rows);
        case TokenType::uint16: return gather_rows<uint16_t>(tokens, count, starts, length, vocabulary, rows);
        case TokenType::int16: return gather_rows<int16_t>(tokens, count, starts, length, vocabulary, rows);
        case TokenType::int32: return gather_rows<int32_t>(tokens, count, starts, length, vocabulary, rows);
        case TokenType::int64: return gather_rows<int64_t>(tokens, count, starts, length, vocabulary, rows);
    }
    throw std::invalid_argument("unknown type of tokens");
}

void document_starts(const DatasetIndex& index, std::span<const int64_t> starts, size_t length, int32_t* places) {
    if (length > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
        throw std::invalid_argument("places in a window must fit 32 bits");
    }
    const int64_t bytes = index.checked_bytes();
    const auto count = static_cast<size_t>(bytes / index.token_bytes);
    for (size_t row = 0; row < starts.size(); ++row) {
        require_window(starts[row], length, count);
        if (length > 0) starts_of_row(index, bytes, starts[row], length, places + row * length);
    }
}

}  // namespace megalrps
