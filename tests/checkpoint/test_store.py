"""The store in one process: what is saved is what is loaded, and nothing half done is ever seen."""

import json
import resource
from pathlib import Path

import pytest
import torch
from bit_patterns import equal_bits, random_tensor, zeros_like
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megalrps.checkpoint.errors import (
    CheckpointExistsError,
    CorruptCheckpointError,
    MissingCheckpointError,
    MissingTensorError,
    SaveError,
    TensorMismatchError,
)
from megalrps.checkpoint.manifest import ITEM_BYTES
from megalrps.checkpoint.planners import TensorLoadPlanner
from megalrps.checkpoint.store import Store
from megalrps.errors import InputError

RECORD = {"path": "main", "step": 4000, "loss": 0.1, "of": [1, 2]}


def state_of_all_types() -> dict[str, torch.Tensor]:
    shapes = {"scalar": (), "one": (1,), "empty": (0, 3), "odd": (7, 3, 5), "row": (65,)}
    return {
        f"{name}.{dtype}": random_tensor(shape, getattr(torch, dtype))
        for dtype in ITEM_BYTES
        for name, shape in shapes.items()
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "checkpoints")
    store.prepare()
    return store


def test_every_type_and_shape_comes_back_bit_for_bit(store: Store):
    state = state_of_all_types()
    digest = store.save("main-00004000", state, RECORD)
    target = zeros_like(state)
    manifest = store.load("main-00004000", target)
    assert all(equal_bits(state[name], target[name]) for name in state)
    assert manifest.record == RECORD
    assert (
        manifest.digest == digest == json.loads((store.directory / "main-00004000/manifest.json").read_text())["digest"]
    )


def test_strided_targets_are_filled_a_few_rows_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch):
    state = {"x": random_tensor((11, 3, 5), torch.float32)}
    store.save("a", state, {})
    for read_bytes in (1, 60, 127, 1 << 20):
        monkeypatch.setattr("megalrps.checkpoint.storage._READ_BYTES", read_bytes)
        target = torch.zeros(5, 3, 11).permute(2, 1, 0)
        store.load("a", {"x": target})
        assert equal_bits(state["x"], target)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 6), max_size=4), view=st.sampled_from(["transposed", "strided", "parameter"]))
def test_views_and_parameters_are_saved_and_filled_in_place(tmp_path_factory, shape, view):
    store = Store(tmp_path_factory.mktemp("store"))
    make = {
        "transposed": lambda tensor: (
            tensor.clone().permute(*reversed(range(tensor.ndim))) if tensor.ndim else tensor.clone()
        ),
        "strided": lambda tensor: tensor.repeat_interleave(2, dim=0)[::2] if tensor.ndim else tensor.clone(),
        "parameter": lambda tensor: torch.nn.Parameter(tensor.clone()),
    }[view]
    state = {"x": make(random_tensor(tuple(shape), torch.float32))}
    store.save("a", state, {})
    target = {"x": make(torch.zeros(shape))}
    place = target["x"].data_ptr()
    store.load("a", target)
    assert equal_bits(state["x"], target["x"])
    assert target["x"].data_ptr() == place


def test_some_of_the_tensors_can_be_loaded(store: Store):
    store.save("a", {"x": torch.ones(3), "y": torch.ones(2)}, {})
    target = torch.zeros(2)
    store.load("a", {"y": target}, verify=False)
    assert target.tolist() == [1, 1]


def test_a_committed_name_is_never_saved_again(store: Store):
    store.save("a", {"x": torch.ones(3)}, {})
    before = (store.directory / "a/manifest.json").read_bytes()
    with pytest.raises(CheckpointExistsError, match="checkpoint a exists") as raised:
        store.save("a", {"x": torch.zeros(3)}, {})
    assert not isinstance(raised.value, InputError)
    assert (store.directory / "a/manifest.json").read_bytes() == before
    assert [entry.name for entry in store.directory.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["", ".a", "..", "a/b", "/a", "a\n", "a b", "-a", "é", "a" * 101])
def test_names_that_leave_the_directory_or_hide_in_it_are_refused(store: Store, name: str):
    with pytest.raises(InputError, match="not allowed"):
        store.save(name, {"x": torch.ones(3)}, {})
    with pytest.raises(InputError, match="not allowed"):
        store.load(name, {"x": torch.ones(3)})
    assert not list(store.directory.iterdir())


@pytest.mark.parametrize(
    "entry", [3, "text", {"nested": torch.ones(1)}, b"bytes", torch.ones(1, dtype=torch.complex64)]
)
def test_only_tensors_of_known_types_are_saved(store: Store, entry: object):
    with pytest.raises(SaveError, match=r"odd.*a checkpoint holds"):
        store.save("a", {"x": torch.ones(1), "odd": entry}, {})  # type: ignore[dict-item]
    assert not list(store.directory.iterdir())


@pytest.mark.parametrize("record", [{"loss": float("nan")}, {"x": torch.ones(1)}, {"x": {1: 2, "1": 3}}])
def test_records_that_are_not_json_are_refused(store: Store, record: dict):
    with pytest.raises(SaveError):
        store.save("a", {"x": torch.ones(1)}, record)
    assert not list(store.directory.iterdir())


def test_records_are_read_as_json_gives_them(store: Store):
    store.save("a", {"x": torch.ones(1)}, {"sizes": (1, 2), "by_step": {10: "a", 9: "b"}})
    assert store.manifest("a").record == {"sizes": [1, 2], "by_step": {"10": "a", "9": "b"}}


def test_nothing_is_committed_that_could_not_be_read(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megalrps.checkpoint.manifest._LARGEST_MANIFEST_BYTES", 1000)
    with pytest.raises(SaveError, match="at most 1000 bytes"):
        store.save("a", {"x": torch.ones(1)}, {"long": "x" * 1000})
    assert not list(store.directory.iterdir())


def test_a_state_without_tensors_is_a_record(store: Store):
    store.save("a", {}, RECORD)
    assert store.load("a", {}).record == RECORD


def test_mismatches_name_the_tensor_and_touch_nothing(store: Store):
    store.save("a", {"x": torch.ones(3), "y": torch.ones(2)}, {})
    y = torch.zeros(2)
    for wrong, problem, pattern in [
        ({"z": torch.zeros(3)}, MissingTensorError, "no tensor z"),
        (
            {"x": torch.zeros(4)},
            TensorMismatchError,
            r"tensor x is float32 \[3\] in the checkpoint and float32 \[4\] here",
        ),
        ({"x": torch.zeros(1, 3)}, TensorMismatchError, "tensor x"),
        ({"x": torch.zeros(3, dtype=torch.float64)}, TensorMismatchError, "float64"),
    ]:
        with pytest.raises(problem, match=pattern) as raised:
            store.load("a", {"y": y, **wrong})
        assert isinstance(raised.value, InputError)
        assert y.tolist() == [0, 0]


def test_missing_checkpoints_are_the_users_to_mend(store: Store):
    with pytest.raises(MissingCheckpointError, match="no checkpoint b") as raised:
        store.load("b", {"x": torch.ones(1)})
    assert isinstance(raised.value, InputError)
    with pytest.raises(MissingCheckpointError):
        store.remove("b")
    with pytest.raises(MissingCheckpointError):
        store.load_first([], {})


def test_a_full_disk_commits_nothing_and_leaves_nothing(store: Store):
    store.save("a", {"x": torch.ones(1000)}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (0, 1, 1000, 4095):  # within the shard; a limit that only the manifest passes is next
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(SaveError, match=r"checkpoint b was not saved: rank 0: OSError.*File too large"):
                store.save("b", {"x": torch.ones(1024)}, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(SaveError, match="File too large"):
            store.save("b", {"x": torch.ones(1024)}, {"long": "x" * 4000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in store.directory.iterdir()] == ["a"]
    store.save("b", {"x": torch.ones(1024)}, {})
    store.verify("b")


def test_a_writer_removes_its_own_leftovers_only(store: Store):
    kept = ["a", ".hidden", ".a.0123456789abcdef.refused", "notes.partial", ".a.partial", ".a.0123.partial"]
    gone = [".a.0123456789abcdef.partial", ".main-00004000.fedcba9876543210.trash"]
    for name in kept + gone:
        (store.directory / name).mkdir()
        (store.directory / name / "rank-00000.bin").write_bytes(b"x")
    Store(store.directory)
    assert len(list(store.directory.iterdir())) == len(kept + gone), "a reader removes nothing"
    Store(store.directory).prepare()
    assert sorted(entry.name for entry in store.directory.iterdir()) == sorted(kept)


def test_a_store_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another directory"):
        Store(tmp_path / "file" / "checkpoints").prepare()


def test_removed_and_set_aside_checkpoints_are_gone_from_the_store(store: Store):
    for name in "abc":
        store.save(name, {"x": torch.ones(1)}, {})
    store.remove("a")
    place = store.set_aside("b")
    assert store.names() == ("c",)
    assert (place / "manifest.json").exists()
    store.prepare()
    assert place.exists()
    store.save("b", {"x": torch.ones(1)}, {})
    assert store.names() == ("b", "c")


def test_damage_falls_back_to_the_next_and_says_so(store: Store):
    for name, value in [("a", 1.0), ("b", 2.0), ("c", 3.0)]:
        store.save(name, {"x": torch.full((5,), value)}, {})
    shard = store.directory / "c/rank-00000.bin"
    shard.chmod(0o644)
    shard.write_bytes(bytes(20))
    target = torch.zeros(5)
    loaded = store.load_first(["c", "b", "a"], {"x": target})
    assert loaded.manifest.name == "b"
    assert ["c" in str(refusal) and "rank-00000.bin" in str(refusal) for refusal in loaded.refused] == [True]
    assert target.tolist() == [2] * 5
    with pytest.raises(CorruptCheckpointError, match=r"rank-00000\.bin"):
        store.load_first(["c"], {"x": target})


def test_a_plan_that_leaves_elements_unfilled_is_refused():
    """No manifest that was read can lead here; a defect in planning could."""
    half = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32), torch.Size([4]), [ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))]
    )
    planner = TensorLoadPlanner()
    planner.set_up_planner({"x": torch.zeros(4)}, Metadata({"x": half}))
    with pytest.raises(TensorMismatchError, match="tensor x: the checkpoint fills 2 of 4 elements"):
        planner.create_local_plan()
