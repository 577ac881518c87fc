#pragma once

#include <cstddef>

#include "numbers.h"

namespace megalrps {

// What an update reads and writes: flat memory of `elements` numbers each, no two overlapping.
struct AdamwMemory {
    void* param;              // of `type`: float32 or float64
    const void* grad;         // of `type`
    void* exp_avg;            // of `type` or bfloat16
    void* exp_avg_sq;         // of `type` or bfloat16
    void* narrow;             // of bfloat16 or float16, or null
    size_t elements;
    FloatType type;
    FloatType exp_avg_type;
    FloatType exp_avg_sq_type;
    FloatType narrow_type;    // none: no narrow copy
};

// The scalars of one update, as megalrps/kernels/adamw.py derives them from the settings.
struct AdamwFactors {
    double gradient_scale;
    double first_weight;      // 1 - beta1
    double second_decay;      // beta2
    double second_weight;     // 1 - beta2
    double epsilon;           // epsilon * sqrt(1 - beta2^step)
    double decay;             // 1 - learning_rate * weight_decay
    double update_size;       // learning_rate * sqrt(1 - beta2^step) / (1 - beta1^step)
};

// One AdamW update. Threads beyond one per 2^20 elements are not started. The bits written depend on neither `threads`
// nor `instructions` nor where the memory starts. Throws std::invalid_argument for other types and for instructions
// that are not there.
void adamw(const AdamwMemory& memory, const AdamwFactors& factors, int threads, Instructions instructions);

}  // namespace megalrps
