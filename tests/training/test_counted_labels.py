"""Labels that do not count: the loss and gradient of an update are those of the labels that do, over their number."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train_step import ALONE, BATCH, CONFIG, SEQUENCE_LENGTH, double_model, double_state, share
from tiny_job import world_of_harness

from megalrps.errors import InputError, RepeatedError
from megalrps.parallel.layout import Layout
from megalrps.parallel.mesh import Mesh, make_mesh
from megalrps.training.step import Batch, forward_backward, train_step

COUNTED = np.random.default_rng(5).random((BATCH, SEQUENCE_LENGTH)) < np.linspace(0, 0.7, BATCH)[:, None]
"""Of the first sample nothing counts, of the last much."""


def masked(batch: Batch, counted: np.ndarray = COUNTED) -> Batch:
    return replace(batch, global_tokens=None, counted_BS=counted)


def by_hand(batch: Batch, counted: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of one label after the other, and its gradient."""
    model, tokens = double_model(), torch.as_tensor(batch.tokens)
    logits_BSV = model(tokens[:, :-1])
    losses = [F.cross_entropy(logits_BSV[row, at], tokens[row, at + 1]) for row, at in np.argwhere(counted).tolist()]
    mean = torch.stack(losses).sum() / len(losses)
    mean.backward()
    return mean.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("micro_batch", [1, BATCH])
def test_an_update_is_made_of_the_labels_that_count(micro_batch: int):
    state = double_state(micro_batch=micro_batch)
    loss = forward_backward(state, masked(share(0)), ALONE)
    mean, gradients = by_hand(share(0), COUNTED)
    assert loss.item() == pytest.approx(mean, rel=1e-6)  # the loss that is told is fp32
    found = dict(state.buffers.named_gradients())
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12 * float(gradient.abs().max()))


def test_labels_that_all_count_are_the_same_bits_as_no_mask():
    results = []
    for batch in (share(0), replace(share(0), global_tokens=None), masked(share(0), np.ones_like(COUNTED))):
        state = double_state()
        result = train_step(state, batch, learning_rate=1e-3, mesh=ALONE)
        results.append((result, {name: tensor.clone() for name, tensor in state.tensors().items()}))
    assert results[0][0] == results[1][0] == results[2][0]
    for _, tensors in results[1:]:
        assert [name for name, tensor in tensors.items() if not torch.equal(tensor, results[0][1][name])] == []


def test_what_stands_in_the_place_of_a_label_that_does_not_count_is_of_no_effect():
    """Labels of the last place are inputs nowhere."""
    counted = COUNTED.copy()
    counted[:, -1] = False
    other = share(0).tokens.copy()
    other[:, -1] = (other[:, -1] + 1) % CONFIG.vocab_size
    losses = [
        forward_backward(double_state(), replace(masked(share(0), counted), tokens=tokens), ALONE)
        for tokens in (share(0).tokens, other)
    ]
    assert losses[0] == losses[1]


def test_a_batch_in_which_nothing_counts_is_an_error_that_changes_nothing():
    state = double_state()
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with pytest.raises(InputError, match=r"no label of a whole global batch counts.*--eod-mask-loss") as caught:
        train_step(state, masked(share(0), np.zeros_like(COUNTED)), learning_rate=1e-3, mesh=ALONE)
    assert not isinstance(caught.value, RepeatedError)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())
    assert train_step(state, masked(share(0)), learning_rate=1e-3, mesh=ALONE).is_finite


def _rank_counts(rank: int) -> tuple[Any, ...]:
    mesh: Mesh = make_mesh(Layout(dp=2), world_of_harness())
    own = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    state, one_sided = double_state(mesh, micro_batch=2), COUNTED.copy()
    one_sided[BATCH // 2 :] = False
    losses = [
        forward_backward(state, masked(share(0, mesh), counted[own]), mesh).item() for counted in (COUNTED, one_sided)
    ]
    try:
        train_step(state, masked(share(0, mesh), np.zeros_like(COUNTED)[own]), learning_rate=1e-3, mesh=mesh)
    except InputError as error:
        return (*losses, type(error))
    return (*losses, None)


def test_two_ranks_count_together_and_one_tells_of_nothing(run_ranks):
    """A rank without a label that counts takes part all the same; where no rank has any, all end and one tells."""
    one_sided = COUNTED.copy()
    one_sided[BATCH // 2 :] = False
    wanted = [by_hand(share(0), counted)[0] for counted in (COUNTED, one_sided)]
    first, second = run_ranks(2, _rank_counts)
    assert first[:2] == second[:2] == pytest.approx(tuple(wanted), rel=1e-6)
    assert (first[2], second[2]) == (InputError, RepeatedError)
