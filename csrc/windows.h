#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>

namespace megalrps {

enum class TokenType { uint8, int8, uint16, int16, int32, int64 };

// Numbers of a file, wherever it has them: the arrays of an index lie at odd addresses.
template <typename T>
class StoredNumbers {
public:
    StoredNumbers(const std::byte* data, size_t size) : data_(data), size_(size) {}

    size_t size() const { return size_; }

    // The caller has seen that `place` is below size().
    T operator[](size_t place) const {
        T value;
        std::memcpy(&value, data_ + place * sizeof(T), sizeof(T));
        return value;
    }

private:
    const std::byte* data_;
    size_t size_;
};

// The arrays of an index (megalrps/data/indexed.py has the format), none of whose numbers is trusted.
struct DatasetIndex {
    StoredNumbers<int64_t> pointers;   // byte offset of each sequence
    StoredNumbers<int32_t> lengths;    // tokens of each sequence
    StoredNumbers<int64_t> documents;  // first sequence of each document, then the number of sequences
    int64_t token_bytes;               // 1, 2, 4 or 8

    size_t sequence_count() const { return lengths.size(); }
    size_t document_count() const { return documents.size() - 1; }

    // Bytes of all tokens; with it the shape of the arrays and both their ends are checked, which the others rely on.
    int64_t checked_bytes() const;

    // Byte offset of the first token of `document`, below documents.size(); in [0, bytes] whatever the numbers are.
    int64_t document_offset(size_t document, int64_t bytes) const;

    // The same; the sequence before it must end there.
    int64_t joined_offset(size_t document, int64_t bytes) const;
};

// A number of an index that cannot be: the file is damaged.
class DamagedIndex : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// Writes the windows of `length` tokens from each of `starts` to `rows`, one after the other, and returns the number of
// the first row with a token outside [0, vocabulary), or -1. `tokens` may lie at any address.
// Throws std::invalid_argument for a window that is not inside [0, count).
int64_t gather(TokenType type, const std::byte* tokens, size_t count, std::span<const int64_t> starts, size_t length,
               uint64_t vocabulary, int64_t* rows);

// Writes, for each token of each such window, the place in the window where its document begins, 0 if before it.
// Throws std::invalid_argument as gather does and for a length above 2^31 - 1, DamagedIndex for a number that cannot be.
void document_starts(const DatasetIndex& index, std::span<const int64_t> starts, size_t length, int32_t* places);

}  // namespace megalrps
