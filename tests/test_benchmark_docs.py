"""docs/benchmarks.md quotes benchmarks/results/*.json to the letter, and each JSON says what it compares."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
PRECISIONS = {"fp32": "fp32", "bf16_autocast": "bf16 autocast"}


def table(*rows: tuple[str, ...]) -> str:
    rule = ("---",) * len(rows[0])
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def model_step_table(result: Mapping[str, Any]) -> str:
    rows = [("precision", "", "CPU s", "user s", "system s", "page faults", "tokens per CPU s", "GFLOP per CPU s")]
    for key, label in PRECISIONS.items():
        figures = result[key]
        for name, shown in (("ours", "ours"), ("peer", "transformers")):
            kinds = ("cpu", "user", "system")
            seconds = tuple(f"{figures[f'median_{kind}_seconds'][name]:.2f}" for kind in kinds)
            speed = (f"{figures['tokens_per_cpu_second'][name]:,}", f"{figures['gflop_per_cpu_second'][name]:.1f}")
            rows.append((label, shown, *seconds, f"{figures['median_page_faults'][name]:,}", *speed))
    return table(*rows)


def model_step_ratios(result: Mapping[str, Any]) -> str:
    rows = [("precision", "ratio", "of the minima", "of user seconds", "losses differ by at most")]
    for key, label in PRECISIONS.items():
        ratios = (f"{result[key][name]:.2f}" for name in ("ratio", "ratio_of_minima", "ratio_of_user_seconds"))
        rows.append((label, *ratios, f"{result[key]['largest_loss_difference_nats']:.1e} nats"))
    return table(*rows)


def checkpoint_table(result: Mapping[str, Any]) -> str:
    """Of one process and of several: bandwidths where they are what counts, else seconds that the loop waits."""
    rows = [("", "ranks", "ours", "torch.distributed.checkpoint", "ratio of seconds")]
    for ranks, each in (("1", result), *result["ranks"].items()):
        speed, seconds, ratio = each["megabytes_per_second"], each["median_seconds"], each["ratio"]
        for name, label, peer in (
            ("save", "save", "dcp_save"),
            ("load", "load, every byte verified", "dcp_load"),
            ("load_unverified", "load, sizes verified", "dcp_load"),
        ):
            rows.append((label, ranks, f"{speed[name]:,.0f} MB/s", f"{speed[peer]:,.0f} MB/s", f"{ratio[name]:.2f}"))
        for name, label, peer in (
            ("stall", "stall of an asynchronous save", "dcp_stall"),
            ("stall_kept_stager", "the same, with a stager that is kept", "dcp_stall_kept_stager"),
        ):
            rows.append((label, ranks, f"{seconds['stall']:.3f} s", f"{seconds[peer]:.3f} s", f"{ratio[name]:.2f}"))
    return table(*rows)


def parallel_seconds(result: Mapping[str, Any]) -> str:
    peers = ("DDP", "FSDP2", "one process")
    rows = [("processes", "", "CPU s", "wall s", *(f"of {peer}" for peer in peers))]
    for ranks, group in result["overhead"]["seconds"].items():
        for name, figures in group.items():
            seconds = (f"{figures[f'median_{clock}_seconds']:.3f}" for clock in ("cpu", "wall"))
            ratios = (f"{figures['ratio'][peer]:.2f}" if peer in figures["ratio"] else "" for peer in peers)
            rows.append((ranks, name, *seconds, *ratios))
    return table(*rows)


def parallel_bytes(result: Mapping[str, Any]) -> str:
    rows = [("layout", "along", "MB sent", "closed form, MB", "ratio", "written / needed by gloo")]
    for name, row in result["bytes"].items():
        for dimension, counted in row["counted"].items():
            megabytes = (f"{each / 1e6:.3f}" for each in (counted, row["closed_form"][dimension]))
            rows.append((name, dimension, *megabytes, f"{row['ratio'][dimension]:.4f}", f"{row['written_ratio']:.4f}"))
    return table(*rows)


def parallel_memory(result: Mapping[str, Any]) -> str:
    rows = [("processes", "", "fullest rank, MB", "dry run, MB", "ratios of all ranks")]
    for name, row in result["memory"].items():
        ranks, fullest = len(row["peak"]), max(row["peak"])
        told, ratios = "", ""
        if "told" in row:
            told = f"{row['told'][row['peak'].index(fullest)] / 1e6:.2f}"
            ratios = ", ".join(f"{ratio:.3f}" for ratio in sorted(set(row["ratio"])))
        rows.append((str(ranks), name, f"{fullest / 1e6:.2f}", told, ratios))
    return table(*rows)


def parallel_conditions(result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    before, after = (result["load_average"][when][0] for when in ("before", "after"))
    return (
        f"`{result['command']}`: {result['date']}, {result['device']['cores']} cores, {versions}; "
        f"{result['rounds']} rounds of {result['updates_a_turn']} updates; losses of the same update differ by at most "
        f"{result['overhead']['largest_loss_difference_nats']:.1e} nats; load average {before:.2f} before and "
        f"{after:.2f} after."
    )


def conditions(result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    before, after = (result["load_average"][when][0] for when in ("before", "after"))
    return (
        f"`{result['command']}`: {result['date']}, {result['device']['cores']} cores, {versions}; "
        f"{result['repetitions']} repetitions; load average {before:.2f} before and {after:.2f} after."
    )


def precision_table(result: Mapping[str, Any]) -> str:
    rows = [("layout", "fp32: loss, nats", "fp32: parameters", "bf16: loss, nats", "bf16: parameters")]
    for name, wide in result["apart"]["fp32"].items():
        narrow = result["apart"]["bf16"][name]
        figures = (wide["loss_nats"], wide["parameter"], narrow["loss_nats"], narrow["parameter"])
        rows.append((name, *(f"{figure:.1e}" for figure in figures)))
    return table(*rows)


def precision_of_bf16(result: Mapping[str, Any]) -> str:
    own = result["apart"]["bf16"]["1x1x1 beside fp32"]
    return f"bf16 on one process parts from fp32 by {own['loss_nats']:.1e} nats and {own['parameter']:.1e}"


def throughput_conditions(result: Mapping[str, Any]) -> str:
    names = ("python", "torch", "transformers", "accelerate")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in names)
    before, after = (result["load_average"][when][0] for when in ("before", "after"))
    return (
        f"`{result['command']}`: {result['date']}, {result['device']['threads']} thread, {versions}; "
        f"{result['rounds']} rounds of {result['updates_a_turn']} updates; load average {before:.2f} before and "
        f"{after:.2f} after."
    )


def throughput_table(*results: Mapping[str, Any]) -> str:
    rows = [("model", "", "tokens/s", "tokens a CPU s", "CPU s an update", "ratio", "by CPU s", "of the best turns")]
    for result in results:
        shape = result["shape"]
        label = f"`{shape['preset']}`, {shape['global_batch_size']} x {shape['sequence_length']}"
        for name, row in result["contenders"].items():
            ratio = result["ratio"].get(name)
            ratios = ("", "", "")
            if ratio is not None:
                best = ratio["of_minima"]["cpu"]
                ratios = tuple(
                    f"{each:.2f}" for each in (ratio["tokens_per_second"], ratio["tokens_per_cpu_second"], best)
                )
            speed = (f"{row['tokens_per_second']:,.0f}", f"{row['tokens_per_cpu_second']:,.0f}")
            rows.append((label, name, *speed, f"{row['cpu_seconds_per_update']:.3f}", *ratios))
    return table(*rows)


THROUGHPUT = ("throughput_20m", "throughput_20m_small", "throughput_3m")


QUOTED: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
    ("model_step_cpu", conditions),
    ("model_step_cpu", model_step_table),
    ("model_step_cpu", model_step_ratios),
    ("checkpoint_cpu", conditions),
    ("checkpoint_cpu", checkpoint_table),
    ("parallel", parallel_conditions),
    ("parallel", parallel_seconds),
    ("parallel", parallel_bytes),
    ("parallel", parallel_memory),
    ("layout_precision", precision_table),
    ("layout_precision", precision_of_bf16),
    *((name, throughput_conditions) for name in THROUGHPUT),
]


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "render"), QUOTED, ids=lambda value: getattr(value, "__name__", value))
def test_the_page_quotes_the_results(name: str, render: Callable[[Mapping[str, Any]], str]) -> None:
    expected = render(read(name))
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert " ".join(expected.split()) in page, f"docs/benchmarks.md should say:\n\n{expected}\n"


def test_the_page_quotes_the_throughput_of_all_shapes() -> None:
    expected = throughput_table(*(read(name) for name in THROUGHPUT))
    assert expected in PAGE.read_text(encoding="utf-8"), f"docs/benchmarks.md should say:\n\n{expected}\n"


@pytest.mark.parametrize("name", THROUGHPUT)
def test_who_trained_beside_us_trained_the_same_model(name: str) -> None:
    result = read(name)
    assert set(result["contenders"]) == {"ours", *result["ratio"]} == set(result["compares"])
    assert all(apart < 1e-5 for apart in result["largest_loss_difference_nats"].values())


def test_memory_is_quoted_to_the_letter() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import memory

    for page, text in memory.pages(read("memory")).items():
        assert page.read_text(encoding="utf-8") == text, f"{page} is stale: python benchmarks/memory.py --pages-only"


def test_the_figures_of_data_are_quoted_to_the_letter() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import data_tables

    page = PAGE.read_text(encoding="utf-8")
    assert len(data_tables.BLOCK.findall(page)) == 5
    assert page == data_tables.rendered(page, read("data")), "stale: python benchmarks/data_tables.py"


def test_both_sides_made_the_same_data() -> None:
    result = read("data")
    assert all(all(result["preprocess"][kind]["identical"].values()) for kind in ("huggingface", "sentencepiece"))
    assert all(result["workers"][kind]["one_output"] for kind in ("huggingface", "sentencepiece"))


def test_the_promises_are_quoted_to_the_letter() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import faults

    page = faults.PAGE.read_text(encoding="utf-8")
    assert {found[2] for found in faults.BLOCK.finditer(page)} == {"conditions", "promises", "fsyncs", "defects"}
    if not faults.RESULT.exists():
        pytest.skip("no full run of the faults is recorded yet: make faults")
    assert page == faults.rendered(page, read("faults")), "stale: python benchmarks/faults.py --pages-only"


@pytest.mark.parametrize("name", ["model_step_cpu", "checkpoint_cpu", "parallel"])
def test_a_result_says_what_it_compares_and_on_what(name: str) -> None:
    result = read(name)
    assert set(result["compares"]) - {"calls"} == {"ours", "peer"}
    assert result["convention"]
    assert {"python", "torch"} <= set(result["versions"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert set(result["load_average"]) == {"before", "after"}
    assert re.fullmatch(rf"python benchmarks/\w+\.py .*--output benchmarks/results/{name}\.json", result["command"])


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_names_no_place_of_the_machine_it_was_made_on(file: Path) -> None:
    assert not re.search(
        r'(?<![\w.])/(home|root|tmp|work|mnt|data|usr|var)\b|"hostname"', file.read_text(encoding="utf-8")
    )


def test_the_ratios_are_those_of_the_repetitions() -> None:
    result = read("model_step_cpu")
    for precision in PRECISIONS:
        figures = result[precision]
        middle = {name: sorted(values)[len(values) // 2] for name, values in figures["cpu_seconds"].items()}
        assert len(figures["cpu_seconds"]["ours"]) == result["repetitions"]
        assert figures["ratio"] == pytest.approx(middle["ours"] / middle["peer"], abs=0.001)


def test_parallel_contenders_trained_the_same_model() -> None:
    assert read("parallel")["overhead"]["largest_loss_difference_nats"] < 1e-5


def test_bytes_sent_are_those_of_the_closed_forms_and_of_the_sockets() -> None:
    for name, row in read("parallel")["bytes"].items():
        for dimension, ratio in row["ratio"].items():
            assert ratio == pytest.approx(row["counted"][dimension] / row["closed_form"][dimension], abs=1e-4)
            assert ratio == pytest.approx(1.0, abs=0.01), (name, dimension)
            assert row["dry_run"][dimension] == pytest.approx(row["counted"][dimension], rel=0.001), (name, dimension)
        assert row["written_ratio"] == pytest.approx(1.0, abs=0.01), name


def test_memory_of_every_rank_is_what_the_dry_run_tells() -> None:
    for name, row in read("parallel")["memory"].items():
        for peak, told in zip(row["peak"], row.get("told", row["peak"]), strict=True):
            assert told == pytest.approx(peak, rel=0.05), name
