"""Triton, where it is installed: ``triton``, the language ``tl``, and what every kernel of this room is launched with.

The package imports and computes on a CPU without Triton (the extra ``gpu`` brings it; torch's CUDA builds carry it).
The files of this room define their kernels all the same: without Triton the definitions stand for nothing, and a launch
raises ImportError with the mend.
"""

from typing import Any

from torch import Tensor


class _Absent:
    """Stands for a module that is not there: every name in it is it again, decorators give it, a launch is an error."""

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: object, **named: object) -> "_Absent":
        return self

    def __getitem__(self, grid: object) -> Any:
        raise ImportError("Triton is not installed, and this kernel is written in it: pip install 'megalrps[gpu]'")


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Absent()

HAS_TRITON = not isinstance(triton, _Absent)
"""Whether a kernel can be launched or compiled here."""


def rows_of(x: Tensor) -> Tensor:
    """``x`` [..., H] as contiguous rows [T, H]: a copy only where its memory is not so already."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least ``size``: the block that holds a row."""
    return 1 << (size - 1).bit_length()
