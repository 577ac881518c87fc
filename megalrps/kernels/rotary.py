"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, equation 34) in the half-rotation layout.

Dimension d of a head is paired with d + R, where R pairs are rotated: R = D/2 in LLaMA, as Hugging Face and Megatron
lay it out; the paper pairs neighbours. The two differ by a fixed permutation of the rows of the query and key
projections. With fewer pairs the dimensions from 2R on pass as they are (GPT-NeoX: Black et al. 2022, arXiv
2204.06745).

The gradient is the gradient that comes in, rotated back: nothing of the size of ``x`` is kept. Bytes for n elements of
e bytes: 2 e n each way.
"""

from typing import Any

import torch
from torch import Tensor

from megalrps.errors import InputError
from megalrps.kernels.compile_case import VECTOR_LOAD, VECTOR_STORE, CompileCase, required_everywhere
from megalrps.kernels.language import next_power_of_2, tl, triton


def rotary_tables(positions_S: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [S, D/2] in fp32, of ``position * base^(-2d/D)`` for d in [0, D/2).

    The angles are formed in fp32 whatever the model's type: released LLaMA weights were trained on these very
    roundings, so a more accurate table would be a different model. For partial rotation ``head_size`` is what of a
    head is rotated.
    """
    exponents = torch.arange(0, head_size, 2, device=positions_S.device, dtype=torch.float32) / head_size
    angles = torch.outer(positions_S.to(torch.float32), 1.0 / base**exponents)
    return angles.cos(), angles.sin()


def rotary(x_BSND: Tensor, cosine_PR: Tensor, sine_PR: Tensor, positions_BS: Tensor | None = None) -> Tensor:
    """Rotate every pair (d, d + R), d < R, of every head by its position's angle; dimensions from 2R on pass.

    Token s of sequence b takes row ``positions_BS[b, s]`` of the tables [None: row s], which must be there. ``x`` may
    be a view with strides, such as heads of a projection's output; the result is contiguous. Computed in fp32 (on a
    CPU in fp64 for fp64) and rounded once, to the type of ``x``. The tables get no gradient.
    """
    output: Tensor = _rotate(x_BSND, cosine_PR, sine_PR, positions_BS, False)
    return output


def rotary_reference(
    x_BSND: Tensor, cosine_PR: Tensor, sine_PR: Tensor, positions_BS: Tensor | None = None, backwards: bool = False
) -> Tensor:
    """The formula of :func:`rotary` in torch operations, differentiable; ``backwards``: by the opposite angles."""
    _check_sizes(x_BSND, cosine_PR, positions_BS)
    wide = x_BSND.to(torch.promote_types(x_BSND.dtype, torch.float32))
    pairs, rest = cosine_PR.shape[1], x_BSND.shape[3] - 2 * cosine_PR.shape[1]
    rows = slice(x_BSND.shape[1]) if positions_BS is None else positions_BS
    # [S, 1, R], or [B, S, 1, R] where each sequence has positions of its own
    cosine, sine = (table[rows].to(wide.dtype).unsqueeze(-2) for table in (cosine_PR, sine_PR))
    # One product with all of x, in the layout of the result, then what the other half of each pair adds.
    output = wide * torch.cat((cosine, cosine, cosine.new_ones(*cosine.shape[:-1], rest)), -1)
    sign = -1 if backwards else 1
    output[..., :pairs].addcmul_(wide[..., pairs : 2 * pairs], sine, value=-sign)
    output[..., pairs : 2 * pairs].addcmul_(wide[..., :pairs], sine, value=sign)
    return output.to(x_BSND.dtype)


def _check_sizes(x_BSND: Tensor, cosine_PR: Tensor, positions_BS: Tensor | None) -> None:
    """InputError where the kernel would read beyond the tables or beyond a head."""
    if 2 * cosine_PR.shape[1] > x_BSND.shape[3]:
        raise InputError(
            f"the tables rotate {cosine_PR.shape[1]} pairs, a head of {x_BSND.shape[3]} has fewer: make them with "
            "rotary_tables(positions, head_size or less, base)"
        )
    if positions_BS is None and cosine_PR.shape[0] < x_BSND.shape[1]:
        raise InputError(
            f"the tables have {cosine_PR.shape[0]} rows for {x_BSND.shape[1]} positions: make longer ones, or say "
            "by positions_BS which row is whose"
        )
    if positions_BS is not None and positions_BS.shape != x_BSND.shape[:2]:
        raise InputError(
            f"positions_BS is {list(positions_BS.shape)}, one row for each token is {list(x_BSND.shape[:2])}"
        )


def rotary_triton(
    x_BSND: Tensor, cosine_PR: Tensor, sine_PR: Tensor, positions_BS: Tensor | None = None, backwards: bool = False
) -> Tensor:
    """:func:`rotary_reference` by the Triton kernel."""
    _check_sizes(x_BSND, cosine_PR, positions_BS)
    if x_BSND.stride(3) != 1:  # a gradient that was broadcast, or a transposed tensor
        x_BSND = x_BSND.contiguous()
    batch, sequence, heads, size = x_BSND.shape
    output = torch.empty(x_BSND.shape, dtype=x_BSND.dtype, device=x_BSND.device)
    tile = _tile(heads, size, cosine_PR.shape[1])
    grid = (triton.cdiv(batch * sequence, tile["TOKENS"]), triton.cdiv(heads, tile["HEADS"]))
    _rotary_kernel[grid](
        x_BSND, cosine_PR.contiguous(), sine_PR.contiguous(),
        None if positions_BS is None else positions_BS.contiguous(), output,
        batch * sequence, sequence, heads, *x_BSND.stride()[:3], -1.0 if backwards else 1.0,
        SIZE=size, PAIRS=cosine_PR.shape[1], **tile, num_warps=4,
    )  # fmt: skip
    return output


def _tile(heads: int, size: int, pairs: int) -> dict[str, int]:
    """Block sizes: up to 16 heads of a token, so that the tables are read once for them, and tokens to 4,096 numbers.

    In bf16 each of the 128 threads then has four loads of 128 bits.
    """
    pair_block, head_block = next_power_of_2(pairs), min(16, next_power_of_2(heads))
    rest_block = next_power_of_2(size - 2 * pairs) if size > 2 * pairs else 0
    return {
        "TOKENS": max(1, 4096 // (head_block * max(2 * pair_block, rest_block))),
        "HEADS": head_block,
        "PAIR_BLOCK": pair_block,
        "REST_BLOCK": rest_block,
    }


@triton.jit
def _rotary_kernel(
    x_pointer,
    cosine_pointer,
    sine_pointer,
    positions_pointer,
    output_pointer,
    tokens,
    sequence,
    heads,
    batch_stride,
    token_stride,
    head_stride,
    sign,
    SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIR_BLOCK)
    of_token, of_head = token < tokens, head < heads
    if positions_pointer is None:
        position = token % sequence
    else:
        position = tl.load(positions_pointer + token, mask=of_token, other=0)
    in_table = of_token[:, None, None] & (pair < PAIRS)[None, None, :]
    table = position.to(tl.int64)[:, None, None] * PAIRS + pair[None, None, :]
    cosine = tl.load(cosine_pointer + table, mask=in_table, other=0.0).to(tl.float32)
    sine = tl.load(sine_pointer + table, mask=in_table, other=0.0).to(tl.float32) * sign

    batch, place = (token // sequence).to(tl.int64), (token % sequence).to(tl.int64)
    head_at = head.to(tl.int64)[None, :] * head_stride
    start = (batch * batch_stride + place * token_stride)[:, None] + head_at
    output_start = (token.to(tl.int64)[:, None] * heads + head[None, :]) * SIZE
    of_pair = (of_token[:, None] & of_head[None, :])[:, :, None] & (pair < PAIRS)[None, None, :]
    first_at = x_pointer + start[:, :, None] + pair[None, None, :]
    first = tl.load(first_at, mask=of_pair, other=0.0).to(tl.float32)
    second = tl.load(first_at + PAIRS, mask=of_pair, other=0.0).to(tl.float32)
    output_at = output_pointer + output_start[:, :, None] + pair[None, None, :]
    kind = output_pointer.dtype.element_ty
    tl.store(output_at, (first * cosine - second * sine).to(kind), mask=of_pair)
    tl.store(output_at + PAIRS, (second * cosine + first * sine).to(kind), mask=of_pair)
    if REST_BLOCK > 0:
        rest = 2 * PAIRS + tl.arange(0, REST_BLOCK)
        of_rest = (of_token[:, None] & of_head[None, :])[:, :, None] & (rest < SIZE)[None, None, :]
        passed = tl.load(x_pointer + start[:, :, None] + rest[None, None, :], mask=of_rest)
        tl.store(output_pointer + output_start[:, :, None] + rest[None, None, :], passed, mask=of_rest)


# Registration: one operation is its own gradient, by the opposite angles.


@torch.library.custom_op("megalrps::rotary", mutates_args=(), device_types="cpu")
def _rotate(x_BSND: Tensor, cosine_PR: Tensor, sine_PR: Tensor, positions_BS: Tensor | None, backwards: bool) -> Tensor:
    return rotary_reference(x_BSND.contiguous(), cosine_PR, sine_PR, positions_BS, backwards)


_rotate.register_kernel("cuda")(rotary_triton)


@_rotate.register_fake
def _(x_BSND: Tensor, cosine_PR: Tensor, sine_PR: Tensor, positions_BS: Tensor | None, backwards: bool) -> Tensor:
    _check_sizes(x_BSND, cosine_PR, positions_BS)
    return x_BSND.new_empty(x_BSND.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cosine_PR, sine_PR, positions_BS, ctx.backwards = inputs
    ctx.save_for_backward(cosine_PR, sine_PR, positions_BS)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _rotate(gradient, *ctx.saved_tensors, not ctx.backwards), None, None, None, None


_rotate.register_autograd(_gradients, setup_context=_keep)


def compile_cases() -> list[CompileCase]:
    """What ``python -m megalrps.kernels --check`` compiles of this file: the presets' heads, and rotated in part."""
    return [
        _case(4, 32, 16, "bf16", None),
        _case(14, 64, 32, "bf16", None),
        _case(16, 128, 64, "bf16", "i32"),
        _case(8, 128, 64, "fp32", None),
        _case(32, 64, 8, "bf16", None),
    ]


def _case(heads: int, size: int, pairs: int, kind: str, positions: str | None) -> CompileCase:
    pointers = {"x": kind, "cosine": "fp32", "sine": "fp32", "output": kind}
    pointers |= {"positions": positions} if positions else {}
    sizes = ("tokens", "sequence", "heads", "batch_stride", "token_stride", "head_stride")
    absent = {} if positions else {"positions_pointer": None}
    return CompileCase(
        name=f"{heads} heads of {size}, {pairs} pairs, {kind}" + (", positions" if positions else ""),
        kernel=_rotary_kernel,
        arguments={f"{each}_pointer": f"*{of}" for each, of in pointers.items()}
        | dict.fromkeys(sizes, "i32")
        | {"sign": "fp32"},
        constants={"SIZE": size, "PAIRS": pairs, **absent, **_tile(heads, size, pairs)},
        divisible=tuple(each for each in sizes if each != "heads"),
        required=required_everywhere(VECTOR_LOAD, VECTOR_STORE),
    )
