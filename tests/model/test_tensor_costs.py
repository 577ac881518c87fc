"""What tensor parallelism costs: the closed forms of bytes kept and bytes sent, against what is kept and sent."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from megalrps.model.config import ModelConfig
from megalrps.model.counts import activation_bytes_per_token
from megalrps.model.initialisation import initialise_
from megalrps.model.presets import PRESETS
from megalrps.model.sharding import placements
from megalrps.model.tensor_layers import TensorLayers
from megalrps.model.traffic import step_traffic
from megalrps.model.transformer import Transformer
from megalrps.parallel import collectives
from megalrps.parallel.group import Group
from megalrps.parallel.layout import Layout
from megalrps.parallel.tensor import TensorParallel

CONFIG = replace(PRESETS["llama-20m"], vocab_size=512, num_layers=2)
SHARED_HEADS = replace(CONFIG, num_query_groups=1)
BATCH, LENGTH, RANKS = 2, 32, 2


def cut_model(config: ModelConfig, sequence_parallel: bool) -> Transformer:
    torch.set_num_threads(1)
    group = Group(dist.get_rank(), RANKS, torch.device("cpu"), dist.group.WORLD)
    model = Transformer(config, layers=TensorLayers(TensorParallel(group, sequence_parallel)))
    lie = placements(config, RANKS, group.rank, sequence_parallel=sequence_parallel)
    initialise_(model, config, 0, lie)
    return model


def _rank_keeps(rank: int, config: ModelConfig, autocast: bool, sequence_parallel: bool) -> int:
    """Bytes of the distinct storages, parameters aside, that the forward pass keeps."""
    model = cut_model(config, sequence_parallel)
    skip = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    tokens = torch.randint(config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(tokens, tokens)
    del loss
    return sum(size for pointer, (size, _) in storages.items() if pointer not in skip)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [CONFIG, SHARED_HEADS])
def test_activation_bytes_are_what_autograd_keeps_on_a_rank(run_ranks, config, autocast, sequence_parallel):
    measured = max(run_ranks(RANKS, _rank_keeps, config, autocast, sequence_parallel))
    told = activation_bytes_per_token(config, autocast=autocast, ranks=RANKS, sequence_parallel=sequence_parallel)
    assert told * BATCH * LENGTH == pytest.approx(measured, rel=0.03)


def _rank_sends(rank: int, autocast: bool, sequence_parallel: bool) -> float:
    """Bytes that the collectives on activations send by rings in one step; the numbers of the loss have no H."""
    model = cut_model(CONFIG, sequence_parallel)
    sent: list[float] = []

    def counted(call, times, whole):
        def collective(*args, **kwargs):
            tensor = args[whole]
            if tensor.dim() >= 3:
                sent.append(times * tensor.nbytes * (RANKS - 1) / RANKS)
            return call(*args, **kwargs)

        return collective

    tokens = torch.randint(CONFIG.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with (
        mock.patch.object(dist, "all_reduce", counted(dist.all_reduce, 2, 0)),
        mock.patch.object(collectives, "_ALL_GATHER", counted(collectives._ALL_GATHER, 1, 0)),
        mock.patch.object(collectives, "_REDUCE_SCATTER", counted(collectives._REDUCE_SCATTER, 1, 1)),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss(tokens, tokens).total
        loss.backward()
    return sum(sent)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bytes_sent_are_those_of_the_closed_form(run_ranks, autocast: bool, sequence_parallel: bool):
    told = step_traffic(
        CONFIG,
        Layout(tp=RANKS),
        samples=BATCH,
        sequence_length=LENGTH,
        autocast=autocast,
        sequence_parallel=sequence_parallel,
    )
    assert run_ranks(RANKS, _rank_sends, autocast, sequence_parallel) == [told.tp] * RANKS
