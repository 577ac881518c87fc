"""Which part of the model each rank holds: the parts make up the whole, and impossible cuts are named."""

import math
from dataclasses import replace

import pytest
import torch

from megalrps.errors import InputError
from megalrps.model.config import ModelConfig
from megalrps.model.counts import activation_bytes_per_token, parameter_count
from megalrps.model.initialisation import initial_value
from megalrps.model.parameters import parameter_specs
from megalrps.model.sharding import check_tensor_parallel, key_value_copies, placements

CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=8, num_query_groups=2, ffn_hidden_size=24, vocab_size=48
)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_ranks_parts_make_up_every_parameter(ranks: int, sequence_parallel: bool):
    lie = [placements(CONFIG, ranks, rank, sequence_parallel=sequence_parallel) for rank in range(ranks)]
    for name, spec in parameter_specs(CONFIG).items():
        whole = initial_value(spec, CONFIG, 1)
        parts = [lie[rank][name].part(whole) for rank in range(ranks)]
        first = lie[0][name]
        assert all(part.shape == first.local_shape(spec.shape) for part in parts)
        assert first.pieces * first.copies == ranks
        assert torch.equal(torch.cat(parts[:: first.copies], dim=first.dimension), whole), name
        for rank, part in enumerate(parts):
            assert torch.equal(part, parts[rank // first.copies * first.copies]), "copies are neighbours"


def test_few_key_value_heads_are_held_by_several_ranks_and_their_gradients_are_parts():
    lie = placements(CONFIG, 8, 5, sequence_parallel=False)
    key = lie["layers.0.attention.key.weight"]
    assert (key.pieces, key.piece, key.copies, key.sums) == (2, 1, 4, True)
    assert lie["layers.0.attention.query.weight"].copies == 1
    assert not lie["final_norm.weight"].sums
    assert placements(CONFIG, 8, 5, sequence_parallel=True)["final_norm.weight"].sums
    assert [key_value_copies(CONFIG, ranks) for ranks in (1, 2, 4, 8)] == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("change", "ranks", "named"),
    [
        ({}, 3, "does not divide --num-attention-heads 8"),
        ({"num_attention_heads": 12, "num_query_groups": 4, "kv_channels": 2}, 6, "and --num-query-groups 4"),
        ({"ffn_hidden_size": 30}, 4, "does not divide --ffn-hidden-size 30"),
        ({"vocab_size": 50}, 4, "the 50 rows of the embedding: set --make-vocab-size-divisible-by"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(change: dict[str, int], ranks: int, named: str):
    with pytest.raises(InputError, match=f"--tensor-model-parallel-size {ranks}.*{named}"):
        check_tensor_parallel(replace(CONFIG, **change), ranks)


def held_by_a_rank(ranks: int) -> int:
    lie = placements(CONFIG, ranks, 0, sequence_parallel=False)
    return sum(math.prod(lie[name].local_shape(spec.shape)) for name, spec in parameter_specs(CONFIG).items())


def test_parameters_of_a_rank():
    assert held_by_a_rank(1) == parameter_count(CONFIG)
    norms, of_one_head = 5 * 16, 2 * 2 * 16 * 2  # the latter: layers x (key and value) x hidden size x head size
    cut = parameter_count(CONFIG) - norms - 2 * of_one_head
    assert held_by_a_rank(8) == cut // 8 + norms + of_one_head


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_memory_falls_with_the_ranks(sequence_parallel: bool):
    def activations(ranks: int) -> float:
        return activation_bytes_per_token(CONFIG, autocast=False, ranks=ranks, sequence_parallel=sequence_parallel)

    for needed in (activations, held_by_a_rank):
        sizes = [needed(ranks) for ranks in (1, 2, 4, 8)]
        assert sizes == sorted(sizes, reverse=True)
    if sequence_parallel:
        assert activations(2) == pytest.approx(activations(1) / 2, rel=1e-3)
