#pragma once

#include <algorithm>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace megalrps {

// Calls work(begin, end) for ranges that together are [0, elements), each but the last a multiple of `multiple` long,
// on up to `threads` threads, of which none but the last gets less than `least` elements. Returns when all is done.
template <typename Work>
void in_pieces(size_t elements, size_t least, size_t multiple, int threads, const Work& work) {
    const size_t pieces = std::clamp<size_t>(elements / least, 1, std::max(threads, 1));
    const size_t length = (elements / pieces / multiple + 1) * multiple;
    std::vector<std::jthread> workers;  // joined when they go out of scope
    workers.reserve(pieces);
    for (size_t begin = length; begin < elements; begin += length) {
        const size_t end = std::min(begin + length, elements);
        try {
            workers.emplace_back([&work, begin, end] { work(begin, end); });
        } catch (const std::system_error&) {  // no more threads: the piece must be done all the same
            work(begin, end);
        }
    }
    work(0, std::min(length, elements));
}

}  // namespace megalrps
