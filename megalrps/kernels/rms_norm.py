"""Root-mean-square layer normalisation (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4), also of a sum.

Between the passes the normed rows as they came in (of a sum: the sum), the weight and one number a row are kept. Bytes
for n elements of e bytes: 2 e n forwards, 3 e n backwards. With a residual stream in fp32 and an addend and a result in
bf16, n elements move 12 n bytes forwards (two read, two written) and 16 n backwards (three read, two written).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalrps.kernels.compile_case import VECTOR_LOAD, VECTOR_STORE, CompileCase, required_everywhere
from megalrps.kernels.language import next_power_of_2, rows_of, tl, triton


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last dimension; ``x`` and the result are [..., H].

    The statistics and the product are computed in fp32 (on a CPU in fp64 for fp64) and rounded once, to ``out_dtype``
    [None: the type of ``x``].
    """
    normed: Tensor = _forward(x, weight_H, epsilon, out_dtype)[0]
    return normed


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_H: Tensor, epsilon: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``residual + x``, and its :func:`rms_norm`; all four are [..., H].

    The sum is rounded to the type of ``residual``, the wider one, and normed as rounded: the second result equals
    ``rms_norm(sum, weight_H, epsilon, out_dtype)``. ``out_dtype``: of the second result [None: that of ``residual``].
    """
    total, normed, _ = _add_forward(x, residual, weight_H, epsilon, out_dtype)
    return total, normed


def rms_norm_reference(
    x: Tensor, weight_H: Tensor, epsilon: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The formula of :func:`rms_norm` in torch operations, differentiable; and ``1 / sqrt(...)``, [...], unrounded."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # One pass over x without a temporary of its size; squaring the root costs less than a rounding of fp32.
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
    inverse_root = torch.rsqrt(mean_square + epsilon)
    return (wide * inverse_root).mul_(weight_H).to(out_dtype or x.dtype), inverse_root.squeeze(-1)


def rms_norm_backward_reference(
    gradient: Tensor, x: Tensor, weight_H: Tensor, inverse_root: Tensor, gradient_of_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` (plus ``gradient_of_sum``, where ``x`` is a sum that is used besides) and of the weight.

    With r the inverse root and g the gradient: r (g w) - x r^3 mean(g w x), and the sum over the rows of g x r.
    """
    wide_type = torch.promote_types(x.dtype, torch.float32)
    g_TH, x_TH, w_H = (rows_of(each).to(wide_type) for each in (gradient, x, weight_H))
    root_T1 = inverse_root.reshape(-1, 1)
    product_TH = g_TH * x_TH
    of_weight_H = product_TH.T @ root_T1.squeeze(1)
    coefficient_T1 = (product_TH @ w_H[0]).unsqueeze(1) * root_T1**3 / -x.shape[-1]
    of_x_TH = torch.mul(g_TH, w_H, out=product_TH).mul_(root_T1).addcmul_(x_TH, coefficient_T1)
    if gradient_of_sum is not None:
        of_x_TH += rows_of(gradient_of_sum)
    return of_x_TH.view(x.shape).to(x.dtype), of_weight_H.to(weight_H.dtype)


class RowTile(NamedTuple):
    """What one program of a kernel over rows holds: ``rows`` rows of ``columns`` columns, by ``num_warps`` warps."""

    rows: int
    columns: int
    num_warps: int


def row_tile(hidden: int) -> RowTile:
    """The tile for rows of ``hidden`` numbers, whole rows always, so that each is read once.

    Sixteen numbers a thread, two loads of 128 bits in bf16; narrow rows share a program. From 16,384 on, where there is
    no larger block of threads, a thread holds more, and the backward kernels spill.
    """
    columns = next_power_of_2(hidden)
    rows = max(1, 2048 // columns)
    return RowTile(rows, columns, min(16, rows * columns // 512))


def persistent_programs(tile: RowTile, rows: int, device: torch.device) -> int:
    """How many programs share the rows: those that ``device`` runs at a time, each with one partial sum at the end.

    The order of the sums depends on the number, so it is the same on each run on one device. Without a device (in
    Triton's interpreter) it is a small one, so that a program goes through several tiles in a test.
    """
    if device.type != "cuda":
        return min(3, triton.cdiv(rows, tile.rows))
    # A thread of these kernels needs up to 128 registers, so 16 warps are what a multiprocessor holds.
    at_a_time = torch.cuda.get_device_properties(device).multi_processor_count * (16 // tile.num_warps)
    return min(at_a_time, triton.cdiv(rows, tile.rows))


def rms_norm_triton(
    x: Tensor, weight_H: Tensor, epsilon: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm_reference` by the Triton kernel."""
    x_TH = rows_of(x)
    normed = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    return normed, _launch_forward(x_TH, None, None, weight_H, normed, epsilon).view(x.shape[:-1])


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight_H: Tensor, epsilon: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, the normed sum and the inverse roots of :func:`add_rms_norm` by the Triton kernel."""
    total = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    normed = torch.empty(residual.shape, dtype=out_dtype or residual.dtype, device=x.device)
    root = _launch_forward(rows_of(residual), rows_of(x), total, weight_H, normed, epsilon)
    return total, normed, root.view(x.shape[:-1])


def _launch_forward(
    x_TH: Tensor, addend_TH: Tensor | None, total: Tensor | None, weight_H: Tensor, normed: Tensor, epsilon: float
) -> Tensor:
    rows, hidden = x_TH.shape
    tile = row_tile(hidden)
    root_T = torch.empty(rows, dtype=torch.float32, device=x_TH.device)
    _rms_norm_kernel[(triton.cdiv(rows, tile.rows),)](
        x_TH, addend_TH, total, weight_H.contiguous(), normed, root_T, rows, epsilon,
        HIDDEN=hidden, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps,
    )  # fmt: skip
    return root_T


def rms_norm_backward_triton(
    gradient: Tensor, x: Tensor, weight_H: Tensor, inverse_root: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm_backward_reference` by the Triton kernel."""
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return of_x, _launch_backward(gradient, None, x, weight_H, inverse_root, of_x, None)


def add_rms_norm_backward_triton(
    gradient: Tensor, gradient_of_sum: Tensor, total: Tensor, weight_H: Tensor, inverse_root: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``residual``, ``x`` (in its type ``dtype``; empty where that is the residual's) and weight."""
    of_residual = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    of_x = torch.empty(total.shape if dtype != total.dtype else (0,), dtype=dtype, device=total.device)
    other = of_x if dtype != total.dtype else None
    return (
        of_residual,
        of_x,
        _launch_backward(gradient, gradient_of_sum, total, weight_H, inverse_root, of_residual, other),
    )


def _launch_backward(
    gradient: Tensor,
    gradient_of_sum: Tensor | None,
    x: Tensor,
    weight_H: Tensor,
    inverse_root: Tensor,
    of_x: Tensor,
    of_addend: Tensor | None,
) -> Tensor:
    """Fill ``of_x`` and ``of_addend``; the gradient of the weight is returned."""
    x_TH = rows_of(x)
    rows, hidden = x_TH.shape
    tile = row_tile(hidden)
    programs = persistent_programs(tile, rows, x.device)
    partial_PH = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    _rms_norm_backward_kernel[(programs,)](
        rows_of(gradient), None if gradient_of_sum is None else rows_of(gradient_of_sum), x_TH, weight_H.contiguous(),
        inverse_root.contiguous(), of_x, of_addend, partial_PH, rows,
        HIDDEN=hidden, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.num_warps,
    )  # fmt: skip
    return partial_PH.sum(0).to(weight_H.dtype)


@triton.jit
def _rms_norm_kernel(
    x_pointer,
    addend_pointer,
    total_pointer,
    weight_pointer,
    normed_pointer,
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
    inside = (row < rows)[:, None] & (column < HIDDEN)[None, :]
    weight = tl.load(weight_pointer + column[None, :], mask=(column < HIDDEN)[None, :], other=0.0).to(tl.float32)
    x = tl.load(x_pointer + at, mask=inside, other=0.0).to(tl.float32)
    if addend_pointer is not None:
        x += tl.load(addend_pointer + at, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_pointer.dtype.element_ty)
        tl.store(total_pointer + at, total, mask=inside)
        x = total.to(tl.float32)
    root = tl.rsqrt(tl.sum(x * x, 1) / HIDDEN + epsilon)
    tl.store(root_pointer + row, root, mask=row < rows)
    normed = x * root[:, None] * weight
    tl.store(normed_pointer + at, normed.to(normed_pointer.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    gradient_pointer,
    of_total_pointer,
    x_pointer,
    weight_pointer,
    root_pointer,
    of_x_pointer,
    of_addend_pointer,
    partial_pointer,
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
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * HIDDEN + column[None, :]
    inside = (row < rows)[:, None] & in_row
    # The next tile is read before this one is worked on, in the narrow type: memory is never idle.
    next_x = tl.load(x_pointer + at, mask=inside, other=0.0)
    next_gradient = tl.load(gradient_pointer + at, mask=inside, other=0.0)
    for _ in range(program * ROWS, rows, programs * ROWS):
        x, gradient = next_x.to(tl.float32), next_gradient.to(tl.float32)
        here, in_here = at, inside
        root = tl.load(root_pointer + row, mask=row < rows, other=0.0)[:, None]
        row += programs * ROWS
        at = row[:, None] * HIDDEN + column[None, :]
        inside = (row < rows)[:, None] & in_row
        next_x = tl.load(x_pointer + at, mask=inside, other=0.0)
        next_gradient = tl.load(gradient_pointer + at, mask=inside, other=0.0)
        normed = x * root
        of_weight += gradient * normed
        of_normed = gradient * weight
        of_x = (of_normed - normed * (tl.sum(of_normed * normed, 1) / HIDDEN)[:, None]) * root
        if of_total_pointer is not None:
            of_x += tl.load(of_total_pointer + here, mask=in_here, other=0.0).to(tl.float32)
        tl.store(of_x_pointer + here, of_x.to(of_x_pointer.dtype.element_ty), mask=in_here)
        if of_addend_pointer is not None:
            tl.store(of_addend_pointer + here, of_x.to(of_addend_pointer.dtype.element_ty), mask=in_here)
    partial = tl.sum(of_weight, 0)
    tl.store(partial_pointer + program.to(tl.int64) * HIDDEN + column, partial, mask=column < HIDDEN)


# Registration. The inverse roots are results of the operations, because the backward pass needs them; nobody else sees
# them, and they have no gradient.


@torch.library.custom_op("megalrps::rms_norm", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, weight_H: Tensor, epsilon: float, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return rms_norm_reference(x.contiguous(), weight_H, epsilon, out_dtype)


@torch.library.custom_op("megalrps::rms_norm_backward", mutates_args=(), device_types="cpu")
def _backward(gradient: Tensor, x: Tensor, weight_H: Tensor, inverse_root: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm_backward_reference(gradient, x, weight_H, inverse_root)


@torch.library.custom_op("megalrps::add_rms_norm", mutates_args=(), device_types="cpu")
def _add_forward(
    x: Tensor, residual: Tensor, weight_H: Tensor, epsilon: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    total = (residual + x).to(residual.dtype).contiguous()
    return total, *rms_norm_reference(total, weight_H, epsilon, out_dtype)


@torch.library.custom_op("megalrps::add_rms_norm_backward", mutates_args=(), device_types="cpu")
def _add_backward(
    gradient: Tensor, gradient_of_sum: Tensor, total: Tensor, weight_H: Tensor, inverse_root: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    of_residual, of_weight_H = rms_norm_backward_reference(gradient, total, weight_H, inverse_root, gradient_of_sum)
    return of_residual, of_residual.to(dtype) if dtype != total.dtype else total.new_empty(0), of_weight_H


_forward.register_kernel("cuda")(rms_norm_triton)
_backward.register_kernel("cuda")(rms_norm_backward_triton)
_add_forward.register_kernel("cuda")(add_rms_norm_triton)
_add_backward.register_kernel("cuda")(add_rms_norm_backward_triton)


@_forward.register_fake
def _(x: Tensor, weight_H: Tensor, epsilon: float, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    root = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype), root


@_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight_H: Tensor, inverse_root: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight_H.new_empty(weight_H.shape)


@_add_forward.register_fake
def _(
    x: Tensor, residual: Tensor, weight_H: Tensor, epsilon: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    root = x.new_empty(x.shape[:-1], dtype=torch.promote_types(residual.dtype, torch.float32))
    normed = residual.new_empty(residual.shape, dtype=out_dtype or residual.dtype)
    return residual.new_empty(residual.shape), normed, root


@_add_backward.register_fake
def _(
    gradient: Tensor, gradient_of_sum: Tensor, total: Tensor, weight_H: Tensor, inverse_root: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    of_x = total.new_empty(total.shape if dtype != total.dtype else (0,), dtype=dtype)
    return total.new_empty(total.shape), of_x, weight_H.new_empty(weight_H.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None, None]:
    if gradient is None:
        return None, None, None, None
    return *_backward(gradient, *ctx.saved_tensors), None, None


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    total, _, inverse_root = output
    ctx.save_for_backward(total, inputs[2], inverse_root)
    ctx.addend_dtype = inputs[0].dtype
    ctx.mark_non_differentiable(inverse_root)
    ctx.set_materialize_grads(False)


def _gradients_of_sum(
    ctx: Any, of_sum: Tensor | None, of_normed: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    """Either result may be unused, and has no gradient then: the last sum of a network is normed and no more."""
    of_weight_H = None
    if of_normed is None:
        of_residual, of_x = of_sum, None
    elif of_sum is None:
        of_residual, of_weight_H = _backward(of_normed, *ctx.saved_tensors)
        of_x = None
    else:
        of_residual, of_x, of_weight_H = _add_backward(of_normed, of_sum, *ctx.saved_tensors, ctx.addend_dtype)
    if of_residual is not None and (of_x is None or not of_x.numel()):
        of_x = of_residual.to(ctx.addend_dtype)
    return of_x, of_residual, of_weight_H, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
_add_forward.register_autograd(_gradients_of_sum, setup_context=_keep_sum)


def compile_cases() -> list[CompileCase]:
    """What ``python -m megalrps.kernels --check`` compiles of this file: a whole block, several rows, a masked row."""
    return [
        *(_case("rms_norm", hidden, kind, None, kind) for hidden, kind in ((2048, "bf16"), (896, "fp32"))),
        _case("add_rms_norm", 2560, "fp32", "bf16", "bf16"),
        *(_backward_case("rms_norm", hidden, kind, None, kind) for hidden, kind in ((2048, "bf16"), (128, "fp32"))),
        *(_backward_case("add_rms_norm", hidden, "fp32", "bf16", "bf16") for hidden in (2560, 8192)),
    ]


def _case(name: str, hidden: int, x: str, addend: str | None, normed: str) -> CompileCase:
    kinds = {"x": x, "addend": addend, "total": addend and x, "weight": "fp32", "normed": normed, "root": "fp32"}
    return row_kernel_case(
        _rms_norm_kernel, f"{name}, {hidden}, {x}", hidden, kinds, {"rows": "i32", "epsilon": "fp32"}
    )


def _backward_case(name: str, hidden: int, x: str, addend: str | None, normed: str) -> CompileCase:
    kinds = {"gradient": normed, "of_total": addend and x, "x": x, "weight": "fp32", "root": "fp32", "of_x": x}
    kinds |= {"of_addend": addend, "partial": "fp32"}
    return row_kernel_case(_rms_norm_backward_kernel, f"{name} backward, {hidden}, {x}", hidden, kinds, {"rows": "i32"})


def row_kernel_case(
    kernel: Any, name: str, hidden: int, kinds: Mapping[str, str | None], scalars: dict[str, str]
) -> CompileCase:
    """``kinds``: of what type each pointer's numbers are; None: the pointer is not there."""
    tile = row_tile(hidden)
    absent = {f"{pointer}_pointer": None for pointer, kind in kinds.items() if kind is None}
    return CompileCase(
        name=name,
        kernel=kernel,
        arguments={f"{pointer}_pointer": f"*{kind}" for pointer, kind in kinds.items() if kind is not None} | scalars,
        constants={**absent, "HIDDEN": hidden, "ROWS": tile.rows, "COLUMNS": tile.columns},
        num_warps=tile.num_warps,
        divisible=("rows",),
        required=required_everywhere(VECTOR_LOAD, VECTOR_STORE),
    )
