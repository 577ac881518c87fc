// The Python module megalrps._native: checks what Python hands over, then computes without the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "permutation.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::span<const T> flat_view(const Array<T>& array, const char* name) {
    if (array.ndim() != 1) {
        throw py::value_error(std::string(name) + " must have one dimension");
    }
    return {array.data(), static_cast<size_t>(array.size())};
}

Array<int64_t> permute(const Array<int64_t>& indices, int64_t size, const Array<uint64_t>& round_keys) {
    const auto index_view = flat_view(indices, "indices");
    const auto key_view = flat_view(round_keys, "round_keys");
    Array<int64_t> permuted(indices.size());
    const std::span<int64_t> permuted_view{permuted.mutable_data(), index_view.size()};
    {
        py::gil_scoped_release unlocked;
        megalrps::permute(index_view, size, key_view, permuted_view);
    }
    return permuted;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Compiled twins of numpy functions of megalrps.";
    // noconvert: an array of another type or layout is a mistake of the caller, not something to copy in silence.
    module.def("permute", &permute, py::arg("indices").noconvert(), py::arg("size"), py::arg("round_keys").noconvert(),
               "Keyed permutation of [0, size): int64 [n] -> int64 [n]; see megalrps.data.permutation.");
}
