// Whole documents packed into samples, number for number megalrps/data/packing.py, which defines and explains the rule.

#include "packing.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>
#include <string>

namespace megalrps {
namespace {

void require(bool sound, const char* what) {
    if (!sound) throw std::invalid_argument(what);
}

// Samples with room for more, by room; of those with the same room, the one that came to it last is taken first.
class OpenSamples {
public:
    static constexpr int32_t kNone = -1;

    explicit OpenSamples(size_t slots)
        : last_(slots, kNone), present_(slots / 64 + 1, 0), words_(present_.size() / 64 + 1, 0) {}

    void clear() {
        std::fill(last_.begin(), last_.end(), kNone);
        std::fill(present_.begin(), present_.end(), 0);
        std::fill(words_.begin(), words_.end(), 0);
        before_.clear();
    }

    void put(int32_t sample, size_t room) {
        const auto at = static_cast<size_t>(sample);
        if (before_.size() <= at) before_.resize(at + 1);
        before_[at] = last_[room];
        last_[room] = sample;
        present_[room / 64] |= uint64_t{1} << (room % 64);
        words_[room / 4096] |= uint64_t{1} << (room / 64 % 64);
    }

    // Takes the sample with the least room that is at least `length`, and sets `room`; kNone if there is none.
    int32_t take(size_t length, size_t& room) {
        size_t word = length / 64;
        uint64_t bits = present_[word] & (~uint64_t{0} << (length % 64));
        if (bits == 0) {
            word = next(words_, word + 1);
            if (word == kNowhere) return kNone;
            bits = present_[word];
        }
        room = word * 64 + static_cast<size_t>(std::countr_zero(bits));
        const int32_t sample = last_[room];
        last_[room] = before_[static_cast<size_t>(sample)];
        if (last_[room] == kNone) {
            present_[word] &= ~(uint64_t{1} << (room % 64));
            if (present_[word] == 0) words_[word / 64] &= ~(uint64_t{1} << (word % 64));
        }
        return sample;
    }

private:
    static constexpr size_t kNowhere = ~size_t{0};

    // The first bit that is set from `place` on.
    static size_t next(const std::vector<uint64_t>& bits, size_t place) {
        for (size_t word = place / 64; word < bits.size(); ++word, place = word * 64) {
            const uint64_t rest = bits[word] & (~uint64_t{0} << (place % 64));
            if (rest != 0) return word * 64 + static_cast<size_t>(std::countr_zero(rest));
        }
        return kNowhere;
    }

    std::vector<int32_t> last_;      // by room
    std::vector<uint64_t> present_;  // a bit for each room that some sample has
    std::vector<uint64_t> words_;    // a bit for each word of those that is not 0
    std::vector<int32_t> before_;    // by sample: the one that had its room before it
};

// Packs block after block; what is kept from one to the next is memory, never a number.
class Packer {
public:
    Packer(const DatasetIndex& index, const Packing& packing)
        : index_(index),
          packing_(checked(packing)),
          bytes_(index.checked_bytes()),
          block_count_((index.document_count() + packing.block - 1) / packing.block),
          longest_first_(static_cast<size_t>(packing.sequence_length) + 2),
          open_(static_cast<size_t>(packing.sequence_length) + 1) {}

    size_t block_count() const { return block_count_; }

    // Packs a block and returns how many samples it gives.
    int64_t pack(size_t block) {
        cut(block * packing_.block, std::min((block + 1) * packing_.block, index_.document_count()));
        sort();
        fill();
        return full_samples() + sample_count_;
    }

    // Appends the pieces of a sample of the block that was packed last.
    void append(int64_t sample, PackedPieces& pieces) const {
        if (sample < full_samples()) {
            const auto run = std::upper_bound(run_ends_.begin(), run_ends_.end(), sample) - run_ends_.begin();
            const int64_t before = run == 0 ? 0 : run_ends_[static_cast<size_t>(run) - 1];
            const int64_t start = run_starts_[static_cast<size_t>(run)];
            pieces.starts.push_back(start + (sample - before) * packing_.sequence_length);
            pieces.lengths.push_back(packing_.sequence_length + 1);
            return;
        }
        for (size_t place = 0; place < samples_.size(); ++place) {
            if (samples_[place] != sample - full_samples()) continue;
            pieces.starts.push_back(starts_[order_[place]]);
            pieces.lengths.push_back(lengths_[order_[place]]);
        }
    }

private:
    static const Packing& checked(const Packing& packing) {
        require(packing.sequence_length >= 1 && packing.sequence_length <= kLongestPacked,
                "samples to pack have 1 to 2^24 tokens");
        require(packing.block >= 1 && packing.block < (size_t{1} << 31), "a block has 1 to 2^31 - 1 documents");
        return packing;
    }

    int64_t full_samples() const { return run_ends_.empty() ? 0 : run_ends_.back(); }

    // Full pieces are samples at once; the rest of each document, if it has a label, becomes a piece to be packed.
    void cut(size_t first, size_t last) {
        run_ends_.clear();
        run_starts_.clear();
        starts_.clear();
        lengths_.clear();
        const int shift = std::countr_zero(static_cast<uint64_t>(index_.token_bytes));
        const int64_t length = packing_.sequence_length;
        int64_t offset = index_.joined_offset(first, bytes_);
        for (size_t document = first; document < last; ++document) {
            const int64_t next = index_.joined_offset(document + 1, bytes_);
            if (next < offset) throw DamagedIndex("document " + std::to_string(document) + " ends before it begins");
            const int64_t start = offset >> shift;
            const int64_t labels = ((next - offset) >> shift) - 1;
            offset = next;
            if (labels < 1) continue;
            const int64_t full = labels < length ? 0 : labels / length;
            const int64_t rest = labels - full * length;
            if (full > 0) {
                run_ends_.push_back(full_samples() + full);
                run_starts_.push_back(start);
            }
            if (rest > 0) {
                starts_.push_back(start + full * length);
                lengths_.push_back(static_cast<int32_t>(rest + 1));
            }
        }
    }

    // The pieces, the longest first; of the same length in the order of the documents.
    void sort() {
        std::fill(longest_first_.begin(), longest_first_.end(), 0);
        const auto longest = static_cast<int32_t>(packing_.sequence_length) + 1;
        for (const int32_t length : lengths_) longest_first_[static_cast<size_t>(longest - length) + 1] += 1;
        std::partial_sum(longest_first_.begin(), longest_first_.end(), longest_first_.begin());
        order_.resize(lengths_.size());
        for (size_t piece = 0; piece < lengths_.size(); ++piece) {
            order_[longest_first_[static_cast<size_t>(longest - lengths_[piece])]++] = static_cast<uint32_t>(piece);
        }
    }

    // Best fit: each piece goes where it leaves the least room.
    void fill() {
        open_.clear();
        samples_.clear();
        sample_count_ = 0;
        for (const uint32_t piece : order_) {
            const auto length = static_cast<size_t>(lengths_[piece]);
            auto room = static_cast<size_t>(packing_.sequence_length) + 1;
            int32_t sample = open_.take(length, room);
            if (sample == OpenSamples::kNone) sample = sample_count_++;
            samples_.push_back(sample);
            if (room > length) open_.put(sample, room - length);
        }
    }

    const DatasetIndex& index_;
    Packing packing_;
    int64_t bytes_;
    size_t block_count_;
    std::vector<int64_t> run_ends_;        // samples up to and with each run of full pieces of one document
    std::vector<int64_t> run_starts_;      // where its first piece starts
    std::vector<int64_t> starts_;          // of the other pieces
    std::vector<int32_t> lengths_;         // and their tokens, 2 to sequence_length
    std::vector<uint32_t> longest_first_;  // by slots left free: how many pieces come before
    std::vector<uint32_t> order_;          // pieces, longest first
    std::vector<int32_t> samples_;         // of each, in that order
    int32_t sample_count_ = 0;
    OpenSamples open_;
};

}  // namespace

std::vector<int64_t> count_packed(const DatasetIndex& index, const Packing& packing) {
    Packer packer(index, packing);
    std::vector<int64_t> ends(packer.block_count());
    int64_t samples = 0;
    for (size_t block = 0; block < ends.size(); ++block) {
        samples += packer.pack(block);
        ends[block] = samples;
    }
    return ends;
}

PackedPieces packed_pieces(const DatasetIndex& index, const Packing& packing, std::span<const int64_t> ends,
                           std::span<const int64_t> numbers) {
    Packer packer(index, packing);
    require(ends.size() == packer.block_count(), "ends must say the samples of each block");
    // By number, so that each block is packed once.
    std::vector<size_t> order(numbers.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return numbers[a] < numbers[b]; });
    PackedPieces sorted;
    std::vector<size_t> firsts(numbers.size() + 1, 0);  // of each row, in that order
    int64_t begin = 0;
    int64_t end = 0;  // samples of the block in hand: none yet
    for (size_t place = 0; place < order.size(); ++place) {
        const int64_t number = numbers[order[place]];
        require(number >= 0 && !ends.empty() && number < ends.back(), "there is no packed sample of this number");
        if (number >= end) {
            const auto block = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), number) - ends.begin());
            require(block < ends.size(), "ends must not decrease");
            begin = block == 0 ? 0 : ends[block - 1];
            end = ends[block];
            require(begin >= 0 && begin <= number && number < end, "ends must not decrease");
            if (packer.pack(block) != end - begin) {
                throw DamagedIndex("block " + std::to_string(block) + " has other samples than were counted");
            }
        }
        packer.append(number - begin, sorted);
        firsts[place + 1] = sorted.starts.size();
    }
    std::vector<size_t> places(order.size());
    for (size_t place = 0; place < order.size(); ++place) places[order[place]] = place;
    PackedPieces pieces{{0}, {}, {}};
    for (const size_t place : places) {
        for (size_t piece = firsts[place]; piece < firsts[place + 1]; ++piece) {
            pieces.starts.push_back(sorted.starts[piece]);
            pieces.lengths.push_back(sorted.lengths[piece]);
        }
        pieces.bounds.push_back(static_cast<int64_t>(pieces.starts.size()));
    }
    return pieces;
}

void fill_packed(std::span<const int64_t> tokens, std::span<const int64_t> bounds, std::span<const int64_t> lengths,
                 size_t sequence_length, int64_t padding, const PackedRows& rows) {
    const size_t slots = sequence_length + 1;
    size_t used = 0;
    for (size_t row = 0; row + 1 < bounds.size(); ++row) {
        require(bounds[row] >= 0 && bounds[row] <= bounds[row + 1] &&
                    static_cast<size_t>(bounds[row + 1]) <= lengths.size(),
                "bounds must be places in lengths, in order");
        int64_t* const row_tokens = rows.tokens + row * slots;
        int32_t* const row_starts = rows.starts + row * sequence_length;
        bool* const row_counted = rows.counted + row * sequence_length;
        size_t place = 0;
        const auto close = [&](size_t until, bool counted) {  // slots [place, until) are one document
            const size_t inputs = std::min(until, sequence_length);
            if (place < inputs) {
                std::fill(row_starts + place, row_starts + inputs, static_cast<int32_t>(place));
                std::fill(row_counted + place, row_counted + inputs, counted);
                if (until <= sequence_length) row_counted[until - 1] = false;  // its label is of another document
            }
            place = until;
        };
        for (auto piece = static_cast<size_t>(bounds[row]); piece < static_cast<size_t>(bounds[row + 1]); ++piece) {
            const int64_t length = lengths[piece];
            require(length >= 1 && static_cast<uint64_t>(length) <= slots - place &&
                        static_cast<uint64_t>(length) <= tokens.size() - used,
                    "pieces must fit their row and be among the tokens");
            const auto size = static_cast<size_t>(length);
            std::copy_n(tokens.begin() + static_cast<ptrdiff_t>(used), size, row_tokens + place);
            used += size;
            close(place + size, true);
        }
        std::fill(row_tokens + place, row_tokens + slots, padding);
        if (place < slots) close(slots, false);
    }
}

}  // namespace megalrps
