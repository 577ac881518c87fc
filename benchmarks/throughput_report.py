"""The figures of benchmarks/throughput.py: from turns to medians and ratios, and what a person reads of them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from throughput_breakdown import GROUPS, Breakdown
from throughput_rounds import Round

OURS = "ours"


def figures(rounds: Sequence[Round], result: Mapping[str, Any]) -> dict[str, Any]:
    """The medians of one contender, and all of its turns."""
    tokens, flops = result["tokens_per_update"], result["shape"]["flops_per_token"]
    peak = result["device"]["dense_bf16_peak_tflops"]
    wall = statistics.median(each.wall / each.updates for each in rounds)
    cpu = statistics.median((each.user + each.system) / each.updates for each in rounds)
    tflops = tokens * flops / wall / 1e12
    return {
        "tokens_per_second": tokens / wall,
        "model_tflops": tflops,
        "mfu": None if peak is None else tflops / peak,
        "wall_seconds_per_update": wall,
        "cpu_seconds_per_update": cpu,
        "tokens_per_cpu_second": tokens / cpu,
        "peak_bytes": max(each.peak_bytes for each in rounds),
        "rounds": [{key: round(value, 4) for key, value in each._asdict().items()} for each in rounds],
    }


def ratios(contenders: Mapping[str, Any], peer: str) -> dict[str, Any]:
    """How much faster ours is: by the medians, and turn by turn, where what slows the machine slows both."""
    own, other = contenders[OURS], contenders[peer]
    pairs = list(zip(own["rounds"], other["rounds"], strict=True))
    by_round = [theirs["wall"] / mine["wall"] for mine, theirs in pairs]
    cpu = [tuple(each["user"] + each["system"] for each in pair) for pair in pairs]
    by_cpu = [theirs / mine for mine, theirs in cpu]
    return {
        "tokens_per_second": round(own["tokens_per_second"] / other["tokens_per_second"], 3),
        "tokens_per_cpu_second": round(own["tokens_per_cpu_second"] / other["tokens_per_cpu_second"], 3),
        "median_of_rounds": {"wall": round(statistics.median(by_round), 3), "cpu": round(statistics.median(by_cpu), 3)},
        "of_minima": {
            "wall": round(
                min(each["wall"] for each in other["rounds"]) / min(each["wall"] for each in own["rounds"]), 3
            ),
            "cpu": round(min(theirs for _, theirs in cpu) / min(mine for mine, _ in cpu), 3),
        },
        "of_rounds": {"wall": [round(each, 3) for each in by_round], "cpu": [round(each, 3) for each in by_cpu]},
        "peak_memory": round(own["peak_bytes"] / other["peak_bytes"], 3),
    }


def breakdown_json(profile: Breakdown) -> dict[str, Any]:
    """Milliseconds of one update under the profiler."""
    body = asdict(profile)
    return {
        "milliseconds_per_update": body["whole"] * 1e3,
        "groups": {group: seconds * 1e3 for group, seconds in body["groups"].items()},
        "costliest": [
            {"name": name, "group": group, "milliseconds": seconds * 1e3, "calls": calls}
            for name, group, seconds, calls in body["operators"]
        ],
    }


def show(result: Mapping[str, Any]) -> None:
    """What a person reads."""
    shape, device = result["shape"], result["device"]
    peak = device["dense_bf16_peak_tflops"]
    print(
        f"{shape['preset'] or 'LLaMA'}: {shape['layers']} layers of {shape['hidden']}, {shape['heads']} heads, "
        f"feed-forward {shape['feed_forward']}, vocabulary {shape['vocabulary']:,}: "
        f"{shape['parameters']:,} parameters, {shape['flops_per_token']:,} FLOPs a token\n"
        f"{shape['global_batch_size']} sequences of {shape['sequence_length']} tokens an update in passes of "
        f"{shape['micro_batch_size']}, {shape['precision']}, {result['data']}; {device['gpu'] or device['processor']}, "
        f"{device['threads']} threads, load average {result['load_average']['before'][0]} before and "
        f"{result['load_average']['after'][0]} after\n"
        f"{result['rounds']} rounds of {result['updates_a_turn']} updates in turns, medians; the first "
        f"{result['warm_up_updates']} updates of each are not counted\n"
        + (f"MFU is of {peak:,.0f} TFLOP/s, dense bf16\n" if peak else "no MFU: no peak is known for this\n")
    )
    print(f"{'':14} {'tokens/s':>10} {'TFLOP/s':>9} {'MFU':>6} {'ms/update':>10} {'CPU s/update':>13} {'peak MB':>9}")
    for name, row in result["contenders"].items():
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        print(
            f"{name:14} {row['tokens_per_second']:10,.0f} {row['model_tflops']:9.4f} {mfu:>6} "
            f"{row['wall_seconds_per_update'] * 1e3:10.1f} {row['cpu_seconds_per_update']:13.4f} "
            f"{row['peak_bytes'] / 1e6:9,.0f}"
        )
    for name, row in result["ratio"].items():
        _show_ratio(name, row, result["largest_loss_difference_nats"].get(name))
    if result["breakdown"]:
        _show_breakdown(result["breakdown"], device["kind"])
    print(f"\n{result['convention']}; peak memory: {result['peak_memory']}")
    for name, does in result["compares"].items():
        print(f"{name}: {does}")


def _show_ratio(name: str, row: Mapping[str, Any], apart: float | None) -> None:
    turns, middle, best = row["of_rounds"]["wall"], row["median_of_rounds"], row["of_minima"]
    told = "other weights" if apart is None else f"losses differ by at most {apart:.1e} nats"
    print(
        f"ours / {name}: {row['tokens_per_second']:.2f} x tokens/s, {row['tokens_per_cpu_second']:.2f} x tokens a CPU "
        f"second; turn by turn {middle['wall']:.2f} ({min(turns):.2f} to {max(turns):.2f}) and {middle['cpu']:.2f}; "
        f"best turns {best['wall']:.2f} and {best['cpu']:.2f}; memory {row['peak_memory']:.2f} x; {told}"
    )


def _show_breakdown(profiles: Mapping[str, Any], device: str) -> None:
    print(f"\nmilliseconds of an update under the profiler, by {'kernel' if device == 'cuda' else 'operator'}")
    print(f"{'':18}" + "".join(f"{name:>15}" for name in profiles))
    for group in (*GROUPS, "whole"):
        row = [
            of["milliseconds_per_update"] if group == "whole" else of["groups"].get(group) for of in profiles.values()
        ]
        if any(row):
            print(f"{group:18}" + "".join(f"{'' if each is None else f'{each:.2f}':>15}" for each in row))
    for name, profile in profiles.items():
        print(f"costliest of {name}:")
        for each in profile["costliest"][:8]:
            print(
                f"  {each['milliseconds']:9.2f} ms {each['calls']:7.1f} calls  {each['group']:14} {each['name'][:70]}"
            )
