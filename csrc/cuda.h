#pragma once

#include <cstddef>

#include "adamw.h"

// What the CUDA part offers to the binding, without a header of CUDA. Each launcher returns null, or why nothing was
// launched. Memory is the device's and starts at a multiple of kCudaAlignment bytes; `stream` is a cudaStream_t of the
// current device. Nothing waits for the device.
namespace megalrps {

constexpr size_t kCudaAlignment = 16;  // bytes: loads and stores are 128 bits wide

// Null, or why the launchers cannot be used here: no nvcc when built, no driver, no device, one that is too old.
const char* cuda_missing();

// The update of adamw() with float32 parameters, bit for bit (of a NaN only that it is one). The device reads one float
// at `gradient_scale`, 1 where null, and not `factors.gradient_scale`. Where `found_inf` is not null and the float
// there is not zero, nothing is written.
const char* adamw_cuda(const AdamwMemory& memory, const AdamwFactors& factors, const float* gradient_scale,
                       const float* found_inf, void* stream);

// sum_of_squares() of float32 or bfloat16, bit for bit, into the device's `result`; `partials` is scratch of
// pieces_of(elements) floats.
const char* sum_of_squares_cuda(const void* values, size_t elements, FloatType type, float* partials, double* result,
                                void* stream);

}  // namespace megalrps
