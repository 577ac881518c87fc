"""The loss over a cut vocabulary is the loss over the whole one, and so is its gradient."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megalrps.kernels.cross_entropy import cross_entropy_reference
from megalrps.parallel.group import Group
from megalrps.parallel.vocabulary import cross_entropy_

TOKENS, VOCABULARY = 37, 24
TYPES = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-2}


def case(kind: str, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of which one dwarfs the others where ``scale`` is large, labels in every slice, and weights."""
    generator = torch.Generator().manual_seed(3)
    logits = (scale * torch.randn(TOKENS, VOCABULARY, generator=generator)).to(getattr(torch, kind))
    labels = torch.arange(TOKENS) * 7 % VOCABULARY
    return logits, labels, torch.linspace(-1, 2, TOKENS, dtype=torch.float64)


def _rank_loses(rank: int, kind: str, scale: float) -> tuple[np.ndarray, np.ndarray, str]:
    group = Group(rank, dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    logits, labels, weights = case(kind, scale)
    part = logits.chunk(group.size, dim=1)[rank].clone().requires_grad_()
    losses = cross_entropy_(part * 1, labels, group)
    (losses.double() * weights).sum().backward()
    assert part.grad is not None
    return losses.detach().double().numpy(), part.grad.double().numpy(), str(losses.dtype)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_and_gradients(run_ranks, ranks: int, kind: str, scale: float):
    logits, labels, weights = case(kind, scale)
    logits.requires_grad_()
    wanted = cross_entropy_reference(logits, labels)
    (wanted.double() * weights).sum().backward()
    by_rank = run_ranks(ranks, _rank_loses, kind, scale)
    gradient = np.concatenate([part for _, part, _ in by_rank], axis=1)
    assert logits.grad is not None
    np.testing.assert_allclose(gradient, logits.grad.double().numpy(), rtol=TYPES[kind], atol=TYPES[kind])
    for losses, _, told in by_rank:
        assert told == str(wanted.dtype), "losses are told in fp32 whatever the logits' type"
        np.testing.assert_allclose(
            losses, wanted.detach().double().numpy(), rtol=1e-6 if told == "torch.float32" else 1e-13
        )
        assert np.array_equal(losses, by_rank[0][0]), "every rank has the same bits"
