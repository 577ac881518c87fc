#pragma once

// The AdamW update of one element: what csrc/adamw.cpp and csrc/adamw.cu both compute. megalrps/kernels/adamw.py holds
// the formula and its torch form.
//
// An element's result must not depend on where it lies: an optimizer that is cut into shards meets the same element in
// the vector body of one loop and in the scalar tail of another, on one processor or the next. So every element is
// computed by the same chain of additions, multiplications, divisions and square roots, each rounded once as IEEE 754
// prescribes. Nothing is contracted into a fused multiply-add (-ffp-contract=off and -fmad=false in setup.py) and
// nothing is reordered (no -ffast-math). Then neither vector width nor instruction set nor device can show in the bits.

#include <cmath>

#include "numbers.h"

namespace megalrps {

// AdamwFactors of csrc/adamw.h, rounded to the type that is computed in.
template <typename T>
struct Factors {
    T gradient_scale, first_weight, second_decay, second_weight, epsilon, decay, update_size;
};

// Operation for operation in the order of the torch form; returns the new parameter. T is what is computed in; First,
// Second: T or BFloat16.
template <typename T, typename First, typename Second>
MEGALRPS_INLINE T update_element(const Factors<T>& factors, T param, T grad, First& exp_avg, Second& exp_avg_sq) {
    const T first_decay = 1 - factors.first_weight;
    const bool from_old = factors.first_weight < T(0.5);  // the mean is reached from its nearer end: no cancellation
    const T gradient = grad * factors.gradient_scale;
    const T old = load<T>(exp_avg);
    const T way = gradient - old;
    const T first = from_old ? old + factors.first_weight * way : gradient - way * first_decay;
    const T second = load<T>(exp_avg_sq) * factors.second_decay + factors.second_weight * gradient * gradient;
    const T denominator = std::sqrt(second) + factors.epsilon;
    store(first, exp_avg);
    store(second, exp_avg_sq);
    return param * factors.decay - factors.update_size * first / denominator;
}

}  // namespace megalrps
