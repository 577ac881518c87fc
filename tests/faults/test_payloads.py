"""F13: files made to harm who reads them run no code, and are refused before they cost memory or time.

Code: a pickle, a pickle in numpy's format and one in torch's, in the place of every file that the package reads.
Bombs: manifests and shards that claim or hold more than there is, or that are made to keep their reader busy.
"""

import io
import json
import math
import os
import pickle
import resource
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_job
import torch
from counts import count, record
from damages import rewrite
from distributed_harness import processes
from small_runs import blank, launched, name_of

from megalrps.checkpoint.errors import CheckpointError
from megalrps.checkpoint.manifest import parse_manifest, render
from megalrps.checkpoint.store import Store
from megalrps.config import parse_config
from megalrps.data.increment import open_increment
from megalrps.data.index_format import bin_path, blocks_path, idx_path, manifest_path
from megalrps.data.tokenizer import load_tokenizer
from megalrps.errors import InputError
from megalrps.evaluation.run_files import read_run
from megalrps.fingerprint import fingerprint
from megalrps.training.metrics import MetricsFile

HEADER_BYTES = count("F13", small=60_000, full=2_000_000)
SECONDS_PER_MEGABYTE = 2.0
TIMES_ITS_SIZE = 2
"""A checkpoint that claims too much is refused before so much memory is taken, in terms of its files' size."""
TIMES_A_MANIFEST = 32
"""The values of a JSON text take more memory than the text: "[]," becomes a list. At most 64 MiB of text are read."""
MEBIBYTE = 1 << 20


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.mark,))


def payloads(mark: Path) -> dict[str, bytes]:
    """The same harm in three wrappings, and a YAML text that some readers run."""
    wrapped: dict[str, io.BytesIO] = {"numpy": io.BytesIO(), "torch": io.BytesIO()}
    np.save(wrapped["numpy"], np.array([Payload(mark)], dtype=object), allow_pickle=True)
    torch.save({"x": Payload(mark)}, wrapped["torch"])
    texts = {"yaml": f"seed: !!python/object/apply:pathlib.Path.touch [{mark}]\n".encode()}
    return {"pickle": pickle.dumps(Payload(mark))} | {name: file.getvalue() for name, file in wrapped.items()} | texts


def check_payloads_are_harmful(mark: Path) -> None:
    """Whoever is careless does run them: else the test tests nothing."""
    contents = payloads(mark)
    for harm in (
        lambda: pickle.loads(contents["pickle"]),
        lambda: np.load(io.BytesIO(contents["numpy"]), allow_pickle=True),
        lambda: torch.load(io.BytesIO(contents["torch"]), weights_only=False),
    ):
        harm()
        assert mark.exists()
        mark.unlink()


def open_run(root: Path) -> None:
    """A launch on the run ``root``, which loads the newest whole checkpoint."""
    with launched(root) as launch:
        launch.load()


def slots(root: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Every file that the package reads, and what reads it, by a name."""
    run, prefix = root / "run", root / "increment" / "a"
    head, lineage = run / "checkpoints" / name_of(4), run / "lineage"
    made: dict[str, tuple[Path, Callable[[], object]]] = {
        "shard": (head / "rank-00000.bin", lambda: open_run(run)),
        "manifest": (head / "manifest.json", lambda: open_run(run)),
        "a stranger's metadata": (head / ".metadata", lambda: open_run(run)),
        "a stranger's shard": (head / "__0_0.distcp", lambda: open_run(run)),
        "head": (lineage / "heads/main.json", lambda: open_run(run)),
        "fork": (lineage / f"forks/{name_of(3)}.json", lambda: open_run(run)),
        "lease": (lineage / "leases/main.json", lambda: open_run(run)),
        "metrics": (run / "metrics.jsonl", lambda: _open_metrics(run / "metrics.jsonl")),
        "plan": (run / "plan.json", lambda: read_run(run)),
        "summary": (run / "summary.json", lambda: read_run(run)),
        "configuration": (run / "config.yaml", lambda: parse_config(["--config", str(run / "config.yaml")])),
        "sentencepiece model": (root / "t.model", lambda: load_tokenizer("SentencePieceTokenizer", root / "t.model")),
        "hugging face tokenizer": (
            root / "tokenizer.json",
            lambda: load_tokenizer("HuggingFaceTokenizer", root / "tokenizer.json"),
        ),
    }
    for file in (bin_path(prefix), idx_path(prefix), blocks_path(prefix), manifest_path(prefix)):
        made[f"increment's {file.name}"] = (file, lambda: open_increment(prefix, verify=True))
    return made


def _open_metrics(path: Path) -> None:
    with MetricsFile(path, {}):
        pass


@contextmanager
def instead(file: Path, content: bytes) -> Iterator[None]:
    """``content`` in the place of ``file``; of a run, everything is put back afterwards."""
    root = next((parent for parent in file.parents if parent.name == "run"), None)
    spare, whole = file.with_name("spare"), file.read_bytes() if file.exists() else None
    if root is not None:
        spare = root.with_name("spare")
        shutil.copytree(root, spare)
    file.parent.mkdir(parents=True, exist_ok=True)
    if whole is None:
        file.write_bytes(content)
    else:
        rewrite(file, content)
    try:
        yield
    finally:
        if root is not None:
            shutil.rmtree(root)
            spare.rename(root)
        elif whole is None:
            file.unlink()
        else:
            rewrite(file, whole)


def test_no_payload_runs_from_any_slot(tmp_path: Path):
    mark = tmp_path / "ran"
    check_payloads_are_harmful(mark)
    with launched(tmp_path / "run") as launch:
        for step in range(1, 5):
            launch.save(step)
    tiny_job.write_increment(tmp_path / "increment" / "a", "a", 200)
    tried, refused = 0, []
    for slot, (file, read) in slots(tmp_path).items():
        for content in payloads(mark).values():
            tried += 1
            with instead(file, content):
                try:
                    read()
                except (InputError, CheckpointError) as error:
                    assert "\n" not in str(error)
                    refused.append(slot)
            assert not mark.exists(), f"a payload in the place of the {slot} has run"
    passes = set(slots(tmp_path)) - set(refused)
    # a launch goes on past these: by the parent, by making it again, or by not looking at it
    assert passes <= {"shard", "manifest", "head", "a stranger's metadata", "a stranger's shard", "metrics"}, passes
    record("F13", payloads_tried=tried, payloads_run=0)


# --- bombs ------------------------------------------------------------------------------------------------------------


def forged(tensors: Any, shards: Any, record: Any = None) -> str:
    """A manifest with the right digest."""
    value = {
        "format": 1,
        "name": "main-00000001",
        "created": "now",
        "versions": {},
        "shards": shards,
        "tensors": tensors,
        "record": record or {},
    }
    return render(value | {"digest": fingerprint(value)})


def chunk(offsets: list[int], sizes: list[int], position: int = 0) -> dict[str, Any]:
    """A box of bytes."""
    place = {"file": "rank-00000.bin", "byte_offset": position, "byte_length": math.prod(sizes)}
    return {"offsets": offsets, "sizes": sizes, **place}


def shard(size: int) -> list[dict[str, Any]]:
    """The one file that a forged manifest speaks of."""
    return [{"file": "rank-00000.bin", "bytes": size, "sha256": "0" * 64}]


def tensor(shape: list[int], *chunks: dict[str, Any]) -> dict[str, Any]:
    """A tensor of bytes."""
    return {"x": {"dtype": "uint8", "shape": shape, "chunks": list(chunks)}}


def headers(size: int) -> dict[str, str]:
    """Manifests of about ``size`` bytes of text that are made to be slow or large in memory."""
    boxes = size // 330
    columns = [chunk([i, i], [boxes, 1]) for i in range(boxes)]
    columns += [chunk([0, i], [i, 1]) for i in range(1, boxes)]
    columns += [chunk([i + boxes, i], [boxes - i, 1]) for i in range(boxes)]
    return {
        "lists": forged({}, [], {"a": [[]] * (size // 3)}),
        "objects": forged({}, [], {"a": [{}] * (size // 3)}),
        "objects of one": forged({}, [], {"a": [{"b": 0}] * (size // 8)}),
        "numbers": forged({}, [], {"a": [1.5] * (size // 4)}),
        "texts": forged({}, [], {"a": [f"{i}" for i in range(size // 8)]}),
        "nesting": "[" * size,
        "a long number": "1" * size,
        "long numbers": forged(tensor([10**4200] * (size // 4200)), []),
        "many dimensions": forged(tensor([2**62] * (size // 20)), []),
        "empty tensors": forged({f"{i}": tensor([0])["x"] for i in range(size // 50)}, []),
        "boxes side by side": forged(tensor([2 * boxes, boxes], *columns), shard(boxes)),
        "text that is no JSON": "{" + " " * size,
    }


CLAIMS: dict[str, tuple[Any, Any]] = {
    "a huge shape": (tensor([1 << 40]), shard(64)),
    "a huge chunk": (tensor([1 << 40], chunk([0], [1 << 40])), shard(64)),
    "a huge chunk of a huge file": (tensor([1 << 40], chunk([0], [1 << 40])), shard(1 << 40)),
    "bytes used again": (tensor([128], chunk([0], [64]), chunk([64], [64])), shard(64)),
    "one element for all": (tensor([1 << 20, 1 << 20], chunk([0, 0], [1, 1])), shard(1)),
    "a shape that overflows": (tensor([1 << 32, 1 << 32], chunk([0, 0], [1 << 32, 1 << 32])), shard(64)),
}


def measure_headers(size: int) -> dict[str, dict[str, float]]:
    """CPU seconds per MB and peak memory in terms of the text, of every header."""
    measured = {}
    for name, text in headers(size).items():
        started = time.process_time()
        _try(lambda text=text: parse_manifest(text))
        seconds = time.process_time() - started
        tracemalloc.start()
        _try(lambda text=text: parse_manifest(text))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        measured[name] = {
            "seconds_per_megabyte": round(seconds / len(text) * 1e6, 3),
            "times_its_size": round(peak / len(text), 1),
        }
    return measured


def _try(read: Callable[[], object]) -> bool:
    try:
        read()
    except (ValueError, TypeError, KeyError, RecursionError, CheckpointError):
        return False
    return True


def test_a_header_costs_time_and_memory_in_proportion():
    measured = measure_headers(HEADER_BYTES)
    slowest = max(figures["seconds_per_megabyte"] for figures in measured.values())
    largest = max(figures["times_its_size"] for figures in measured.values())
    assert slowest <= SECONDS_PER_MEGABYTE, measured
    assert largest <= TIMES_A_MANIFEST, measured
    record("F13", headers=len(measured), slowest_seconds_per_megabyte=slowest, memory_times_a_manifest=largest)


def _claims_in_a_process(root: Path, answers: Any) -> None:
    """For each claim, and for a bomb of zeros in torch's format: refused or not, and the growth of this process."""
    torch.set_num_threads(1)
    store = Store(root)
    _try(lambda: store.load("main-00000001", {"x": torch.zeros(64, dtype=torch.uint8)}))  # what the first load imports
    found = {}
    for entry in sorted(root.iterdir()):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loads = _try(lambda entry=entry: store.load(entry.name, {"x": torch.zeros(64, dtype=torch.uint8)}))
        found[entry.name] = (loads, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
    answers.send(found)


def test_a_claim_is_refused_before_it_takes_memory(tmp_path: Path):
    root = tmp_path / "checkpoints"
    whole = Store(root)
    whole.prepare()
    whole.save("main-00000001", {"x": torch.ones(64, dtype=torch.uint8)}, {})
    sizes = {}
    for number, (tensors, shards) in enumerate(CLAIMS.values(), start=2):
        place = root / f"main-{number:08d}"
        shutil.copytree(root / "main-00000001", place)
        text = forged(tensors, shards).replace('"main-00000001"', f'"{place.name}"')
        value = {key: member for key, member in json.loads(text).items() if key != "digest"}
        rewrite(place / "manifest.json", render(value | {"digest": fingerprint(value)}).encode())
        sizes[place.name] = sum(file.stat().st_size for file in place.iterdir())
    bomb = root / "main-00000099"
    shutil.copytree(root / "main-00000001", bomb)
    packed = io.BytesIO()
    torch.save(torch.zeros(64, dtype=torch.uint8), packed)
    rewrite(bomb / "rank-00000.bin", packed.getvalue())
    rewrite(bomb / "manifest.json", b" " * 4 * MEBIBYTE)
    sizes[bomb.name] = 5 * MEBIBYTE
    receiver, sender = processes().Pipe(duplex=False)
    process = processes().Process(target=_claims_in_a_process, args=(root, sender))
    process.start()
    assert receiver.poll(60)
    found = receiver.recv()
    process.join()
    assert found.pop("main-00000001")[0], "the whole one is refused: the test tests nothing"
    assert not any(loads for loads, _ in found.values()), found
    growths = {name: growth for name, (_, growth) in found.items()}
    assert all(growths[name] <= TIMES_ITS_SIZE * sizes[name] + 4 * MEBIBYTE for name in growths), (growths, sizes)
    record("F13", claims=len(found), claims_accepted=0, largest_growth_bytes=max(growths.values()))


def test_a_manifest_beyond_any_of_ours_is_not_read(tmp_path: Path):
    path = tmp_path / "checkpoints" / "main-00000001"
    path.mkdir(parents=True)
    (path / "manifest.json").touch()
    os.truncate(path / "manifest.json", 1 << 40)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="at most 67108864 bytes"):
        Store(path.parent).load(path.name, blank())
    assert tracemalloc.get_traced_memory()[1] < MEBIBYTE
    tracemalloc.stop()
