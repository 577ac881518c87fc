"""Layer normalisation (Ba, Kiros and Hinton 2016, arXiv 1607.06450, equations 3 and 4), with or without a bias.

Between the passes the rows as they came in, the weight and two numbers a row are kept: their mean and the inverse of
their deviation. Bytes for n elements of e bytes: 2 e n forwards, 3 e n backwards.
"""

from typing import Any

import torch
from torch import Tensor

from megalrps.kernels.compile_case import CompileCase
from megalrps.kernels.language import rows_of, tl, triton
from megalrps.kernels.rms_norm import persistent_programs, row_kernel_case, row_tile


def layer_norm(
    x: Tensor, weight_H: Tensor, bias_H: Tensor | None, epsilon: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``(x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias`` over the last dimension; [..., H] both ways.

    The variance is the mean square of what is left when the mean is taken off (n, not n - 1). Computed in fp32 (on a
    CPU in fp64 for fp64) and rounded once, to ``out_dtype`` [None: the type of ``x``]. ``bias_H`` None: no bias.
    """
    normed: Tensor = _forward(x, weight_H, bias_H, epsilon, out_dtype)[0]
    return normed


def layer_norm_reference(
    x: Tensor, weight_H: Tensor, bias_H: Tensor | None, epsilon: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`layer_norm` by torch's operation, differentiable; means and inverse deviations, both [...], unrounded."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = weight_H.to(wide.dtype), None if bias_H is None else bias_H.to(wide.dtype)
    normed, mean, inverse = torch.native_layer_norm(wide, weight.shape, weight, bias, epsilon)
    return normed.to(out_dtype or x.dtype), mean.squeeze(-1), inverse.squeeze(-1)


def layer_norm_backward_reference(
    gradient: Tensor, x: Tensor, weight_H: Tensor, mean: Tensor, inverse_root: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``x``, of the weight and of the bias.

    With n the normed x, r the inverse deviation and g the gradient: r (g w - mean(g w) - n mean(g w n)); the sums over
    the rows of g n and of g.
    """
    wide_type = torch.promote_types(x.dtype, torch.float32)
    weight = weight_H.to(wide_type)  # a bias changes no gradient: the weight stands for it
    of_x, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
        gradient.to(wide_type).contiguous(), x.to(wide_type).contiguous(), weight.shape,
        mean.unsqueeze(-1), inverse_root.unsqueeze(-1), weight, weight, (True, True, True),
    )  # fmt: skip
    return of_x.to(x.dtype), of_weight.to(weight_H.dtype), of_bias.to(weight_H.dtype)


def layer_norm_triton(
    x: Tensor, weight_H: Tensor, bias_H: Tensor | None, epsilon: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`layer_norm_reference` by the Triton kernel."""
    x_TH = rows_of(x)
    rows, hidden = x_TH.shape
    tile = row_tile(hidden)
    normed = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    mean, inverse_root = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    _layer_norm_kernel[(triton.cdiv(rows, tile.rows),)](
        x_TH, weight_H.contiguous(), None if bias_H is None else bias_H.contiguous(), normed, mean, inverse_root,
        rows, epsilon, HIDDEN=hidden, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps,
    )  # fmt: skip
    return normed, mean, inverse_root


def layer_norm_backward_triton(
    gradient: Tensor, x: Tensor, weight_H: Tensor, mean: Tensor, inverse_root: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`layer_norm_backward_reference` by the Triton kernel."""
    x_TH = rows_of(x)
    rows, hidden = x_TH.shape
    tile = row_tile(hidden)
    programs = persistent_programs(tile, rows, x.device)
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial_2PH = torch.empty(2, programs, hidden, dtype=torch.float32, device=x.device)
    _layer_norm_backward_kernel[(programs,)](
        rows_of(gradient), x_TH, weight_H.contiguous(), mean.contiguous(), inverse_root.contiguous(), of_x,
        *partial_2PH.unbind(), rows, HIDDEN=hidden, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps,
    )  # fmt: skip
    of_weight_H, of_bias_H = partial_2PH.sum(1).to(weight_H.dtype).unbind()
    # The rows of one tensor: an operation's results must not share their memory.
    return of_x, of_weight_H.clone(), of_bias_H.clone()


@triton.jit
def _layer_norm_kernel(
    x_pointer,
    weight_pointer,
    bias_pointer,
    normed_pointer,
    mean_pointer,
    root_pointer,
    rows,
    epsilon,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * HIDDEN + column[None, :]
    in_row = (column < HIDDEN)[None, :]
    inside = (row < rows)[:, None] & in_row
    weight = tl.load(weight_pointer + column[None, :], mask=in_row, other=0.0).to(tl.float32)
    x = tl.load(x_pointer + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / HIDDEN
    centred = tl.where(in_row, x - mean[:, None], 0.0)
    root = tl.rsqrt(tl.sum(centred * centred, 1) / HIDDEN + epsilon)
    tl.store(mean_pointer + row, mean, mask=row < rows)
    tl.store(root_pointer + row, root, mask=row < rows)
    normed = centred * root[:, None] * weight
    if bias_pointer is not None:
        normed += tl.load(bias_pointer + column[None, :], mask=in_row, other=0.0).to(tl.float32)
    tl.store(normed_pointer + at, normed.to(normed_pointer.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_backward_kernel(
    gradient_pointer,
    x_pointer,
    weight_pointer,
    mean_pointer,
    root_pointer,
    of_x_pointer,
    of_weight_pointer,
    of_bias_pointer,
    rows,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, COLUMNS)
    in_row = (column < HIDDEN)[None, :]
    weight = tl.load(weight_pointer + column[None, :], mask=in_row, other=0.0).to(tl.float32)
    of_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * HIDDEN + column[None, :]
    inside = (row < rows)[:, None] & in_row
    # The next tile is read before this one is worked on, as in the kernel of RMSNorm.
    next_x = tl.load(x_pointer + at, mask=inside, other=0.0)
    next_gradient = tl.load(gradient_pointer + at, mask=inside, other=0.0)
    for _ in range(program * ROWS, rows, programs * ROWS):
        x, gradient = next_x.to(tl.float32), next_gradient.to(tl.float32)
        here, in_here = at, inside
        mean = tl.load(mean_pointer + row, mask=row < rows, other=0.0)[:, None]
        root = tl.load(root_pointer + row, mask=row < rows, other=0.0)[:, None]
        row += programs * ROWS
        at = row[:, None] * HIDDEN + column[None, :]
        inside = (row < rows)[:, None] & in_row
        next_x = tl.load(x_pointer + at, mask=inside, other=0.0)
        next_gradient = tl.load(gradient_pointer + at, mask=inside, other=0.0)
        normed = (x - mean) * root
        of_weight += gradient * normed
        of_bias += gradient
        of_normed = gradient * weight  # 0 beyond the row, where normed is not
        mean_of_normed = (tl.sum(of_normed, 1) / HIDDEN)[:, None]
        mean_of_product = (tl.sum(of_normed * normed, 1) / HIDDEN)[:, None]
        of_x = (of_normed - mean_of_normed - normed * mean_of_product) * root
        tl.store(of_x_pointer + here, of_x.to(of_x_pointer.dtype.element_ty), mask=in_here)
    partial_at = program.to(tl.int64) * HIDDEN + column
    tl.store(of_weight_pointer + partial_at, tl.sum(of_weight, 0), mask=column < HIDDEN)
    tl.store(of_bias_pointer + partial_at, tl.sum(of_bias, 0), mask=column < HIDDEN)


# Registration. The statistics are results because the backward pass needs them; they have no gradient.


@torch.library.custom_op("megalrps::layer_norm", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor, weight_H: Tensor, bias_H: Tensor | None, epsilon: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return layer_norm_reference(x.contiguous(), weight_H, bias_H, epsilon, out_dtype)


@torch.library.custom_op("megalrps::layer_norm_backward", mutates_args=(), device_types="cpu")
def _backward(
    gradient: Tensor, x: Tensor, weight_H: Tensor, mean: Tensor, inverse_root: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return layer_norm_backward_reference(gradient, x, weight_H, mean, inverse_root)


_forward.register_kernel("cuda")(layer_norm_triton)
_backward.register_kernel("cuda")(layer_norm_backward_triton)


@_forward.register_fake
def _(
    x: Tensor, weight_H: Tensor, bias_H: Tensor | None, epsilon: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    mean, root = (x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype), mean, root


@_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, weight_H: Tensor, mean: Tensor, inverse_root: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight_H.new_empty(weight_H.shape), weight_H.new_empty(weight_H.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight_H, bias_H, _, _ = inputs
    ctx.save_for_backward(x, weight_H, *output[1:])
    ctx.bias_dtype = None if bias_H is None else bias_H.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, gradient: Tensor | None, *_: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    if gradient is None:
        return None, None, None, None, None
    of_x, of_weight_H, of_bias_H = _backward(gradient, *ctx.saved_tensors)
    return of_x, of_weight_H, None if ctx.bias_dtype is None else of_bias_H.to(ctx.bias_dtype), None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def compile_cases() -> list[CompileCase]:
    """What ``python -m megalrps.kernels --check`` compiles of this file: with a bias and without, masked and whole."""
    common = {"x": "bf16", "weight": "fp32"}
    forwards = {**common, "normed": "bf16", "mean": "fp32", "root": "fp32"}
    backwards = {"gradient": "bf16", **common, "mean": "fp32", "root": "fp32", "of_x": "bf16"}
    backwards |= {"of_weight": "fp32", "of_bias": "fp32"}
    scalars = {"rows": "i32", "epsilon": "fp32"}
    return [
        row_kernel_case(_layer_norm_kernel, "2048, bias", 2048, {**forwards, "bias": "fp32"}, scalars),
        row_kernel_case(_layer_norm_kernel, "2560", 2560, {**forwards, "bias": None}, scalars),
        *(
            row_kernel_case(_layer_norm_backward_kernel, f"backward, {hidden}", hidden, backwards, {"rows": "i32"})
            for hidden in (512, 2560)
        ),
    ]
