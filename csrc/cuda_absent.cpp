// What stands in for the CUDA part where it was built without nvcc.

#include "cuda.h"

#ifndef MEGALRPS_CUDA_TARGETS

namespace megalrps {

const char* cuda_missing() {
    return "it was built without nvcc: put it on PATH, then: python setup.py build_ext --inplace";
}

const char* adamw_cuda(const AdamwMemory&, const AdamwFactors&, const float*, const float*, void*) {
    return cuda_missing();
}

const char* sum_of_squares_cuda(const void*, size_t, FloatType, float*, double*, void*) { return cuda_missing(); }

}  // namespace megalrps

#endif
