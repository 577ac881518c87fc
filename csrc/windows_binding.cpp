// What Python hands over to the functions of windows.h and packing.h, checked; arrays of files may lie at any address.

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "packing.h"
#include "windows.h"

namespace py = pybind11;

namespace megalrps {
namespace {

// The bytes of a flat array whose numbers lie end to end, the low byte of each first.
const std::byte* bytes_of(const py::array& array, const std::string& name) {
    if (array.ndim() != 1 || (array.size() > 1 && array.strides(0) != array.itemsize())) {
        throw py::value_error(name + " must be flat and contiguous");
    }
    if (array.dtype().byteorder() == '>') throw py::value_error(name + " must be little-endian");
    return static_cast<const std::byte*>(array.data());
}

TokenType token_type(const py::array& tokens) {
    const auto type = tokens.dtype();
    const bool is_signed = type.kind() == 'i';
    if (is_signed || type.kind() == 'u') {
        switch (type.itemsize()) {
            case 1: return is_signed ? TokenType::int8 : TokenType::uint8;
            case 2: return is_signed ? TokenType::int16 : TokenType::uint16;
            case 4: if (is_signed) return TokenType::int32; break;
            case 8: if (is_signed) return TokenType::int64; break;
            default: break;
        }
    }
    throw py::value_error("tokens must have one of the types that datasets are stored in");
}

template <typename T>
StoredNumbers<T> stored(const py::array& array, const std::string& name) {
    if (array.dtype().kind() != 'i' || array.itemsize() != static_cast<py::ssize_t>(sizeof(T))) {
        throw py::value_error(name + " must be signed integers of " + std::to_string(8 * sizeof(T)) + " bits");
    }
    return {bytes_of(array, name), static_cast<size_t>(array.size())};
}

DatasetIndex index_of(const py::array& pointers, const py::array& lengths, const py::array& documents,
                      int64_t token_bytes) {
    if (token_bytes != 1 && token_bytes != 2 && token_bytes != 4 && token_bytes != 8) {
        throw py::value_error("token_bytes must be 1, 2, 4 or 8");
    }
    return {stored<int64_t>(pointers, "pointers"), stored<int32_t>(lengths, "lengths"),
            stored<int64_t>(documents, "documents"), token_bytes};
}

// An array [rows, length], refused where no memory is so large: numpy would wrap round.
template <typename T>
Array<T> empty_rows(size_t rows, int64_t length) {
    constexpr auto kMost = static_cast<size_t>(PTRDIFF_MAX) / sizeof(T);
    if (length < 0 || static_cast<size_t>(length) > kMost / std::max<size_t>(rows, 1)) {
        throw py::value_error("length must be at least 0, and the rows must fit the memory");
    }
    return Array<T>({static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(length)});
}

py::tuple gather_windows(const py::array& tokens, const Array<int64_t>& starts, int64_t length, int64_t vocabulary) {
    const auto* bytes = bytes_of(tokens, "tokens");
    const auto type = token_type(tokens);
    const auto start_view = flat_view(starts, "starts");
    const auto count = static_cast<size_t>(tokens.size());
    if (vocabulary < 1) throw py::value_error("vocabulary must be at least 1");
    // Before memory is taken for them: windows of more tokens than there are.
    if (length > tokens.size() && !start_view.empty()) throw py::value_error("a window is longer than the tokens");
    auto rows = empty_rows<int64_t>(start_view.size(), length);
    int64_t* const row_data = rows.mutable_data();
    int64_t outside = -1;
    {
        py::gil_scoped_release unlocked;
        outside = gather(type, bytes, count, start_view, static_cast<size_t>(length),
                         static_cast<uint64_t>(vocabulary), row_data);
    }
    return py::make_tuple(std::move(rows), outside);
}

Array<int32_t> document_starts_of(const py::array& pointers, const py::array& lengths, const py::array& documents,
                                  int64_t token_bytes, const Array<int64_t>& starts, int64_t length) {
    const auto index = index_of(pointers, lengths, documents, token_bytes);
    const auto start_view = flat_view(starts, "starts");
    if (!start_view.empty() && length > index.checked_bytes() / token_bytes) {
        throw py::value_error("a window is longer than the tokens");
    }
    auto places = empty_rows<int32_t>(start_view.size(), length);
    int32_t* const place_data = places.mutable_data();
    {
        py::gil_scoped_release unlocked;
        document_starts(index, start_view, static_cast<size_t>(length), place_data);
    }
    return places;
}

template <typename T>
Array<T> array_of(const std::vector<T>& values) {
    return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

Array<int64_t> count(const py::array& pointers, const py::array& lengths, const py::array& documents,
                     int64_t token_bytes, size_t block, int64_t sequence_length) {
    const auto index = index_of(pointers, lengths, documents, token_bytes);
    std::vector<int64_t> ends;
    {
        py::gil_scoped_release unlocked;
        ends = count_packed(index, {block, sequence_length});
    }
    return array_of(ends);
}

py::tuple pieces_in(const py::array& pointers, const py::array& lengths, const py::array& documents,
                    int64_t token_bytes, size_t block, int64_t sequence_length, const Array<int64_t>& ends,
                    const Array<int64_t>& numbers) {
    const auto index = index_of(pointers, lengths, documents, token_bytes);
    const auto end_view = flat_view(ends, "ends");
    const auto number_view = flat_view(numbers, "numbers");
    PackedPieces pieces;
    {
        py::gil_scoped_release unlocked;
        pieces = packed_pieces(index, {block, sequence_length}, end_view, number_view);
    }
    return py::make_tuple(array_of(pieces.bounds), array_of(pieces.starts), array_of(pieces.lengths));
}

py::tuple fill(const Array<int64_t>& tokens, const Array<int64_t>& bounds, const Array<int64_t>& lengths,
               int64_t sequence_length, int64_t padding) {
    const auto token_view = flat_view(tokens, "tokens");
    const auto bound_view = flat_view(bounds, "bounds");
    const auto length_view = flat_view(lengths, "lengths");
    if (bound_view.empty()) throw py::value_error("bounds must have one more than the rows");
    if (sequence_length < 1 || sequence_length > kLongestPacked) throw py::value_error("sequence_length is no length");
    const size_t rows = bound_view.size() - 1;
    auto row_tokens = empty_rows<int64_t>(rows, sequence_length + 1);
    auto row_starts = empty_rows<int32_t>(rows, sequence_length);
    auto row_counted = empty_rows<bool>(rows, sequence_length);
    const PackedRows destination{row_tokens.mutable_data(), row_starts.mutable_data(), row_counted.mutable_data()};
    {
        py::gil_scoped_release unlocked;
        fill_packed(token_view, bound_view, length_view, static_cast<size_t>(sequence_length), padding, destination);
    }
    return py::make_tuple(std::move(row_tokens), std::move(row_starts), std::move(row_counted));
}

}  // namespace

void bind_windows(py::module_& module) {
    // Python knows it as IndexError; megalrps.data.windows makes an IndexDamagedError of it.
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const DamagedIndex& error) {
            PyErr_SetString(PyExc_IndexError, error.what());
        }
    });
    module.def("gather", &gather_windows, py::arg("tokens").noconvert(), py::arg("starts").noconvert(),
               py::arg("length"), py::arg("vocabulary"),
               "Windows as int64 [n, length], and the first with a token outside or -1; see megalrps.data.windows.");
    module.def("document_starts", &document_starts_of, py::arg("pointers").noconvert(), py::arg("lengths").noconvert(),
               py::arg("documents").noconvert(), py::arg("token_bytes"), py::arg("starts").noconvert(),
               py::arg("length"), "Where documents begin in windows: int32 [n, length]; see megalrps.data.windows.");
    module.def("count_packed", &count, py::arg("pointers").noconvert(), py::arg("lengths").noconvert(),
               py::arg("documents").noconvert(), py::arg("token_bytes"), py::arg("block"), py::arg("sequence_length"),
               "Samples up to and with each block of documents: int64 [blocks]; see megalrps.data.packing.");
    module.def("packed_pieces", &pieces_in, py::arg("pointers").noconvert(), py::arg("lengths").noconvert(),
               py::arg("documents").noconvert(), py::arg("token_bytes"), py::arg("block"), py::arg("sequence_length"),
               py::arg("ends").noconvert(), py::arg("numbers").noconvert(),
               "The pieces in samples: their bounds [n + 1], starts and lengths; see megalrps.data.packing.");
    module.def("fill_packed", &fill, py::arg("tokens").noconvert(), py::arg("bounds").noconvert(),
               py::arg("lengths").noconvert(), py::arg("sequence_length"), py::arg("padding"),
               "Rows of pieces: tokens, starts and what counts; see megalrps.data.packing.");
}

}  // namespace megalrps
