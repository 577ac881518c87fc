"""Where the time of an update goes: a profile of torch's by operation of ours instead of by operator or kernel."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

UPDATES = "megalrps benchmark: updates"
"""The event that encloses all that is broken down."""

OUTSIDE = "outside operators"
IDLE = "idle"
TWICE = "side by side"
"""Negative: time in which several kernels ran, counted for each of them."""
OTHER = "other"
GROUPS = (
    *("matmul", "attention", "norm", "rotary", "swiglu", "embedding", "cross-entropy", "clip", "adamw"),
    *("compiled", OTHER, OUTSIDE, IDLE, TWICE),
)

_REGION = "megalrps benchmark region: "
_RESIDUAL = {"norm": "norm", "heads": "rotary", "feed_forward": "swiglu", "embedding": "embedding"}
"""What the time in a module is for that no operator's name tells: in attention, rotary and the heads' layout."""

_WHOLE = ("attention", "cross-entropy")
"""Operations to which the matrix products inside them belong."""

# The first that fits. A flash kernel's name has cutlass in it, so attention comes before matrix products.
_NAMES = tuple(
    (group, re.compile(pattern, re.IGNORECASE))
    for group, pattern in (
        ("attention", r"scaled_dot_product|flash|fmha|sdpa|attention"),
        ("cross-entropy", r"cross_?entropy|nll_?loss|log_?softmax|logsumexp"),
        ("adamw", r"adam"),
        ("clip", r"clip|vector_norm|foreach_norm|foreach_mul_|lpnorm"),
        ("norm", r"rms_?norm|layer_?norm"),
        ("rotary", r"rotary|rope"),
        ("swiglu", r"swiglu|silu"),
        ("embedding", r"embedding"),
        ("compiled", r"^graph_\d|cpp_fused|^triton_|^kernel_cpp|CompiledF|Dynamo|AOTDispatcher"),
        (
            "matmul",
            r"::(add|b|badd)?mm\b|::_?matmul\b|mkl_linear|weight_gradient|gemm|cutlass|cublas|nvjet|xmma|_Maps(Backward)?$",
        ),
    )
)


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one update under the profiler, the mean of several."""

    whole: float
    groups: dict[str, float]
    """By operation, in the order of ``GROUPS``; they add up to the whole."""
    operators: list[tuple[str, str, float, float]]
    """The costliest: name of an operator (on CUDA: of a kernel), its group, its seconds, its calls in an update."""


def region_of_module(class_name: str) -> str | None:
    """The event's name for the forward pass of a module that is ours or like ours; None for others."""
    for suffix, part in (
        ("RotaryEmbedding", "heads"),
        ("Embedding", "embedding"),
        ("RMSNorm", "norm"),
        ("Attention", "heads"),
        ("FeedForward", "feed_forward"),
        ("MLP", "feed_forward"),
    ):
        if class_name.endswith(suffix):
            return _REGION + part
    return None


def region_of(group: str) -> str:
    """The event's name for a call whose whole time is one group's."""
    assert group in GROUPS
    return _REGION + group


def group_of_name(name: str) -> str | None:
    """The operation that an operator's or a kernel's name tells of."""
    return next((group for group, pattern in _NAMES if pattern.search(name)), None)


def break_down(events: Sequence[Any], updates: int, *, on_cuda: bool, shown: int = 12) -> Breakdown:
    """The profile of ``updates`` updates: ``events`` are a torch profiler's, all within one event named UPDATES."""
    root = next(each for each in events if each.name == UPDATES and _on_host(each))
    groups = _groups_of_operators(events)
    if on_cuda:
        parts = _kernels(events, groups)
        busy = _union((each.time_range.start, each.time_range.end) for each in events if _is_kernel(each))
        whole = root.time_range.elapsed_us()
        parts[IDLE, IDLE] = (max(0.0, whole - busy), 0)
        parts[TWICE, TWICE] = (-max(0.0, sum(each for each, _ in parts.values()) - whole), 0)
    else:
        parts = _operators(events, groups, root)
        whole = root.time_range.elapsed_us()
    totals: defaultdict[str, float] = defaultdict(float)
    for (group, _), (microseconds, _) in parts.items():
        totals[group] += microseconds
    scale = 1e-6 / updates
    ranked = sorted(parts.items(), key=lambda item: -item[1][0])[:shown]
    return Breakdown(
        whole * scale,
        {group: totals[group] * scale for group in GROUPS if totals[group]},
        [(name, group, spent * scale, calls / updates) for (group, name), (spent, calls) in ranked],
    )


Parts = dict[tuple[str, str], tuple[float, int]]
"""(group, name) -> microseconds, calls."""


def _operators(events: Sequence[Any], groups: Mapping[int, str], root: Any) -> Parts:
    """The time that each operator spends itself, on the thread of the updates: nested calls are counted once."""
    parts: Parts = {}
    for each in events:
        if not _on_host(each) or each.thread != root.thread or not _within(each, root):
            continue
        group = OUTSIDE if each is root else groups[id(each)]
        bare = each is root or each.name.startswith(_REGION)
        name = "Python, and native code without an operator" if bare else each.name
        _add(parts, (group, name), each.self_cpu_time_total, 1)
    return parts


def _kernels(events: Sequence[Any], groups: Mapping[int, str]) -> Parts:
    """The time of each kernel and copy on the device, by its name, or else by the operator that has launched it."""
    parts: Parts = {}
    linked: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for each in events:
        if _on_host(each):
            for kernel in each.kernels:
                group = group_of_name(kernel.name) or groups[id(each)]
                _add(parts, (group, kernel.name), kernel.duration, 1)
                linked[kernel.name][0] += kernel.duration
                linked[kernel.name][1] += 1
    total: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for each in events:
        if _is_kernel(each):
            total[each.name][0] += each.time_range.elapsed_us()
            total[each.name][1] += 1
    for name, (spent, calls) in total.items():
        if spent - linked[name][0] > 1e-3 * spent:  # launched by no operator that the profiler knows
            group = group_of_name(name) or OTHER
            _add(parts, (group, name), spent - linked[name][0], int(calls - linked[name][1]))
    return parts


def _add(parts: Parts, key: tuple[str, str], microseconds: float, calls: int) -> None:
    spent, before = parts.get(key, (0.0, 0))
    parts[key] = (spent + microseconds, before + calls)


def _groups_of_operators(events: Iterable[Any]) -> dict[int, str]:
    """The group of every event of the host, by its id.

    By the name of the nearest enclosing event that tells (of attention and the loss: of any); else by the module whose
    forward pass it lies in; else, in a backward pass, by that of the operator whose gradient it computes: both carry
    the same sequence number.
    """
    host = sorted((each for each in events if _on_host(each)), key=lambda each: each.time_range.start)
    forward: dict[int, str] = {}
    for each in host:
        region = _region(each)
        if region is not None and each.sequence_nr >= 0 and _backward(each) is None:
            forward[each.sequence_nr] = region
    groups = {}
    for each in host:
        told = [group for up in _upwards(each) if (group := _by_name(up))]
        named = next((group for group in told if group in _WHOLE), told[0] if told else None)
        if named is None:
            node = _backward(each)
            named = _region(each) if node is None else forward.get(node.sequence_nr)
        groups[id(each)] = named or OTHER
    return groups


def _by_name(event: Any) -> str | None:
    if event.name.startswith(_REGION) or event.name == UPDATES:
        return None
    return group_of_name(event.name)


def _region(event: Any) -> str | None:
    for up in _upwards(event):
        if up.name.startswith(_REGION):
            part = up.name.removeprefix(_REGION)
            return _RESIDUAL.get(part, part)
    return None


def _backward(event: Any) -> Any | None:
    """The autograd node whose evaluation the event is part of."""
    return next((up for up in _upwards(event) if up.name.startswith("autograd::engine::evaluate_function")), None)


def _upwards(event: Any) -> Iterable[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _within(event: Any, root: Any) -> bool:
    return any(up is root for up in _upwards(event))


def _on_host(event: Any) -> bool:
    return str(event.device_type).endswith("CPU")


def _is_kernel(event: Any) -> bool:
    """Whether it ran on the device; the profiler repeats the host's named regions there."""
    return (
        not _on_host(event)
        and not getattr(event, "is_user_annotation", False)
        and "megalrps benchmark" not in event.name
    )


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of time that any of ``intervals`` covers."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
