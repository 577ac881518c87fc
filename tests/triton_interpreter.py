"""Triton kernels on a CPU: imported before any kernel, it turns Triton's interpreter on and mends its bfloat16.

The interpreter keeps bfloat16 as 16-bit integers. It multiplies these in ``tl.dot`` (triton-lang/triton#11584), cuts
fp32 off where a GPU rounds it to nearest even, and widens numbers below 2^-126 wrongly. What is not mended: additions
and reductions of bfloat16. The kernels widen what they load at once, so none of them does either.
"""

import contextlib
import os
from typing import Any

import numpy as np
import torch

ON_CPU = not torch.cuda.is_available()
if ON_CPU:
    os.environ["TRITON_INTERPRET"] = "1"

AS_IT_COMES: dict[str, Any] = {}
"""What :func:`mend` replaces, for the test that the interpreter still needs it."""


def mend() -> None:
    """Convert as a GPU does, and multiply bfloat16 as numbers."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    convert, create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    AS_IT_COMES.update(_convert_float=convert, create_dot=create_dot)

    def converted(data, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return np.where(nan, (bits >> 16) | 0x40, nearest).astype(np.uint16)
        if source == tl.bfloat16 and target == tl.float32:
            return data.astype(np.uint32) << np.uint32(16)
        return convert(data, source, target, rounding_mode)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return create_dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    interpreter._convert_float = converted
    interpreter.InterpreterBuilder.create_dot = dot
    # Where descriptors that a kernel makes find their memory.
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))


if ON_CPU:
    with contextlib.suppress(ImportError):  # without Triton its tests are skipped, and say so
        mend()
