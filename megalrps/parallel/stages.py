"""The model cut into pipeline stages, and the pipeline ranks that hold them. Pure data: imports no torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from megalrps.errors import InputError

StagePlacement = Literal["loop", "v"]
"""``loop``: stage i on pipeline rank i mod P. ``v``: stages r and 2P - 1 - r on rank r, down the ranks and up again."""

_SYMBOL = re.compile(r"[EtL|()]|\*[0-9]{1,6}")


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds: a run of layers, by their numbers in the whole model, and perhaps an end of it."""

    layers: range
    has_embedding: bool
    has_head: bool


def cut_by_cost(
    layers: int, stages: int, *, layer_cost: float, embedding_cost: float, head_cost: float
) -> tuple[Stage, ...]:
    """Cut ``layers`` equal layers into ``stages`` runs of at least one, the dearest stage as cheap as can be.

    The costs are in any one unit, say FLOPs a token. The first stage also pays ``embedding_cost`` and the last one
    ``head_cost``. Of the cuts whose dearest stage costs the same, the most even one is taken (least sum of squares);
    where that leaves a choice, the later stages get the layers, since under 1F1B they hold fewer micro-batches.

    Every layer goes to the stage that is cheapest so far: as layers cost the same, no other cut does better.
    Raises InputError where there are fewer layers than stages.
    """
    assert stages >= 1 and layer_cost > 0 and embedding_cost >= 0 and head_cost >= 0
    if layers < stages:
        raise InputError(
            f"--num-layers {layers} cannot fill {stages} pipeline stages: lower --pipeline-model-parallel-size or "
            "--num-virtual-stages-per-pipeline-rank, or add layers"
        )
    extra = [0.0] * stages
    extra[0] += embedding_cost
    extra[-1] += head_cost
    counts = [1] * stages
    for _ in range(layers - stages):
        cheapest = min(range(stages), key=lambda stage: (extra[stage] + counts[stage] * layer_cost, -stage))
        counts[cheapest] += 1
    return _stages(counts)


def _stages(counts: list[int]) -> tuple[Stage, ...]:
    """Stages of so many layers; the embedding on the first, the head on the last."""
    bounds = [sum(counts[:stage]) for stage in range(len(counts) + 1)]
    return tuple(
        Stage(range(start, end), has_embedding=stage == 0, has_head=stage == len(counts) - 1)
        for stage, (start, end) in enumerate(pairwise(bounds))
    )


def parse_layout(text: str, layers: int, stages: int) -> tuple[Stage, ...]:
    """The stages that ``text`` spells in the language of Megatron's ``--pipeline-model-parallel-layout``.

    ``E`` is the embedding, ``t`` one layer, ``L`` the head with its loss, ``|`` the end of a stage; ``t*3`` and
    ``(t|)*3`` repeat, brackets may be nested, commas say nothing. A stage may be the embedding alone or the head alone.

    Raises InputError for anything else, and where ``text`` does not make ``layers`` layers and ``stages`` stages.
    """
    flag = f"--pipeline-model-parallel-layout {text!r}"
    spelled = _expand(text, flag, limit=10 * (layers + stages) + 100)
    if spelled.count("E") != 1 or spelled[0] != "E":
        raise InputError(f"{flag} must begin with its one E, the embedding")
    if spelled.count("L") != 1 or spelled[-1] != "L":
        raise InputError(f"{flag} must end with its one L, the head")
    parts = spelled.split("|")
    if "" in parts:
        raise InputError(f"{flag}: stage {parts.index('')} is empty: put a t into it, or drop one |")
    if len(parts) != stages:
        raise InputError(
            f"{flag} spells {len(parts)} stages, --pipeline-model-parallel-size times "
            f"--num-virtual-stages-per-pipeline-rank makes {stages}: change one of them"
        )
    if spelled.count("t") != layers:
        raise InputError(f"{flag} spells {spelled.count('t')} layers, --num-layers is {layers}: change one of them")
    return _stages([part.count("t") for part in parts])


def _expand(text: str, flag: str, limit: int) -> str:
    """``text`` with all repetitions written out: letters and stage ends only.

    What grows past ``limit`` symbols is far from the model: it is refused before it fills the memory.
    """
    open_groups: list[list[str]] = [[]]
    """The symbols of each bracket that is open; the outermost is no bracket. One string an item that `*` repeats."""
    for symbol in _symbols(text, flag):
        items = open_groups[-1]
        if symbol == "(":
            open_groups.append([])
        elif symbol == ")":
            if len(open_groups) == 1:
                raise InputError(f"{flag}: a ) without its (: add the one or drop the other")
            if not items:
                raise InputError(f"{flag}: () holds nothing: put a letter into it or drop it")
            open_groups.pop()
            open_groups[-1].append("".join(items))
        elif symbol.startswith("*"):
            times = int(symbol[1:])
            if not items or not times:
                raise InputError(
                    f"{flag}: {symbol} repeats nothing: write a letter or a bracket, * and a number from 1"
                )
            items.append(_repeated(items.pop(), times, flag, limit))
        else:
            items.append(symbol)
    if len(open_groups) > 1:
        raise InputError(f"{flag}: a ( without its ): add the one or drop the other")
    return _repeated("".join(open_groups[0]), 1, flag, limit)


def _repeated(item: str, times: int, flag: str, limit: int) -> str:
    if len(item) * times > limit:
        raise InputError(f"{flag} spells far more than --num-layers: repeat less")
    return item * times


def _symbols(text: str, flag: str) -> Iterator[str]:
    position = 0
    text = text.replace(",", "")
    while position < len(text):
        match = _SYMBOL.match(text, position)
        if match is None:
            raise InputError(f"{flag}: {text[position]!r} means nothing here: use E, t, L, |, ( ) and * with a number")
        yield match[0]
        position = match.end()


def stage_ranks(kind: StagePlacement, pipeline_ranks: int, stages: int) -> tuple[int, ...]:
    """The pipeline rank of every stage."""
    if kind == "v":
        assert stages == 2 * pipeline_ranks
        return (*range(pipeline_ranks), *reversed(range(pipeline_ranks)))
    assert stages % pipeline_ranks == 0
    return tuple(stage % pipeline_ranks for stage in range(stages))
