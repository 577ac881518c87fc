"""What benchmarks/gpu/kernels.py times: every operation at a training step's shapes, with its peers and its floor.

A case's contenders compute the same thing from the same tensors, each as its users call it; the backward pass is timed
through autograd for all alike. A peer that is not installed, or refuses, is reported with what it said.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalrps.kernels.adamw import adamw_
from megalrps.kernels.cross_entropy import cross_entropy
from megalrps.kernels.gelu import gelu
from megalrps.kernels.layer_norm import layer_norm
from megalrps.kernels.norm import sum_of_squares
from megalrps.kernels.options import OptimizerBackend
from megalrps.kernels.rms_norm import add_rms_norm, rms_norm
from megalrps.kernels.rotary import rotary, rotary_tables
from megalrps.kernels.swiglu import swiglu
from megalrps.kernels.weight_gradient import accumulate_
from megalrps.parallel.linear_loss import linear_cross_entropy

Function = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """Of one case each; the defaults fill an H200, :data:`SMOKE` shows on a CPU that every case runs."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 16384
    hidden: int = 2048
    feed_forward: int = 5504
    vocabulary: int = 32000
    heads: int = 16
    head_size: int = 128
    sequence: int = 8192
    parameters: int = 200_000_000
    compiled: bool = True
    """Whether torch.compile is a peer."""


SMOKE = Sizes(
    device="cpu",
    dtype=torch.float32,
    tokens=24,
    hidden=64,
    feed_forward=96,
    vocabulary=160,
    heads=4,
    head_size=16,
    sequence=24,
    parameters=1000,
    compiled=False,
)


class Floor(NamedTuple):
    """The least that any implementation must do: bytes read and written, floating-point operations of products."""

    bytes: float = 0.0
    operations: float = 0.0


@dataclass(frozen=True)
class Case:
    """``ours`` and ``peers`` return what they compute, so that it can be compared before it is timed."""

    name: str
    shape: str
    floor: Floor
    ours: Callable[[], Any]
    peers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    """Peers that cannot run here, and why."""


@dataclass(frozen=True)
class Differentiable:
    """An operation and its peers as functions of the same tensors."""

    name: str
    shape: str
    inputs: Sequence[Tensor]
    ours: Function
    peers: Mapping[str, Function]
    forward: Floor
    backward: Floor
    absent: Mapping[str, str] = field(default_factory=dict)

    def cases(self) -> Iterator[Case]:
        """Its forward pass, then its backward pass."""
        functions = {"ours": self.ours, **self.peers}
        own = {name: _copies(self.inputs) for name in functions}  # some peers write into what they are given
        forward = {name: partial(_without_gradients, function, own[name]) for name, function in functions.items()}
        yield Case(self.name, self.shape, self.forward, forward.pop("ours"), forward, self.absent)
        backward, absent = {}, dict(self.absent)
        for name, function in functions.items():
            try:
                backward[name] = _backward_of(function, own[name])
            except Exception as refusal:  # whatever a peer raises is its answer, not ours
                if name == "ours":
                    raise
                absent[name] = _first_line(refusal)
        yield Case(f"{self.name} backward", self.shape, self.backward, backward.pop("ours"), backward, absent)


def _copies(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [each.clone().requires_grad_(each.is_floating_point()) for each in inputs]


def _without_gradients(function: Function, inputs: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        return function(*inputs)


def _backward_of(function: Function, leaves: Sequence[Tensor]) -> Callable[[], Any]:
    """The backward pass from random gradients, again and again over one graph."""
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(device=outputs[0].device).manual_seed(1)
    gradients = [torch.randn(each.shape, dtype=each.dtype, device=each.device, generator=generator) for each in outputs]
    wanted = [each for each in leaves if each.requires_grad]
    return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def drawn(sizes: Sizes, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Fresh normal numbers: products of zeros are faster than products of numbers."""
    return torch.randn(shape, device=sizes.device, dtype=dtype or sizes.dtype)


def compiled(sizes: Sizes, **functions: Function) -> dict[str, Function]:
    """``functions``, and each one of them under torch.compile where that is a peer."""
    more = (
        {f"compile({name})": torch.compile(function) for name, function in functions.items()} if sizes.compiled else {}
    )
    return {**functions, **more}


def pointwise_cases(sizes: Sizes) -> Iterator[Case]:
    """Norms, rotary positions, activations."""
    for operation in (*_norms(sizes), _rotary(sizes), *_activations(sizes)):
        yield from operation.cases()


def _norms(sizes: Sizes) -> Iterator[Differentiable]:
    size, (tokens, hidden) = sizes.dtype.itemsize, (sizes.tokens, sizes.hidden)
    shape, n = f"{tokens} x {hidden}", tokens * hidden
    x, residual = drawn(sizes, tokens, hidden), drawn(sizes, tokens, hidden, dtype=torch.float32)
    weight, bias = (drawn(sizes, hidden, dtype=torch.float32) for _ in range(2))
    liger, absent = _liger()

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (hidden,), weight.to(x.dtype), 1e-5)

    def torchs_added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, F.rms_norm(total, (hidden,), weight, 1e-5).to(x.dtype)

    def torchs_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (hidden,), weight.to(x.dtype), bias.to(x.dtype), 1e-5)

    peers = compiled(sizes, torch=torchs)
    if liger is not None:
        peers["liger"] = lambda x, weight: liger.liger_rms_norm(x, weight.to(x.dtype), 1e-5)
    yield Differentiable(
        "rms_norm", shape, (x, weight), lambda x, weight: rms_norm(x, weight, 1e-5), peers,
        Floor(2 * size * n), Floor(3 * size * n), absent,
    )  # fmt: skip
    yield Differentiable(
        "add_rms_norm, fp32 residual", shape, (x, residual, weight),
        lambda x, residual, weight: add_rms_norm(x, residual, weight, 1e-5, x.dtype),
        compiled(sizes, torch=torchs_added),
        # forwards x, residual, sum, normed; backwards both gradients, the sum, and one gradient in both types
        Floor((2 * size + 8) * n), Floor((2 * size + 12) * n),
    )  # fmt: skip
    yield Differentiable(
        "layer_norm", shape, (x, weight, bias), lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5),
        compiled(sizes, torch=torchs_layer), Floor(2 * size * n), Floor(3 * size * n),
    )  # fmt: skip


def _rotary(sizes: Sizes) -> Differentiable:
    sequence = min(sizes.sequence, sizes.tokens)
    batch = sizes.tokens // sequence
    x = drawn(sizes, batch, sequence, sizes.heads, sizes.head_size)
    cosine, sine = rotary_tables(torch.arange(sequence, device=sizes.device), sizes.head_size, 10000.0)

    def torchs(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        both = torch.cat((cosine, cosine), -1)[:, None], torch.cat((sine, sine), -1)[:, None]
        return (x * both[0] + turned * both[1]).to(x.dtype)

    moved = Floor(2 * sizes.dtype.itemsize * x.numel())
    shape = f"{batch} x {sequence} x {sizes.heads} x {sizes.head_size}"
    return Differentiable(
        "rotary", shape, (x,), lambda x: rotary(x, cosine, sine), compiled(sizes, torch=torchs), moved, moved
    )


def _activations(sizes: Sizes) -> Iterator[Differentiable]:
    shape = f"{sizes.tokens} x {sizes.feed_forward}"
    gate, up = (drawn(sizes, sizes.tokens, sizes.feed_forward) for _ in range(2))
    bytes_once = sizes.dtype.itemsize * gate.numel()
    liger, absent = _liger()
    peers = compiled(sizes, torch=lambda gate, up: F.silu(gate) * up)
    if liger is not None:
        peers["liger"] = liger.liger_swiglu
    yield Differentiable(
        "swiglu", shape, (gate, up), swiglu, peers, Floor(3 * bytes_once), Floor(5 * bytes_once), absent
    )
    yield Differentiable(
        "gelu", shape, (gate,), gelu, compiled(sizes, torch=F.gelu), Floor(2 * bytes_once), Floor(3 * bytes_once)
    )


def _liger() -> tuple[Any, dict[str, str]]:
    """Liger's functions where installed (package liger-kernel), else why they are no peer."""
    try:
        from liger_kernel.transformers import functional
    except Exception as error:  # on a machine without a GPU it fails in ways of its own
        return None, {"liger": _first_line(error)}
    return functional, {}


def loss_cases(sizes: Sizes) -> Iterator[Case]:
    """Cross-entropy on logits, and of hidden states by the output map, which takes its matrix products along."""
    logits = drawn(sizes, sizes.tokens, sizes.vocabulary)
    labels = torch.randint(sizes.vocabulary, (sizes.tokens,), device=sizes.device)
    bytes_once = sizes.dtype.itemsize * logits.numel()

    def torchs(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none")

    yield from Differentiable(
        "cross_entropy", f"{sizes.tokens} x {sizes.vocabulary}", (logits, labels), cross_entropy,
        compiled(sizes, torch=torchs), Floor(bytes_once), Floor(2 * bytes_once),
    ).cases()  # fmt: skip
    del logits
    yield _linear_loss(sizes, labels)


def _linear_loss(sizes: Sizes, labels: Tensor) -> Case:
    hidden = drawn(sizes, sizes.tokens, sizes.hidden)
    weight = drawn(sizes, sizes.vocabulary, sizes.hidden) / sizes.hidden**0.5
    liger, absent = _liger()

    def torchs(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, None).sum()

    functions = {"ours": ours, **compiled(sizes, torch=torchs)}
    if hasattr(F, "linear_cross_entropy"):
        functions["torch chunked"] = lambda hidden, weight: F.linear_cross_entropy(
            hidden, weight, labels, reduction="sum"
        )
    if liger is not None:
        functions["liger"] = lambda hidden, weight: liger.liger_fused_linear_cross_entropy(
            hidden, weight, labels, reduction="sum", accum_dtype=torch.float32
        )
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        # without the filter that leaves small gradients out, which is another computation
        functions["cut_cross_entropy"] = lambda hidden, weight: cut(
            hidden, weight, labels, reduction="sum", filter_eps=None
        )
    except Exception as error:
        absent["cut_cross_entropy"] = _first_line(error)
    both = {name: _both_passes(function, _copies((hidden, weight))) for name, function in functions.items()}
    return Case(
        "linear_cross_entropy, both passes", f"{sizes.tokens} x {sizes.hidden} x {sizes.vocabulary}",
        Floor(operations=6.0 * sizes.tokens * sizes.hidden * sizes.vocabulary), both.pop("ours"), both, absent,
    )  # fmt: skip


def _both_passes(function: Function, leaves: list[Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        loss = function(*leaves)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    return run


def optimizer_cases(sizes: Sizes) -> Iterator[Case]:
    """AdamW over a flat buffer, the gradient norm, and the sum of a weight's gradient over micro-batches."""
    n = sizes.parameters
    settings = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "step": 7}

    def ours(backend: OptimizerBackend, narrow: bool) -> Callable[[], Any]:
        param, grad, first = (drawn(sizes, n, dtype=torch.float32) for _ in range(3))
        second, scale = first.square(), torch.ones((), device=sizes.device)
        copy = torch.empty(n, dtype=torch.bfloat16, device=sizes.device) if narrow else None
        found = torch.zeros((), device=sizes.device)
        return lambda: adamw_(
            param, grad, first, second, gradient_scale=scale, found_inf=found, narrow=copy, backend=backend, **settings
        )

    def torchs(**kind: bool) -> Callable[[], Any]:
        param = torch.nn.Parameter(drawn(sizes, n, dtype=torch.float32))
        param.grad = drawn(sizes, n, dtype=torch.float32)
        return torch.optim.AdamW([param], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, **kind).step

    peers, absent = {"torch fused": torchs(fused=True), "torch foreach": torchs(foreach=True)}, {}
    for backend in ("cuda", "apex"):
        try:
            step = ours(backend, narrow=True)
            step()
            peers[f"{backend} backend"] = step
        except Exception as error:
            absent[f"{backend} backend"] = _first_line(error)
    yield Case("adamw with bf16 copy", f"{n}", Floor(30.0 * n), ours("auto", True), peers, absent)
    yield Case("adamw", f"{n}", Floor(28.0 * n), ours("auto", False), {"torch fused": peers["torch fused"]})
    x = drawn(sizes, n, dtype=torch.float32)
    yield Case(
        "sum of squares", f"{n}", Floor(4.0 * n), lambda: sum_of_squares(x),
        {"torch": lambda: torch.linalg.vector_norm(x).square()},
    )  # fmt: skip
    yield _weight_gradient(sizes)


def _weight_gradient(sizes: Sizes) -> Case:
    gradient, given = drawn(sizes, sizes.tokens, sizes.feed_forward), drawn(sizes, sizes.tokens, sizes.hidden)
    main = [torch.zeros(sizes.feed_forward, sizes.hidden, device=sizes.device) for _ in range(2)]

    def ours() -> None:
        accumulate_(main[0], gradient, given)

    def unfused() -> None:
        main[1].add_(gradient.T @ given)

    shape = f"{sizes.feed_forward} x {sizes.tokens} x {sizes.hidden}"
    operations = 2.0 * sizes.tokens * sizes.feed_forward * sizes.hidden
    return Case("weight gradient into fp32", shape, Floor(operations=operations), ours, {"product, then sum": unfused})
