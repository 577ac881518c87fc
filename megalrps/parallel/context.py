"""Context parallelism: the tokens of every sequence cut over ranks, keys and values gathered for the attention.

All else in the network works on each token by itself. The ranks hold the same parameters, so their gradients are summed
over the group, as over data-parallel ranks.

Causal attention of later positions is more work, so the sequence is cut into 2 x ranks equal runs, and each rank holds
one from the front and its mirror image from the back: the cut and the gathering of Llama 3 (Grattafiori et al. 2024,
arXiv 2407.21783, section 3.3.2). Brandon et al. 2023 (Striped Attention, arXiv 2311.09431) balance a ring by strides.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalrps.kernels.attention import attention
from megalrps.kernels.options import AttentionBackend
from megalrps.parallel.collectives import start_stack, start_sum_stack
from megalrps.parallel.group import Group


def sequence_positions(length: int, ranks: int, rank: int) -> Tensor:
    """The positions [length / ranks], int64, in rising order, that ``rank`` holds of a sequence of ``length``.

    They are runs ``rank`` and ``2 ranks - 1 - rank`` of 2 x ``ranks`` equal runs, which must divide ``length``; so each
    rank attends to equally many pairs of query and key. One rank holds all.
    """
    assert ranks == 1 or length % (2 * ranks) == 0, "ParallelOptions.check refuses it"
    if ranks == 1:
        return torch.arange(length)
    return torch.cat([torch.arange(length).chunk(2 * ranks)[run] for run in _runs(ranks, rank)])


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share every sequence, and the attention over what they hold together.

    What is kept for the backward pass is what one process would keep of this rank's tokens: queries, keys, values and
    outputs (and the kernel's statistics). The gathered keys and values are given up after the forward pass and gathered
    again in the backward pass. A kernel that keeps copies of its own, as one that widens grouped heads or changes the
    type does, keeps those.

    Bytes sent by ring collectives: with K key-value heads of size D on this rank, in e bytes, a sequence's keys and
    values are 2 K D e for each of its S tokens. A layer gathers them forwards, gathers them again backwards, and adds
    their gradients up and scatters these: 6 K D e S (ranks - 1) / ranks from each rank, which is 6 K D e (ranks - 1)
    for each token it holds. Where the attention is recomputed, it gathers once more: 8 K D e. Queries and outputs stay
    where they are. Gradients are added up in the type of the keys.
    """

    group: Group
    backend: AttentionBackend = "auto"
    """What computes the attention; see :func:`megalrps.kernels.attention.attention`."""

    def attention(self, query_BSND: Tensor, key_BSKD: Tensor, value_BSKD: Tensor) -> Tensor:
        """Causal attention of this rank's tokens to the whole sequence, [B, S, N, D]; collective, backwards too.

        S are this rank's positions, in the order of :func:`sequence_positions`, and rotated by them. N and K are the
        heads this rank holds. Attention spans the whole window, across the documents in it: within documents is for
        whole sequences alone.
        """
        if self.group.size == 1:
            return attention(query_BSND, key_BSKD, value_BSKD, backend=self.backend)
        with torch.no_grad():
            past = _gathered(key_BSKD, value_BSKD, self.group)
        early_key, early_value, late_key, late_value = _Prefixes.apply(key_BSKD, value_BSKD, past, self.group)
        early_query, late_query = query_BSND.chunk(2, dim=1)
        early = attention(early_query, early_key, early_value, backend=self.backend)
        late = attention(late_query, late_key, late_value, backend=self.backend)
        attended: Tensor = _GivenUp.apply(torch.cat((early, late), dim=1), key_BSKD, value_BSKD, past, self.group)
        return attended


def _runs(ranks: int, rank: int) -> tuple[int, int]:
    """Which two of 2 x ``ranks`` runs of the sequence a rank holds."""
    return rank, 2 * ranks - 1 - rank


def _owner(run: int, ranks: int) -> tuple[int, int]:
    """The rank that holds a run, and whether it is its first (0) or second (1)."""
    return (run, 0) if run < ranks else (2 * ranks - 1 - run, 1)


def _gathered(key_BSKD: Tensor, value_BSKD: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    """Keys and values [2, B, T, K, D] of all T positions up to this rank's last, in the order of the sequence."""
    stacked = start_stack(torch.stack((key_BSKD, value_BSKD)), group).wait()
    halves = stacked.unflatten(3, (2, -1))  # [ranks, 2, B, 2, run, K, D]
    last = _runs(group.size, group.rank)[1]
    owners = [_owner(run, group.size) for run in range(last + 1)]
    return torch.cat([halves[rank, :, :, half] for rank, half in owners], dim=2, out=out)


class _Prefixes(torch.autograd.Function):
    """Keys and values up to the end of this rank's first run, and up to that of its second.

    Backwards each rank receives the sum of all ranks' gradients of the keys and values it owns.
    """

    @staticmethod
    def forward(ctx: Any, key_BSKD: Tensor, value_BSKD: Tensor, past: Tensor, group: Group) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.run = key_BSKD.shape[1] // 2
        # .data: the views share the memory of `past` but not its version, so that _GivenUp may write it again.
        key, value = past.data
        end = (_runs(group.size, group.rank)[0] + 1) * ctx.run
        return key[:, :end], value[:, :end], key[:, :], value[:, :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group: Group = ctx.group
        early, late = gradients[:2], gradients[2:]
        batch, _, *heads = late[0].shape
        parts = late[0].new_zeros(group.size, 2, batch, 2, ctx.run, *heads)
        for which in range(2):
            for run, gradient in enumerate(late[which].split(ctx.run, dim=1)):
                rank, half = _owner(run, group.size)
                parts[rank, which, :, half] = gradient
            for run, gradient in enumerate(early[which].split(ctx.run, dim=1)):
                rank, half = _owner(run, group.size)
                parts[rank, which, :, half] += gradient
        key, value = start_sum_stack(parts.flatten(3, 4), group).wait()
        return key, value, None, None


class _GivenUp(torch.autograd.Function):
    """The attention's output, with the memory of the gathered keys and values given up until its gradient comes.

    The kernel has saved views of that memory, which is emptied here and filled again before the kernel's backward pass,
    as fully sharded data parallelism does with parameters (Zhao et al. 2023, arXiv 2304.11277). Hooks on saved tensors
    would do so too, but would hide what they save from recomputation, which is made of such hooks.
    """

    @staticmethod
    def forward(ctx: Any, attended: Tensor, key: Tensor, value: Tensor, past: Tensor, group: Group) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(key, value, past)
        past.untyped_storage().resize_(0)
        return attended.view_as(attended)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        key, value, past = ctx.saved_tensors
        past.untyped_storage().resize_(past.nbytes)
        _gathered(key, value, ctx.group, out=past)
        return gradient, None, None, None, None
