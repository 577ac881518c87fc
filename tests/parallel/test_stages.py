"""The model cut into pipeline stages: by cost, by Megatron's layout language, and onto the ranks."""

from itertools import combinations

import pytest

from megalrps.errors import InputError
from megalrps.parallel.stages import Stage, cut_by_cost, parse_layout, stage_ranks


def counts(stages: tuple[Stage, ...]) -> list[int]:
    return [len(stage.layers) for stage in stages]


def assert_whole(stages: tuple[Stage, ...], layers: int) -> None:
    """Every layer once and in order, one embedding at the front, one head at the back."""
    assert [layer for stage in stages for layer in stage.layers] == list(range(layers))
    assert [stage.has_embedding for stage in stages] == [i == 0 for i in range(len(stages))]
    assert [stage.has_head for stage in stages] == [i == len(stages) - 1 for i in range(len(stages))]


@pytest.mark.parametrize(
    ("layers", "stages"), [(1, 1), (5, 1), (2, 2), (3, 2), (8, 2), (3, 3), (7, 3), (8, 3), (4, 4), (7, 4), (8, 4)]
)
@pytest.mark.parametrize(("embedding", "head"), [(0, 0), (0, 1), (1, 0), (0, 5), (2, 2), (0.5, 3.25), (9, 9)])
def test_no_cut_has_a_cheaper_dearest_stage_or_as_dear_a_one_and_is_more_even(
    layers: int, stages: int, embedding: float, head: float
) -> None:
    def costs(cut: list[int]) -> list[float]:
        extra = [embedding if i == 0 else 0.0 for i in range(stages)]
        extra[-1] += head
        return [2.0 * length + more for length, more in zip(cut, extra, strict=True)]

    def rank(cut: list[int]) -> tuple[float, float]:
        return max(costs(cut)), sum(cost**2 for cost in costs(cut))

    taken = cut_by_cost(layers, stages, layer_cost=2.0, embedding_cost=embedding, head_cost=head)
    assert_whole(taken, layers)
    every_cut = [
        [end - start for start, end in zip((0, *cuts), (*cuts, layers), strict=True)]
        for cuts in combinations(range(1, layers), stages - 1)
    ]
    assert counts(taken) in every_cut
    assert rank(counts(taken)) == min(map(rank, every_cut))


@pytest.mark.parametrize(
    ("layers", "stages", "head", "expected"),
    [(8, 4, 0, [2, 2, 2, 2]), (10, 4, 0, [2, 2, 3, 3]), (10, 4, 2, [3, 3, 3, 1]), (4, 4, 50, [1, 1, 1, 1])],
)
def test_cut_by_cost_gives_these_counts(layers: int, stages: int, head: float, expected: list[int]) -> None:
    assert counts(cut_by_cost(layers, stages, layer_cost=1, embedding_cost=0, head_cost=head)) == expected


def test_fewer_layers_than_stages_are_refused_with_every_flag_that_could_mend_it() -> None:
    with pytest.raises(InputError) as refusal:
        cut_by_cost(3, 4, layer_cost=1, embedding_cost=0, head_cost=0)
    for flag in ("--num-layers 3", "--pipeline-model-parallel-size", "--num-virtual-stages-per-pipeline-rank"):
        assert flag in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("EttL", [2]),
        ("Et|tL", [1, 1]),
        ("E|t|t|L", [0, 1, 1, 0]),
        ("E,t*3|t,t|L", [3, 2, 0]),
        ("E|(t|)*3,L", [0, 1, 1, 1, 0]),
        ("Et|(tt|)*3tL", [1, 2, 2, 2, 1]),
        ("E((t*2|)*2t|)*2L", [2, 2, 1, 2, 2, 1, 0]),
        ("Et(|tt)*2L", [1, 2, 2]),
        ("E(t)|t*1L", [1, 1]),
    ],
)
def test_layouts_spell_these_stages(text: str, expected: list[int]) -> None:
    stages = parse_layout(text, layers=sum(expected), stages=len(expected))
    assert counts(stages) == expected
    assert_whole(stages, sum(expected))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("Et|xL", "'x' means nothing here"),
        ("Et |tL", "' ' means nothing here"),
        ("Et*|tL", "'*' means nothing here"),
        ("E*t|tL", "'*' means nothing here"),
        ("tE|tL", "must begin with its one E"),
        ("", "must begin with its one E"),
        ("EE|tL", "must begin with its one E"),
        ("Et|Lt", "must end with its one L"),
        ("Et|t", "must end with its one L"),
        ("Et||tL", "stage 1 is empty"),
        ("Et|t|tL", "spells 3 stages, --pipeline-model-parallel-size"),
        ("EttL", "spells 1 stages"),
        ("Et|L", "spells 1 layers, --num-layers is 2"),
        ("Et|ttL", "spells 3 layers, --num-layers is 2"),
        ("E(t|tL", "a ( without its )"),
        ("Et)|tL", "a ) without its ("),
        ("Et|()*2tL", "() holds nothing"),
        ("Et*0|tL", "*0 repeats nothing"),
        ("*2Et|tL", "*2 repeats nothing"),
        ("E(*2t)|tL", "*2 repeats nothing"),
        ("E((t*999999)*999999)*999999|tL", "spells far more than"),
        ("E" + "t" * 999 + "|L", "spells far more than"),
        ("E" + "t" * 99 + "|L", "spells 99 layers"),
    ],
)
def test_layouts_that_spell_no_model_are_refused_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(InputError) as refusal:
        parse_layout(text, layers=2, stages=2)
    assert complaint in str(refusal.value)
    assert "--pipeline-model-parallel-layout" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_stages_loop_over_the_ranks_or_come_back_in_a_v() -> None:
    assert stage_ranks("loop", 3, 3) == (0, 1, 2)
    assert stage_ranks("loop", 2, 6) == (0, 1, 0, 1, 0, 1)
    assert stage_ranks("v", 3, 6) == (0, 1, 2, 2, 1, 0)
    assert stage_ranks("v", 1, 2) == (0, 0)
