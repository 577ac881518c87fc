// The Python module megalrps._native: checks what Python hands over, then computes without the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "adamw.h"
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

megalrps::FloatType float_type(const std::string& name) {
    using megalrps::FloatType;
    if (name.empty()) return FloatType::none;
    if (name == "float32") return FloatType::float32;
    if (name == "float64") return FloatType::float64;
    if (name == "bfloat16") return FloatType::bfloat16;
    if (name == "float16") return FloatType::float16;
    throw py::value_error("unknown type " + name);
}

megalrps::Instructions instructions_of(const std::string& name) {
    using megalrps::Instructions;
    if (name == "best") return Instructions::best;
    if (name == "baseline") return Instructions::baseline;
    if (name == "avx2") return Instructions::avx2;
    throw py::value_error("unknown instructions " + name);
}

// Memory comes as addresses, because numpy has no bfloat16 and torch's headers stay out.
void adamw(uintptr_t param, uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t narrow, size_t elements,
           const std::string& type, const std::string& exp_avg_type, const std::string& exp_avg_sq_type,
           const std::string& narrow_type, double gradient_scale, double first_weight, double second_decay,
           double second_weight, double epsilon, double decay, double update_size, int threads,
           const std::string& instructions) {
    const megalrps::AdamwMemory memory{
        .param = reinterpret_cast<void*>(param),
        .grad = reinterpret_cast<const void*>(grad),
        .exp_avg = reinterpret_cast<void*>(exp_avg),
        .exp_avg_sq = reinterpret_cast<void*>(exp_avg_sq),
        .narrow = reinterpret_cast<void*>(narrow),
        .elements = elements,
        .type = float_type(type),
        .exp_avg_type = float_type(exp_avg_type),
        .exp_avg_sq_type = float_type(exp_avg_sq_type),
        .narrow_type = float_type(narrow_type),
    };
    const bool missing = param == 0 || grad == 0 || exp_avg == 0 || exp_avg_sq == 0 ||
                         (narrow == 0 && memory.narrow_type != megalrps::FloatType::none);
    if (elements > 0 && missing) {
        throw py::value_error("an address is null");
    }
    const megalrps::AdamwFactors factors{
        .gradient_scale = gradient_scale,
        .first_weight = first_weight,
        .second_decay = second_decay,
        .second_weight = second_weight,
        .epsilon = epsilon,
        .decay = decay,
        .update_size = update_size,
    };
    const auto chosen = instructions_of(instructions);
    py::gil_scoped_release unlocked;
    megalrps::adamw(memory, factors, threads, chosen);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Compiled twins of numpy and torch functions of megalrps.";
    // noconvert: an array of another type or layout is a mistake of the caller, not something to copy in silence.
    module.def("permute", &permute, py::arg("indices").noconvert(), py::arg("size"), py::arg("round_keys").noconvert(),
               "Keyed permutation of [0, size): int64 [n] -> int64 [n]; see megalrps.data.permutation.");
    module.def("adamw", &adamw, py::kw_only(), py::arg("param"), py::arg("grad"), py::arg("exp_avg"),
               py::arg("exp_avg_sq"), py::arg("narrow") = 0, py::arg("elements"), py::arg("type"),
               py::arg("exp_avg_type"), py::arg("exp_avg_sq_type"), py::arg("narrow_type") = "",
               py::arg("gradient_scale"), py::arg("first_weight"), py::arg("second_decay"), py::arg("second_weight"),
               py::arg("epsilon"), py::arg("decay"), py::arg("update_size"),
               py::arg("threads") = 1, py::arg("instructions") = "best",
               "One AdamW update in place, of memory given by addresses; see megalrps.kernels.adamw.");
    module.def("has_avx2", &megalrps::has_avx2, "Whether adamw(instructions='avx2') is there.");
}
