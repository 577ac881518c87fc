"""The store over ranks: any layout loads what any other saved, and what fails on one rank fails on all."""

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from bit_patterns import equal_bits, random_tensor, zeros_like
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from megalrps.checkpoint.errors import CheckpointExistsError, CorruptCheckpointError, SaveError
from megalrps.checkpoint.store import Store
from megalrps.errors import InputError

RECORD = {"path": "main", "step": 4000}
ROWS = [1, 2, 5, 7, 64]


def _global_state() -> dict[str, torch.Tensor]:
    return {
        f"{dtype}.{rows}.{dimension}": random_tensor(
            (rows, 6) if dimension == 0 else (6, rows), getattr(torch, dtype), rows
        )
        for dtype in ("float32", "bfloat16", "int64")
        for rows in ROWS
        for dimension in (0, 1)
    }


def _sharded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(tensor, mesh, [Shard(int(name[-1]))]) for name, tensor in state.items()}


def _save_sharded(rank: int, directory: Path) -> str:
    store = Store(directory)
    store.prepare()
    plain = {"replicated": torch.arange(10.0), f"of_rank_{rank}": torch.full((3,), float(rank))}
    return store.save("a", {**_sharded(_global_state()), **plain}, RECORD)


def _load_sharded(rank: int, directory: Path) -> None:
    state = _global_state()
    target = _sharded(zeros_like(state))
    plain = {"replicated": torch.zeros(10), "of_rank_0": torch.zeros(3)}
    manifest = Store(directory).load("a", {**target, **plain})
    assert manifest.record == RECORD
    for name, tensor in _sharded(state).items():
        local, loaded = tensor, target[name]
        assert isinstance(local, DTensor)
        assert isinstance(loaded, DTensor)
        assert equal_bits(local.to_local(), loaded.to_local()), name
    assert plain["replicated"].tolist() == list(range(10))
    assert plain["of_rank_0"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("saving", [1, 2, 3])
def test_any_number_of_ranks_loads_what_any_other_saved(run_ranks, tmp_path: Path, saving: int):
    digests = run_ranks(saving, _save_sharded, tmp_path)
    assert len(set(digests)) == 1
    store = Store(tmp_path)
    manifest = store.verify("a")
    assert [shard.file for shard in manifest.shards] == [f"rank-{rank:05d}.bin" for rank in range(saving)]
    assert len(manifest.tensors["replicated"].chunks) == 1, "replicated tensors are written once"
    for loading in (1, 2, 4):
        run_ranks(loading, _load_sharded, tmp_path)
    whole = zeros_like(_global_state())
    store.load("a", whole)  # and without a process group
    assert all(equal_bits(tensor, whole[name]) for name, tensor in _global_state().items())


def _save_on_a_grid(rank: int, directory: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    full = random_tensor((5, 7), torch.float32)
    state = {
        "rows_by_data_columns_by_tensor": distribute_tensor(full, mesh, [Shard(0), Shard(1)]),
        "replicated_over_data": distribute_tensor(full, mesh, [Replicate(), Shard(0)]),
    }
    Store(directory).save("a", state, {})


def test_a_mesh_of_two_dimensions_is_saved_once_and_whole(run_ranks, tmp_path: Path):
    run_ranks(4, _save_on_a_grid, tmp_path)
    full = random_tensor((5, 7), torch.float32)
    target = {"rows_by_data_columns_by_tensor": torch.zeros(5, 7), "replicated_over_data": torch.zeros(5, 7)}
    manifest = Store(tmp_path).load("a", target)
    assert all(equal_bits(full, tensor) for tensor in target.values())
    assert {name: len(entry.chunks) for name, entry in manifest.tensors.items()} == {
        "rows_by_data_columns_by_tensor": 4,
        "replicated_over_data": 2,
    }


def _fail_on_rank_1(rank: int, directory: Path, fault: str) -> str:
    store = Store(directory)
    state: dict[str, torch.Tensor] = {"x": torch.ones(1000), f"own_{rank}": torch.ones(1000)}
    name = "a"
    if fault == "partial sums":
        state["dtensor"] = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()])
    if rank == 1:
        if fault == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif fault == "entry":
            state["odd"] = 3  # type: ignore[assignment]
        elif fault == "shape":
            state["x"] = torch.ones(10, 100)
        elif fault == "dtype":
            state["x"] = torch.ones(1000, dtype=torch.float64)
        elif fault == "name":
            name = "b"
        elif fault == "bad name":
            name = "../b"
    try:
        store.save(name, state, {})
    except (SaveError, InputError) as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("fault", ["disk", "entry", "shape", "dtype", "name", "bad name", "partial sums"])
def test_a_fault_on_one_rank_of_two_commits_nothing_and_raises_on_both(run_ranks, tmp_path: Path, fault: str):
    messages = run_ranks(2, _fail_on_rank_1, tmp_path, fault)
    assert all(message != "saved" for message in messages)
    assert len({message.partition(": ")[2] for message in messages}) == 1, "both ranks give the same reason"
    assert not list(tmp_path.iterdir())


def _save_twice(rank: int, directory: Path) -> bool:
    store = Store(directory)
    store.save("a", {"x": torch.ones(3)}, {})
    try:
        store.save("a", {"x": torch.ones(3)}, {})
    except CheckpointExistsError:
        return True
    return False


def test_a_taken_name_is_refused_on_every_rank(run_ranks, tmp_path: Path):
    assert run_ranks(2, _save_twice, tmp_path) == [True, True]


def _load_damaged(rank: int, directory: Path) -> tuple[str, list[float]]:
    target = torch.zeros(1000)
    try:
        Store(directory).load("a", {"of_rank": target})
    except CorruptCheckpointError as error:
        return str(error), target.unique().tolist()
    return "loaded", []


def _save_one_tensor_a_rank(rank: int, directory: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    Store(directory).save("a", {"of_rank": distribute_tensor(torch.ones(1000), mesh, [Shard(0)])}, {})


def test_damage_in_the_share_of_one_rank_is_refused_on_all_before_a_tensor_is_touched(run_ranks, tmp_path: Path):
    run_ranks(3, _save_one_tensor_a_rank, tmp_path)
    for rank in (0, 2):
        shard = tmp_path / f"a/rank-{rank:05d}.bin"
        shard.chmod(0o644)
        content = bytearray(shard.read_bytes())
        content[7] ^= 1
        shard.write_bytes(content)
    (message, _), *_ = outcomes = run_ranks(2, _load_damaged, tmp_path)
    assert outcomes == [(message, [0.0])] * 2
    assert "rank-00000.bin" in message
    assert "rank-00002.bin" in message
    assert "rank-00001.bin" not in message
