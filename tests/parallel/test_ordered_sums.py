"""Sums in the tree over places: what the tree is, and that ranks which hold runs of the terms make the same of them."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalrps.parallel import ordered_sums
from megalrps.parallel.group import Group
from megalrps.parallel.layout import Layout
from megalrps.parallel.mesh import make_mesh
from megalrps.parallel.ordered_sums import TreeSum, sum_in_order_
from megalrps.parallel.world import World


def drawn(count: int) -> list[Tensor]:
    """Terms of so different sizes that nearly every order of additions rounds otherwise."""
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(40, generator=generator) * 10 ** torch.randn(40, generator=generator) for _ in range(count)]


def by_the_definition(terms: list[Tensor]) -> Tensor:
    """Halves while there are halves, then one after the other."""
    if len(terms) % 2 == 0:
        middle = len(terms) // 2
        return by_the_definition(terms[:middle]) + by_the_definition(terms[middle:])
    total = terms[0].clone()
    for term in terms[1:]:
        total = total + term
    return total


def tree_sum(terms: list[Tensor]) -> Tensor:
    tree = TreeSum(len(terms))
    for term in terms:
        tree.add([term])
    return tree.total[0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 12, 24, 40, 64])
def test_the_sum_is_that_of_the_tree_and_leaves_its_terms_alone(count: int):
    terms = drawn(count)
    before = [term.clone() for term in terms]
    assert torch.equal(tree_sum(terms), by_the_definition(terms))
    assert all(torch.equal(term, kept) for term, kept in zip(terms, before, strict=True))


@pytest.mark.parametrize(("count", "ranks"), [(8, 2), (8, 8), (12, 4), (40, 8), (6, 2), (7, 1)])
def test_runs_of_a_power_of_two_of_ranks_are_subtrees(count: int, ranks: int):
    terms, share = drawn(count), count // ranks
    tops = [tree_sum(terms[rank * share :][:share]) for rank in range(ranks)]
    assert torch.equal(tree_sum(tops), tree_sum(terms))
    plain = torch.stack(terms).sum(0)
    assert count < 6 or not torch.equal(plain, tree_sum(terms)), "these terms would not show another order"


def test_a_tree_holds_no_more_sums_than_it_has_levels():
    tree = TreeSum(24)  # three levels of halves over runs of three
    kept = []
    for term in drawn(24):
        tree.add([term])
        kept.append(len(tree._sums))
    assert max(kept) == ordered_sums.most_sums(24) == 4 and kept[-1] == 1


def test_terms_that_are_missing_or_too_many_are_noticed():
    tree = TreeSum(2)
    tree.add([torch.ones(1)])
    with pytest.raises(AssertionError, match="1 of 2 terms"):
        _ = tree.total
    tree.add([torch.ones(1)])
    with pytest.raises(AssertionError, match="more terms than stated"):
        tree.add([torch.ones(1)])


def _rank_sums(rank: int) -> np.ndarray:
    ordered_sums._GATHERED_AT_ONCE = 7  # of 40, so that the last part is a shorter one
    world = World(rank, 4, torch.device("cpu"), dist.group.WORLD)
    return sum_in_order_(drawn(4)[rank], make_mesh(Layout(dp=4), world).data).numpy()


def test_ranks_sum_what_they_hold_in_the_order_of_ranks(run_ranks):
    expected = by_the_definition(drawn(4)).numpy()
    assert all(np.array_equal(found, expected) for found in run_ranks(4, _rank_sums))
    alone = drawn(1)[0]
    assert sum_in_order_(alone, Group(0, 1, torch.device("cpu"), None)) is alone
