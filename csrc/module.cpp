// The Python module megalrps._native: checks what Python hands over, then computes without the GIL.

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "adamw.h"
#include "bindings.h"
#include "cuda.h"
#include "norm.h"
#include "permutation.h"

namespace py = pybind11;

using megalrps::Array;
using megalrps::flat_view;

namespace {

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

size_t bytes_of(megalrps::FloatType type) {
    using megalrps::FloatType;
    switch (type) {
        case FloatType::float64: return 8;
        case FloatType::float32: return 4;
        case FloatType::bfloat16:
        case FloatType::float16: return 2;
        default: return 1;
    }
}

// What can be seen of an address: that there may be so many numbers at it, each where its type may lie (compilers rely
// on that: a vector loop over numbers that do not can end in a fault). That they are the caller's is for him to know.
void require_memory(uintptr_t address, size_t elements, megalrps::FloatType type, const char* name) {
    if (elements == 0) return;
    constexpr auto kHighest = static_cast<size_t>(PTRDIFF_MAX);
    const size_t bytes = bytes_of(type);
    if (address == 0) throw py::value_error(std::string(name) + ": the address is null");
    if (address % bytes != 0) throw py::value_error(std::string(name) + ": the address is not aligned");
    if (address > kHighest || elements > (kHighest - address) / bytes) {
        throw py::value_error(std::string(name) + ": no memory is so large");
    }
}

// Memory comes as addresses, because numpy has no bfloat16 and torch's headers stay out.
megalrps::AdamwMemory adamw_memory(uintptr_t param, uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq,
                                   uintptr_t narrow, size_t elements, const std::string& type,
                                   const std::string& exp_avg_type, const std::string& exp_avg_sq_type,
                                   const std::string& narrow_type) {
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
    require_memory(param, elements, memory.type, "param");
    require_memory(grad, elements, memory.type, "grad");
    require_memory(exp_avg, elements, memory.exp_avg_type, "exp_avg");
    require_memory(exp_avg_sq, elements, memory.exp_avg_sq_type, "exp_avg_sq");
    if (memory.narrow_type != megalrps::FloatType::none) {
        require_memory(narrow, elements, memory.narrow_type, "narrow");
    }
    return memory;
}

void adamw(uintptr_t param, uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t narrow, size_t elements,
           const std::string& type, const std::string& exp_avg_type, const std::string& exp_avg_sq_type,
           const std::string& narrow_type, double gradient_scale, double first_weight, double second_decay,
           double second_weight, double epsilon, double decay, double update_size, int threads,
           const std::string& instructions) {
    const auto memory = adamw_memory(param, grad, exp_avg, exp_avg_sq, narrow, elements, type, exp_avg_type,
                                     exp_avg_sq_type, narrow_type);
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

double sum_of_squares(uintptr_t values, size_t elements, const std::string& type, int threads,
                      const std::string& instructions) {
    const auto kind = float_type(type);
    require_memory(values, elements, kind, "values");
    const auto chosen = instructions_of(instructions);
    py::gil_scoped_release unlocked;
    return megalrps::sum_of_squares(reinterpret_cast<const void*>(values), elements, kind, threads, chosen);
}

// ---- The CUDA part: addresses are the device's. ----

void require_alignment(uintptr_t address, const char* name) {
    if (address % megalrps::kCudaAlignment != 0) {
        throw py::value_error(std::string(name) + " must start at a multiple of " +
                              std::to_string(megalrps::kCudaAlignment) + " bytes on a GPU");
    }
}

void raise(const char* error) {
    if (error != nullptr) {
        throw std::runtime_error(std::string("megalrps._native: ") + error);
    }
}

void adamw_cuda(uintptr_t param, uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t narrow,
                size_t elements, const std::string& exp_avg_type, const std::string& exp_avg_sq_type,
                const std::string& narrow_type, uintptr_t gradient_scale, uintptr_t found_inf, double first_weight,
                double second_decay, double second_weight, double epsilon, double decay, double update_size,
                uintptr_t stream) {
    const auto memory = adamw_memory(param, grad, exp_avg, exp_avg_sq, narrow, elements, "float32", exp_avg_type,
                                     exp_avg_sq_type, narrow_type);
    require_alignment(param, "param");
    require_alignment(grad, "grad");
    require_alignment(exp_avg, "exp_avg");
    require_alignment(exp_avg_sq, "exp_avg_sq");
    require_alignment(narrow, "narrow");
    const megalrps::AdamwFactors factors{
        .gradient_scale = 1.0,
        .first_weight = first_weight,
        .second_decay = second_decay,
        .second_weight = second_weight,
        .epsilon = epsilon,
        .decay = decay,
        .update_size = update_size,
    };
    raise(megalrps::adamw_cuda(memory, factors, reinterpret_cast<const float*>(gradient_scale),
                               reinterpret_cast<const float*>(found_inf), reinterpret_cast<void*>(stream)));
}

void sum_of_squares_cuda(uintptr_t values, size_t elements, const std::string& type, uintptr_t partials,
                         uintptr_t result, uintptr_t stream) {
    const auto kind = float_type(type);
    require_alignment(values, "the buffer");
    require_alignment(partials, "partials");
    require_alignment(result, "the result");
    require_memory(values, elements, kind, "the buffer");
    require_memory(partials, megalrps::pieces_of(elements), megalrps::FloatType::float32, "partials");
    require_memory(result, 1, megalrps::FloatType::float64, "the result");
    raise(megalrps::sum_of_squares_cuda(reinterpret_cast<const void*>(values), elements, kind,
                                        reinterpret_cast<float*>(partials), reinterpret_cast<double*>(result),
                                        reinterpret_cast<void*>(stream)));
}

py::tuple cuda_targets() {
#ifdef MEGALRPS_CUDA_TARGETS
    return py::tuple(py::str(MEGALRPS_CUDA_TARGETS).attr("split")());
#else
    return py::tuple(0);
#endif
}

py::tuple cuda_available() {
    const char* missing = nullptr;
    {
        py::gil_scoped_release unlocked;  // the driver may take seconds to start
        missing = megalrps::cuda_missing();
    }
    return py::make_tuple(missing == nullptr, missing == nullptr ? "" : missing);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Compiled twins of numpy and torch functions of megalrps.";
    // noconvert: an array of another type or layout is a mistake of the caller, not something to copy in silence.
    module.def("permute", &permute, py::arg("indices").noconvert(), py::arg("size"), py::arg("round_keys").noconvert(),
               "Keyed permutation of [0, size): int64 [n] -> int64 [n]; see megalrps.data.permutation.");
    megalrps::bind_windows(module);
    megalrps::bind_word_pieces(module);
    module.def("adamw", &adamw, py::kw_only(), py::arg("param"), py::arg("grad"), py::arg("exp_avg"),
               py::arg("exp_avg_sq"), py::arg("narrow") = 0, py::arg("elements"), py::arg("type"),
               py::arg("exp_avg_type"), py::arg("exp_avg_sq_type"), py::arg("narrow_type") = "",
               py::arg("gradient_scale"), py::arg("first_weight"), py::arg("second_decay"), py::arg("second_weight"),
               py::arg("epsilon"), py::arg("decay"), py::arg("update_size"),
               py::arg("threads") = 1, py::arg("instructions") = "best",
               "One AdamW update in place, of memory given by addresses; see megalrps.kernels.adamw.");
    module.def("sum_of_squares", &sum_of_squares, py::kw_only(), py::arg("values"), py::arg("elements"),
               py::arg("type"), py::arg("threads") = 1, py::arg("instructions") = "best",
               "The sum of squares of memory given by its address; see csrc/norm.h.");
    module.def("has_avx2", &megalrps::has_avx2, "Whether instructions='avx2' is there.");
    module.def("adamw_cuda", &adamw_cuda, py::kw_only(), py::arg("param"), py::arg("grad"), py::arg("exp_avg"),
               py::arg("exp_avg_sq"), py::arg("narrow") = 0, py::arg("elements"), py::arg("exp_avg_type"),
               py::arg("exp_avg_sq_type"), py::arg("narrow_type") = "", py::arg("gradient_scale") = 0,
               py::arg("found_inf") = 0, py::arg("first_weight"), py::arg("second_decay"), py::arg("second_weight"),
               py::arg("epsilon"), py::arg("decay"), py::arg("update_size"), py::arg("stream"),
               "Launches adamw() on a stream; gradient_scale, found_inf: addresses of a float, or 0; see csrc/cuda.h.");
    module.def("pieces_of", &megalrps::pieces_of, py::arg("elements"),
               "How many floats of scratch sum_of_squares_cuda() needs.");
    module.def("sum_of_squares_cuda", &sum_of_squares_cuda, py::kw_only(), py::arg("values"), py::arg("elements"),
               py::arg("type"), py::arg("partials"), py::arg("result"), py::arg("stream"),
               "Launches sum_of_squares() on a stream; the double at result receives it; see csrc/cuda.h.");
    module.def("cuda_targets", &cuda_targets, "What the CUDA part was compiled for; empty: built without nvcc.");
    module.def("cuda_available", &cuda_available, "Whether the CUDA part can be used here, and why not.");
}
