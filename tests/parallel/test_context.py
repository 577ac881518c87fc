"""Attention over a cut sequence equals the whole sequence's, tensor by tensor, in float64; and what it costs."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from context_job import BATCH, HEAD_SIZE, HEADS, Case, Found, attended, case_name, errors, mesh_of, model_of, modelled

from megalrps.parallel import collectives
from megalrps.parallel.context import ContextParallel, sequence_positions
from megalrps.parallel.group import Group

TOLERANCE = 1e-12


@pytest.mark.parametrize(("length", "ranks"), [(5, 1), (4, 2), (24, 2), (24, 4), (48, 3), (80, 8)])
def test_ranks_share_out_positions_and_work(length: int, ranks: int):
    held = [sequence_positions(length, ranks, rank) for rank in range(ranks)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    assert all(positions.dtype == torch.int64 and positions.diff().ge(1).all() for positions in held)
    pairs = {int((positions + 1).sum()) for positions in held}
    assert pairs == {length * (length + 1) // 2 // ranks}


ATTENTION = (
    *(Case(cp=2, groups=groups) for groups in (1, 2, 4)),
    Case(cp=2, length=4),
    Case(cp=2, recompute=True),
    Case(cp=4, groups=1),
    Case(cp=4, groups=4, recompute=True),
    *(Case(cp=2, tp=2, groups=groups) for groups in (1, 2, 4)),
)
MODELS = (
    Case(cp=2),
    Case(cp=4, groups=4, length=48),
    Case(cp=2, tp=2),
    Case(cp=2, tp=2, sequence_parallel=True),
    Case(cp=2, tp=2, sequence_parallel=True, groups=1),
)


def _rank_attends(rank: int, case: Case) -> Found:
    return attended(case)


@pytest.mark.parametrize("case", ATTENTION, ids=case_name)
def test_output_and_gradients_are_those_of_the_whole_sequence(run_ranks, case: Case):
    wrong = {
        name: error
        for name, error in errors(run_ranks(case.ranks, _rank_attends, case), attended, case).items()
        if not error <= TOLERANCE
    }
    assert not wrong


def _rank_models(rank: int, case: Case) -> Found:
    return modelled(case)


@pytest.mark.parametrize("case", MODELS, ids=case_name)
def test_loss_and_gradients_of_a_model_are_those_of_one_process(run_ranks, case: Case):
    wrong = {
        name: error
        for name, error in errors(run_ranks(case.ranks, _rank_models, case), modelled, case).items()
        if not error <= TOLERANCE
    }
    assert not wrong


def test_one_rank_exchanges_nothing():
    query, key, value = (torch.randn(2, 5, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    single = ContextParallel(Group(0, 1, torch.device("cpu"), None))
    assert single.attention(query, key, value).shape == query.shape


def _rank_keeps(rank: int, dtype: torch.dtype, length: int, ranks: int) -> int:
    """Bytes of the distinct storages that the attention keeps for its backward pass, masks aside."""
    query, key, value = (
        torch.randn(BATCH, length // ranks, HEADS, HEAD_SIZE, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1] == HEAD_SIZE:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
        return tensor

    group = Group(rank, ranks, torch.device("cpu"), dist.group.WORLD)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = ContextParallel(group).attention(query, key, value)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gathered_keys_and_values_are_kept(run_ranks, dtype: torch.dtype):
    ranks, length = 2, 64
    of_own_tokens = BATCH * length // ranks * HEADS * HEAD_SIZE * dtype.itemsize
    assert run_ranks(ranks, _rank_keeps, dtype, length, ranks) == [4 * of_own_tokens] * ranks


def _rank_sends(rank: int, case: Case, autocast: bool) -> float:
    """Bytes that the collectives send by rings in one step of a model."""
    model = model_of(case, mesh_of(case), torch.float32)
    sent: list[float] = []

    def counted(call, whole):
        def collective(*args, **kwargs):
            sent.append(args[whole].nbytes * (case.cp - 1) / case.cp)
            return call(*args, **kwargs)

        return collective

    tokens = torch.randint(64, (BATCH, case.length), generator=torch.Generator().manual_seed(0))
    positions = sequence_positions(case.length, case.cp, rank)
    with (
        mock.patch.object(dist, "all_reduce", side_effect=AssertionError("nothing is all-reduced")),
        mock.patch.object(collectives, "_ALL_GATHER", counted(collectives._ALL_GATHER, 0)),
        mock.patch.object(collectives, "_REDUCE_SCATTER", counted(collectives._REDUCE_SCATTER, 1)),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss_of_logits(model(tokens[:, positions], positions), tokens[:, positions]).total
        loss.backward()
    return sum(sent)


@pytest.mark.parametrize(("ranks", "groups", "autocast"), [(2, 1, False), (2, 2, True), (4, 4, True)])
def test_bytes_sent_are_those_of_the_closed_form(run_ranks, ranks: int, groups: int, autocast: bool):
    case = Case(cp=ranks, groups=groups)
    tokens, width = BATCH * case.length // ranks, case.model.key_value_width
    told = 6 * width * (2 if autocast else 4) * (ranks - 1) * tokens * case.model.num_layers
    assert run_ranks(ranks, _rank_sends, case, autocast) == [told] * ranks
