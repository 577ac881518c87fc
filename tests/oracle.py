"""What a kernel's result is held against: the same formula in fp64, by relative norm, and its surroundings untouched.

The bounds are those of one rounding, of a sum, of a matrix product; beside them a narrow result may be at most twice as
far off as plain torch operations in the same type (the rule of FlashAttention's tests: Dao 2023, arXiv 2307.08691).
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import ON_CPU

from megalrps.kernels.language import HAS_TRITON

ELEMENTWISE_FP32 = 1e-6
SUM_FP32 = 1e-5
ONE_ROUNDING_BF16 = 2.5e-3
ATTENTION_BF16 = 4e-3
GRADIENT_BF16 = 8e-3

DEVICE = "cpu" if ON_CPU else "cuda"
"""Where kernels run in the tests: on a GPU where there is one, else in Triton's interpreter."""

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

_FRAME = 64  # elements before and after: 128 bytes at least, so that the alignment of what lies between stays


def relative_error(result: Tensor, exact: Tensor) -> float:
    """``|result - exact| / |exact|`` in fp64; infinite where ``result`` is no number and ``exact`` is."""
    result, exact = result.double(), exact.double()
    assert result.shape == exact.shape
    error = ((result - exact).norm() / exact.norm().clamp(min=1e-300)).item()
    return error if error == error else float("inf")


def check(result: Tensor, exact: Tensor, bound: float, peer: Tensor | None = None) -> None:
    """``result`` is within ``bound`` of ``exact``, and within twice what ``peer``, plain torch in its type, is off.

    Of few numbers most may lie near the end of their rounding: these have twice the bound, and no peer.
    """
    few = result.numel() < 64
    error = relative_error(result, exact)
    assert error <= bound * (2 if few else 1), f"relative error {error:.2e}, bound {bound:.2e}"
    if peer is not None and not few:
        of_peer = relative_error(peer, exact)
        assert error <= 2 * of_peer + 1e-7, f"relative error {error:.2e}, plain torch in the same type {of_peer:.2e}"


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on the tests' device, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def framed(x: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """``x`` amid NaNs, and a check that they are still there: a store beyond the ends, or a load that counts, shows."""
    whole = torch.full((x.numel() + 2 * _FRAME,), torch.nan, dtype=x.dtype, device=x.device)
    inner = whole[_FRAME:-_FRAME].view(x.shape)
    inner.copy_(x)

    def untouched() -> None:
        assert whole[:_FRAME].isnan().all() and whole[-_FRAME:].isnan().all(), "written beyond the ends"

    return inner, untouched


def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on torch.empty and its like give NaNs (integers: their largest): what a kernel leaves out shows."""

    def poisoning(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*arguments: Any, **named: Any) -> Tensor:
            result = function(*arguments, **named)
            return result.fill_(torch.nan if result.is_floating_point() else torch.iinfo(result.dtype).max)

        return filled

    for owner, names in ((torch, ("empty", "empty_like")), (Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


def opcheck(operation: Any, arguments: Sequence[Any], **named: Any) -> None:
    """The operation keeps what torch.library asks: schema, fake implementation, autograd, compilation."""
    torch.library.opcheck(operation, tuple(arguments), named)
