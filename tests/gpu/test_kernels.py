"""The kernels on a GPU at shapes drawn anew in every run, against fp64; the same bits every time; packed documents.

The tests of tests/kernels run on a GPU too where there is one: they have the shapes that break things. These have the
sizes of training, which Triton's interpreter cannot reach. A failure prints the seed: MEGALRPS_SEED=... repeats it.
"""

import os
import random
from collections.abc import Callable

import pytest
import torch
from oracle import (
    ATTENTION_BF16,
    DEVICE,
    ELEMENTWISE_FP32,
    GRADIENT_BF16,
    ONE_ROUNDING_BF16,
    SUM_FP32,
    check,
    drawn,
    needs_triton,
    poisoned_empty,
)
from torch import Tensor

from megalrps.kernels.adamw import adamw_, adamw_reference_
from megalrps.kernels.attention import attention, documents_of
from megalrps.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from megalrps.kernels.gelu import gelu
from megalrps.kernels.layer_norm import layer_norm
from megalrps.kernels.norm import sum_of_squares
from megalrps.kernels.rms_norm import add_rms_norm, rms_norm
from megalrps.kernels.rotary import rotary, rotary_tables
from megalrps.kernels.swiglu import swiglu, swiglu_reference

pytestmark = [pytest.mark.gpu, needs_triton]

SEED = int(os.environ.get("MEGALRPS_SEED", random.SystemRandom().randrange(1 << 31)))
DRAWS = 4


@pytest.fixture(params=range(DRAWS))
def rng(request: pytest.FixtureRequest) -> random.Random:
    print(f"MEGALRPS_SEED={SEED}")  # pytest shows it with a failure
    return random.Random(SEED + request.param)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], seed: int) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of the floating-point inputs from a random gradient of the output."""
    leaves = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]
    output = function(*leaves)
    wanted = [each for each in leaves if each.requires_grad]
    gradient = drawn(seed, *output.shape, dtype=output.dtype)
    return output.detach(), list(torch.autograd.grad(output, wanted, gradient))


def compare(
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: list[Tensor],
    bounds: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output and gradients of ``ours`` against ``formula`` in fp64 on the same numbers."""
    wide = [each.double() if each.is_floating_point() else each for each in inputs]
    shape = formula(*wide).shape
    exact_leaves = [each.detach().requires_grad_(each.is_floating_point()) for each in wide]
    exact = formula(*exact_leaves)
    with monkeypatch.context() as patch:
        poisoned_empty(patch)
        output, found = gradients(ours, inputs, seed=7)
    gradient = drawn(7, *shape, dtype=output.dtype).double()
    expected = torch.autograd.grad(exact, [each for each in exact_leaves if each.requires_grad], gradient)
    check(output, exact.detach(), bounds[0])
    for result, reference in zip(found, expected, strict=True):
        check(result, reference, bounds[1])


BOUNDS = {torch.float32: (ELEMENTWISE_FP32, SUM_FP32), torch.bfloat16: (ONE_ROUNDING_BF16, ONE_ROUNDING_BF16)}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_norms(rng: random.Random, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, hidden = rng.randint(1, 5000), rng.randint(1, 8192)
    x, residual = drawn(rng.randrange(1000), rows, hidden, dtype=dtype), drawn(rng.randrange(1000), rows, hidden)
    weight, bias = drawn(1, hidden), drawn(2, hidden)
    torchs = torch.nn.functional
    compare(
        lambda x, weight: rms_norm(x, weight, 1e-5),
        lambda x, weight: torchs.rms_norm(x, (hidden,), weight, 1e-5),
        [x, weight],
        BOUNDS[dtype],
        monkeypatch,
    )
    compare(
        lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5),
        lambda x, weight, bias: torchs.layer_norm(x, (hidden,), weight, bias, 1e-5),
        [x, weight, bias],
        BOUNDS[dtype],
        monkeypatch,
    )
    total, normed = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5, normed.dtype))


@pytest.mark.parametrize("dtype", BOUNDS)
def test_activations_and_rotary(rng: random.Random, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width = rng.randint(1, 3000), rng.randint(1, 6000)
    gate, up = (drawn(rng.randrange(1000), rows, width, dtype=dtype) for _ in range(2))
    compare(swiglu, swiglu_reference, [gate, up], BOUNDS[dtype], monkeypatch)
    compare(gelu, torch.nn.functional.gelu, [gate], BOUNDS[dtype], monkeypatch)
    length, heads, pairs = rng.randint(1, 700), rng.randint(1, 33), rng.choice((8, 16, 32, 48, 64))
    x = drawn(rng.randrange(1000), 2, length, heads, 2 * pairs, dtype=dtype)
    cosine, sine = rotary_tables(torch.arange(length, device=DEVICE), 2 * pairs, 10000.0)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        across, up = cosine.double()[:, None], sine.double()[:, None]
        return torch.cat((first * across - second * up, second * across + first * up), -1)

    compare(lambda x: rotary(x, cosine, sine), turned, [x], BOUNDS[dtype], monkeypatch)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_cross_entropy(rng: random.Random, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary = rng.randint(1, 700), rng.choice((rng.randint(2, 5000), 32000, 128256, 152064))
    logits = drawn(rng.randrange(1000), rows, vocabulary, dtype=dtype, scale=4.0)
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    bounds = (ELEMENTWISE_FP32, BOUNDS[dtype][1])
    compare(cross_entropy, cross_entropy_reference, [logits, labels], bounds, monkeypatch)


def attended(query: Tensor, key: Tensor, value: Tensor, same: Tensor) -> Tensor:
    """The formula, in the inputs' type; ``same`` [B, S, T]: query may see key."""
    group = query.shape[2] // key.shape[2]
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~same[:, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def lengths_of(rng: random.Random, total: int, length: int) -> list[int]:
    """Of documents in windows of ``length``: long, short and empty ones."""
    lengths = []
    for _ in range(total // length):
        left = length
        while left:
            lengths.append(rng.choice((0, 1, min(left, rng.randint(1, length)), min(left, 64))) if left > 1 else left)
            left -= lengths[-1]
    return lengths


@pytest.mark.parametrize("packed", [False, True])
def test_attention(rng: random.Random, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, kv, group = rng.randint(1, 3), rng.randint(30, 1500), rng.randint(1, 3), rng.choice((1, 2, 8))
    head_size, missing = rng.choice((32, 64, 80, 96, 128)), 0 if packed else rng.choice((0, rng.randint(0, length - 1)))
    query = drawn(rng.randrange(1000), batch, length - missing, kv * group, head_size, dtype=torch.bfloat16)
    key, value = (drawn(rng.randrange(1000), batch, length, kv, head_size, dtype=torch.bfloat16) for _ in range(2))
    row, column = torch.arange(length, device=DEVICE)[missing:, None], torch.arange(length, device=DEVICE)
    same = (column <= row).expand(batch, -1, -1)
    documents = None
    if packed:
        lengths = lengths_of(rng, batch * length, length)
        ends = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
        documents = documents_of(ends, batch, length)
        which = (
            torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(batch, length).to(DEVICE)
        )
        same = same & (which[:, :, None] == which[:, None])
    compare(
        lambda *tensors: attention(*tensors, documents=documents, backend="triton"),
        lambda *tensors: attended(*tensors, same),
        [query, key, value],
        (ATTENTION_BF16, GRADIENT_BF16),
        monkeypatch,
    )


def test_packed_documents_equal_documents_one_by_one(rng: random.Random) -> None:
    length, head_size = 1024, rng.choice((64, 128))
    lengths = [each for each in lengths_of(rng, length, length) if each]
    query, key, value = (drawn(seed, 1, length, 4, head_size, dtype=torch.bfloat16) for seed in range(3))
    documents = documents_of(torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE), 1, length)
    packed = attention(query, key, value, documents=documents, backend="triton")
    parts = zip(*(each.split(lengths, dim=1) for each in (query, key, value)), strict=True)
    alone = torch.cat([attention(*part, backend="triton") for part in parts], dim=1)
    check(packed, alone, ATTENTION_BF16)


@pytest.mark.parametrize("operation", ["attention", "rms_norm", "layer_norm", "cross_entropy", "sum_of_squares"])
def test_the_same_bits_every_time(operation: str) -> None:
    x = drawn(0, 3000, 2048, dtype=torch.bfloat16)
    query, key, value = (drawn(seed, 2, 1000, 8, 64, dtype=torch.bfloat16) for seed in range(3))
    weight, labels = drawn(1, 2048), torch.arange(3000, device=DEVICE) % 2048
    runs: dict[str, Callable[[], list[Tensor]]] = {
        "attention": lambda: gradients(lambda *qkv: attention(*qkv, backend="triton"), [query, key, value], 3)[1],
        "rms_norm": lambda: gradients(lambda x, weight: rms_norm(x, weight, 1e-5), [x, weight], 3)[1],
        "layer_norm": lambda: gradients(lambda x, weight: layer_norm(x, weight, weight, 1e-5), [x, weight], 3)[1],
        "cross_entropy": lambda: gradients(cross_entropy, [x, labels], 3)[1],
        "sum_of_squares": lambda: [sum_of_squares(x.float().flatten())],
    }
    first = runs[operation]()
    for _ in range(20):
        for again, before in zip(runs[operation](), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.parametrize("backend", ["triton", "torch", "cuda"])
def test_adamw(rng: random.Random, backend: str) -> None:
    elements, found = rng.randint(1, 3_000_000), torch.zeros((), device=DEVICE)
    settings = {
        "learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "step": 3,
    }  # fmt: skip
    param, grad, first = (drawn(seed, elements) for seed in range(3))
    second, scale, narrow = (
        first.square(),
        torch.tensor(0.7, device=DEVICE),
        torch.empty_like(param, dtype=torch.bfloat16),
    )
    tensors = [param, grad, first, second]
    exact = [each.double() for each in tensors]
    adamw_reference_(*exact, gradient_scale=scale.double(), **settings)
    try:
        adamw_(*tensors, gradient_scale=scale, narrow=narrow, found_inf=found, backend=backend, **settings)
    except (ValueError, RuntimeError) as missing:
        pytest.skip(f"not built here: {missing}")
    for result, reference in zip(tensors, exact, strict=True):
        check(result, reference, ELEMENTWISE_FP32)
    assert torch.equal(narrow, param.to(torch.bfloat16))
    before = [each.clone() for each in (*tensors, narrow)]
    adamw_(*tensors, gradient_scale=scale, narrow=narrow, found_inf=found + 1, backend=backend, **settings)
    assert all(torch.equal(each, kept) for each, kept in zip((*tensors, narrow), before, strict=True))
