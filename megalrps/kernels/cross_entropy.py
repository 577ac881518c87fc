"""Token losses from logits: ``log(sum_v exp(z_v)) - z_label``, with gradient ``softmax(z) - onehot(label)``.

Two operations on a slice of the vocabulary, of which the whole vocabulary is one: forwards a row of logits becomes its
log-sum-exp and the label's logit, backwards it becomes its gradient. Slices that several ranks hold are put together
between the two (:mod:`megalrps.parallel.vocabulary`). Only the logits and the log-sum-exp are kept between the passes;
every sum is in fp32 whatever the logits' type.

Bytes for V logits of e bytes a token: e V forwards (one read), 2 e V backwards (one read, one written, in place where
asked). On a GPU the forward pass keeps a largest logit and a sum for each lane of a row (Milakov and Gimelshein 2018,
arXiv 1805.02867, algorithm 3) and takes one exponential an element: of the two that the update has, one is of 0.
On a CPU both passes go over blocks of rows that stay in its cache: there the first touch of a fresh T x V buffer costs
as much as the arithmetic. Logits that may be overwritten and are as wide as the sums (fp32, fp64) become their
exponentials there as early as in the forward pass, so that each is taken once; the backward pass scales them. Narrower
ones do not: each would be rounded twice (NVIDIA/TransformerEngine#3193).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalrps.kernels.compile_case import VECTOR_LOAD, VECTOR_STORE, CompileCase, required_everywhere
from megalrps.kernels.language import tl, triton

_BLOCK_ELEMENTS = 1 << 20  # 4 MB in fp32: the fastest of 128 KB to 32 MB on a server CPU
_LOWEST = tl.constexpr(-3.4e38)  # finite, so that a lane that has seen nothing differs from a logit by no NaN


def cross_entropy(logits_TV: Tensor, labels_T: Tensor, *, overwrite_logits: bool = False) -> Tensor:
    """The loss of each token in nats, [T] in fp32 (fp64 for fp64 logits); ``labels_T`` holds indices in [0, V).

    With ``overwrite_logits`` the backward pass writes the gradient into the logits' own storage, which halves the
    memory of the largest tensors of a step. On a CPU this call itself overwrites fp32 and fp64 logits if they need a
    gradient: with intermediate values of no use to others. Only for logits nobody reads after the call; autograd
    refuses a second backward pass. Where no gradient is needed nothing is overwritten.
    """
    needs_gradient = torch.is_grad_enabled() and logits_TV.requires_grad
    wide_on_cpu = logits_TV.device.type == "cpu" and logits_TV.dtype == _accumulation_type(logits_TV)
    function = _OverwritingCrossEntropy if overwrite_logits and needs_gradient and wide_on_cpu else _CrossEntropy
    losses_T: Tensor = function.apply(logits_TV, labels_T, overwrite_logits)
    return losses_T


def cross_entropy_reference(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """The formula of :func:`cross_entropy` left to autograd: what the tests compare with."""
    wide = logits_TV.to(_accumulation_type(logits_TV))
    return wide.logsumexp(-1) - wide.gather(-1, labels_T[:, None]).squeeze(-1)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, overwrite_logits: bool) -> Tensor:
        logsumexp_T, label_logit_T = cross_entropy_statistics(logits_TV, labels_T)
        ctx.save_for_backward(logits_TV, labels_T, logsumexp_T)
        ctx.overwrite_logits = overwrite_logits
        return logsumexp_T - label_logit_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, labels_T, logsumexp_T = ctx.saved_tensors
        if ctx.overwrite_logits:
            cross_entropy_gradient_(logits_TV, labels_T, logsumexp_T, gradient_T)
            return logits_TV, None, None
        return cross_entropy_gradient(logits_TV, labels_T, logsumexp_T, gradient_T), None, None


class _OverwritingCrossEntropy(torch.autograd.Function):
    """On a CPU, one exponential for both passes: forwards the logits z of a row with maximum m become exp(z - m)."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, _: bool) -> Tensor:
        label_logit_T = logits_TV.gather(1, labels_T[:, None]).squeeze(1)
        largest_T, sum_T = _exponentials_(logits_TV)
        ctx.save_for_backward(logits_TV, labels_T, sum_T)
        return (sum_T.log() + largest_T).sub_(label_logit_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None, None]:
        exponential_TV, labels_T, sum_T = ctx.saved_tensors
        gradient_TV = exponential_TV.mul_((gradient_T / sum_T).unsqueeze(1))
        return gradient_TV.scatter_add_(1, labels_T[:, None], -gradient_T[:, None]), None, None


def cross_entropy_statistics(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """(log-sum-exp, label's logit) of each row of a slice of the vocabulary: [T] each, fp32 (fp64 for fp64 logits).

    ``labels_T`` count from the slice's first logit. Those outside [0, V) are another slice's: their logit is 0 here.
    Not differentiable by itself.
    """
    logsumexp_T, label_logit_T = _statistics(logits_TV, labels_T)
    return logsumexp_T, label_logit_T


def cross_entropy_gradient(logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, gradient_T: Tensor) -> Tensor:
    """``(exp(z - logsumexp) - [v = label]) * gradient``, [T, V] in the logits' type.

    ``logsumexp_T`` is that of the whole vocabulary, ``gradient_T`` the losses', in its type; labels as in
    :func:`cross_entropy_statistics`.
    """
    gradient_TV: Tensor = _gradient(logits_TV, labels_T, logsumexp_T, gradient_T)
    return gradient_TV


def cross_entropy_gradient_(logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, gradient_T: Tensor) -> None:
    """:func:`cross_entropy_gradient` written over ``logits_TV``."""
    _gradient_(logits_TV, labels_T, logsumexp_T, gradient_T)


# On a CPU.


def row_blocks(logits_TV: Tensor) -> list[slice]:
    """The rows of ``logits_TV`` in runs whose fp32 copies stay in a CPU's cache."""
    tokens, vocabulary = logits_TV.shape
    rows = max(1, _BLOCK_ELEMENTS // vocabulary)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def statistics_reference(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`cross_entropy_statistics` in torch operations."""
    tokens, vocabulary = logits_TV.shape
    local_T = labels_T.clamp(0, vocabulary - 1)
    logsumexp_T = logits_TV.new_empty(tokens, dtype=_accumulation_type(logits_TV))
    for rows in row_blocks(logits_TV):
        logsumexp_T[rows] = logits_TV[rows].to(logsumexp_T.dtype).logsumexp(-1)
    label_logit_T = logits_TV.gather(1, local_T[:, None]).squeeze(1).to(logsumexp_T.dtype)
    return logsumexp_T, label_logit_T.masked_fill_(local_T != labels_T, 0)


def gradient_reference_(
    output_TV: Tensor, logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, gradient_T: Tensor
) -> None:
    """:func:`cross_entropy_gradient` in torch operations, into ``output_TV``, which may be the logits."""
    local_T = labels_T.clamp(0, logits_TV.shape[1] - 1)
    of_label_T = gradient_T.masked_fill(local_T != labels_T, 0).neg_()
    wide = output_TV.dtype == logsumexp_T.dtype
    for rows in row_blocks(logits_TV):
        out = output_TV[rows] if wide else None
        block = torch.sub(logits_TV[rows], logsumexp_T[rows, None], out=out).exp_().mul_(gradient_T[rows, None])
        block.scatter_add_(1, local_T[rows, None], of_label_T[rows, None])
        if not wide:
            output_TV[rows] = block


def exponentials_reference_(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite each row's z by exp(z - largest); the largest of each row and the row sums of what it became, [T]."""
    largest_T = logits_TV.new_empty(logits_TV.shape[0])
    sum_T = torch.empty_like(largest_T)
    for rows in row_blocks(logits_TV):
        block = logits_TV[rows]
        torch.amax(block, 1, out=largest_T[rows])
        torch.sum(block.sub_(largest_T[rows, None]).exp_(), 1, out=sum_T[rows])
    return largest_T, sum_T


def _accumulation_type(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


# On a GPU.


def statistics_triton(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`cross_entropy_statistics` by the Triton kernel."""
    logits_TV = _unit_stride(logits_TV)
    tokens, vocabulary = logits_TV.shape
    logsumexp_T = torch.empty(tokens, dtype=torch.float32, device=logits_TV.device)
    label_logit_T = torch.empty_like(logsumexp_T)
    block = _block_size(vocabulary)
    _statistics_kernel[(tokens,)](
        logits_TV,
        labels_T.contiguous(),
        logsumexp_T,
        label_logit_T,
        vocabulary,
        logits_TV.stride(0),
        BLOCK=block,
        num_warps=_warps(block),
    )
    return logsumexp_T, label_logit_T


def gradient_triton(logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, gradient_T: Tensor) -> Tensor:
    """:func:`cross_entropy_gradient` by the Triton kernel."""
    output_TV = torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
    _launch_gradient(output_TV, _unit_stride(logits_TV), labels_T, logsumexp_T, gradient_T)
    return output_TV


def gradient_triton_(logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, gradient_T: Tensor) -> None:
    """:func:`cross_entropy_gradient_` by the Triton kernel."""
    if logits_TV.stride(1) == 1:
        _launch_gradient(logits_TV, logits_TV, labels_T, logsumexp_T, gradient_T)
    else:
        logits_TV.copy_(gradient_triton(logits_TV, labels_T, logsumexp_T, gradient_T))


def _launch_gradient(
    output_TV: Tensor, logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, gradient_T: Tensor
) -> None:
    tokens, vocabulary = logits_TV.shape
    block = _block_size(vocabulary)
    _gradient_kernel[(tokens * triton.cdiv(vocabulary, block),)](
        logits_TV,
        output_TV,
        labels_T.contiguous(),
        logsumexp_T.contiguous(),
        gradient_T.contiguous(),
        vocabulary,
        logits_TV.stride(0),
        output_TV.stride(0),
        BLOCK=block,
        num_warps=_warps(block),
    )


def _unit_stride(logits_TV: Tensor) -> Tensor:
    return logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()


def _block_size(vocabulary: int) -> int:
    """Logits of a row that a program takes at a time."""
    return 4096 if vocabulary > 2048 else 2048


def _warps(block: int) -> int:
    """16 logits a thread: two 128-bit accesses in bf16, four in fp32."""
    return block // (16 * 32)


@triton.jit
def _statistics_kernel(
    logits_pointer,
    labels_pointer,
    logsumexp_pointer,
    label_logit_pointer,
    vocabulary,
    row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_pointer = logits_pointer + row * row_stride
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + lanes
        logits = tl.load(row_pointer + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
        ahead = logits - largest
        smaller = tl.exp(-tl.abs(ahead))
        total = tl.where(ahead > 0, total * smaller + 1, total + smaller)
        largest = tl.maximum(largest, logits)
    of_row = tl.max(largest, 0)
    tl.store(logsumexp_pointer + row, of_row + tl.log(tl.sum(total * tl.exp(largest - of_row), 0)))
    label = tl.load(labels_pointer + row)
    own = (label >= 0) & (label < vocabulary)
    tl.store(label_logit_pointer + row, tl.load(row_pointer + label, mask=own, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(
    logits_pointer,
    output_pointer,
    labels_pointer,
    logsumexp_pointer,
    gradient_pointer,
    vocabulary,
    logits_stride,
    output_stride,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(vocabulary, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocabulary
    logits = tl.load(logits_pointer + row * logits_stride + at, mask=inside).to(tl.float32)
    label = tl.load(labels_pointer + row)
    probability = tl.exp(logits - tl.load(logsumexp_pointer + row))
    scaled = tl.where(at == label, probability - 1, probability) * tl.load(gradient_pointer + row)
    output_pointers = output_pointer + row * output_stride + at
    tl.store(output_pointers, scaled.to(output_pointer.dtype.element_ty), mask=inside)


# Registration: what overwrites is an operation of its own, as none may give what it was given.


@torch.library.custom_op("megalrps::cross_entropy_statistics", mutates_args=(), device_types="cpu")
def _statistics(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    return statistics_reference(logits_TV, labels_T)


@torch.library.custom_op("megalrps::cross_entropy_gradient", mutates_args=(), device_types="cpu")
def _gradient(logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, gradient_T: Tensor) -> Tensor:
    output_TV = torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
    gradient_reference_(output_TV, logits_TV, labels_T, logsumexp_T, gradient_T)
    return output_TV


@torch.library.custom_op("megalrps::cross_entropy_gradient_", mutates_args=("logits_TV",), device_types="cpu")
def _gradient_(logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, gradient_T: Tensor) -> None:
    gradient_reference_(logits_TV, logits_TV, labels_T, logsumexp_T, gradient_T)


@torch.library.custom_op("megalrps::cross_entropy_exponentials_", mutates_args=("logits_TV",), device_types="cpu")
def _exponentials_(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    return exponentials_reference_(logits_TV)


_statistics.register_kernel("cuda")(statistics_triton)
_gradient.register_kernel("cuda")(gradient_triton)
_gradient_.register_kernel("cuda")(gradient_triton_)


@_statistics.register_fake
def _(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    logsumexp_T = logits_TV.new_empty(logits_TV.shape[0], dtype=_accumulation_type(logits_TV))
    return logsumexp_T, torch.empty_like(logsumexp_T)


@_gradient.register_fake
def _(logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, gradient_T: Tensor) -> Tensor:
    return torch.empty_like(logits_TV, memory_format=torch.contiguous_format)


@_gradient_.register_fake
def _(logits_TV: Tensor, labels_T: Tensor, logsumexp_T: Tensor, gradient_T: Tensor) -> None:
    return None


@_exponentials_.register_fake
def _(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    largest_T = logits_TV.new_empty(logits_TV.shape[0])
    return largest_T, torch.empty_like(largest_T)


def compile_cases() -> list[CompileCase]:
    """What ``python -m megalrps.kernels --check`` compiles of this file: rows of many blocks, rows of up to 2,048."""
    per_row = {"labels_pointer": "*i64", "logsumexp_pointer": "*fp32"}
    kernels = {
        "statistics": (_statistics_kernel, ("logits",), {"label_logit_pointer": "*fp32"}, ("row_stride",)),
        "gradient": (
            _gradient_kernel,
            ("logits", "output"),
            {"gradient_pointer": "*fp32"},
            ("logits_stride", "output_stride"),
        ),
    }
    return [
        CompileCase(
            name=f"{name}, {kind}, blocks of {block}",
            kernel=kernel,
            arguments={f"{each}_pointer": f"*{kind}" for each in matrices}
            | per_row
            | vector
            | dict.fromkeys(("vocabulary", *strides), "i32"),
            constants={"BLOCK": block},
            num_warps=_warps(block),
            divisible=("vocabulary", *strides),
            required=required_everywhere(VECTOR_LOAD, *((VECTOR_STORE,) if name == "gradient" else ())),
        )
        for name, (kernel, matrices, vector, strides) in kernels.items()
        for kind in ("bf16", "fp32")
        for block in (4096, 2048)
    ]
