#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>

namespace megalrps {

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

// The numbers of a flat array; ValueError, naming it, for another shape or alignment.
template <typename T>
std::span<const T> flat_view(const Array<T>& array, const char* name) {
    if (array.ndim() != 1) {
        throw pybind11::value_error(std::string(name) + " must have one dimension");
    }
    if (array.size() > 0 && reinterpret_cast<uintptr_t>(array.data()) % alignof(T) != 0) {
        // numpy makes arrays of any bytes of a buffer
        throw pybind11::value_error(std::string(name) + " must be aligned");
    }
    return {array.data(), static_cast<size_t>(array.size())};
}

// Each part of the module adds its own functions and classes.
void bind_windows(pybind11::module_& module);
void bind_word_pieces(pybind11::module_& module);

}  // namespace megalrps
