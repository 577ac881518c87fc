"""Token losses from hidden states: the head and its cross-entropy in one, so that no pass ever holds all logits.

The forward pass makes the logits of a run of tokens, a chunk, reduces them to two numbers a token and gives them up;
kept are the hidden states and one number a token, the log-sum-exp. The backward pass makes a chunk's logits again,
writes their gradient over them, and uses it up in the products that give the gradients of hidden states and weight::

    logits = x W^T,    d logits = (exp(logits - lse) - onehot(label)) g,    d x = d logits W,    d W += d logits^T x

That is 8 h V FLOP a token where kept logits take 6 h V. The idea, and that a large vocabulary's logits are most of what
a small model keeps, are those of Wijmans et al. 2024 (arXiv 2411.09009, section 4), whose kernels never write a logit
to memory. Here the products are the vendor's, on whole chunks; nothing is left out of a gradient that is small (their
section 4.3), and the vocabulary is not sorted.

The weight's gradient adds up over chunks in fp32 whatever the products' type: a sum of chunks rounded to bf16 loses
what single chunks add (linkedin/Liger-Kernel#512, allenai/OLMo-core#370).
"""

from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalrps.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics
from megalrps.kernels.weight_gradient import accumulate_
from megalrps.parallel.collectives import start_gather
from megalrps.parallel.main_gradient import main_gradient_of
from megalrps.parallel.tensor import TensorParallel, _narrowed, _start_exchange
from megalrps.parallel.vocabulary import whole_statistics

CHUNK_TOKENS = 2048
"""Tokens whose logits exist at a time, unless stated.

Each chunk reads and writes the weight's fp32 gradient, 8 bytes an element, beside a product of 2 FLOP an element and
token. On a GPU of 4.3 TB/s and 790 TFLOP/s the two take the same time at 735 tokens, at 2,048 the traffic a third of
the product's. Twice as many save little more, and hold twice the logits: 2,048 x 32,000 in bf16 are 125 MiB, as much as
the three inner activations of a feed-forward layer of width 10,700 hold of the same tokens.
"""


def linear_cross_entropy(
    hidden: Tensor, weight_VH: Tensor, labels: Tensor, ranks: TensorParallel | None, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """The loss in nats of each token, [T] in fp32 (fp64 for fp64 ``hidden``), of the logits ``hidden @ weight.T``.

    ``hidden`` [..., H] and ``labels`` [...], indices into the whole vocabulary, are of T tokens. ``ranks``: those that
    share the matrix; ``weight_VH`` is then this rank's slice of the vocabulary, ``hidden`` is [B, S, H] or under
    sequence parallelism [B, S / ranks, H], ``labels`` are those of whole sequences, and the losses are equal on all
    ranks. They exchange what a column map and :func:`megalrps.parallel.vocabulary.cross_entropy_` would, not beside
    computation. T is cut into the fewest chunks of at most ``chunk_tokens``, as equal as can be.

    The products are in the type of ``hidden``, which autocast narrows as it would for a map. The gradient of a weight
    that has a :class:`megalrps.parallel.main_gradient.MainGradient` goes there, as one contribution a backward pass.
    It is done in that pass also where a pipeline schedule defers weight products: what such a product would keep until
    then, the gradient of all logits, is what this function is there not to hold.
    """
    assert chunk_tokens >= 1
    first = 0 if ranks is None else ranks.group.rank * weight_VH.shape[0]
    losses_T: Tensor = _LinearCrossEntropy.apply(
        _narrowed(hidden), weight_VH, labels.flatten() - first, ranks, chunk_tokens
    )
    return losses_T


class _LinearCrossEntropy(torch.autograd.Function):
    """Labels count from the first of this rank's logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight_VH: Tensor, labels_T: Tensor, ranks: TensorParallel | None, chunk_tokens: int
    ) -> Tensor:
        hidden_TH, narrow_VH = _whole_rows(hidden, ranks), weight_VH.to(hidden.dtype)
        assert len(hidden_TH) == len(labels_T)
        of_rank_2T = hidden.new_empty(2, len(labels_T), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for tokens, logits_CV in _logits(hidden_TH, narrow_VH, chunk_tokens):
            of_rank_2T[0, tokens], of_rank_2T[1, tokens] = cross_entropy_statistics(logits_CV, labels_T[tokens])
        logsumexp_T, label_logit_T = of_rank_2T if ranks is None else whole_statistics(of_rank_2T, ranks.group)
        ctx.save_for_backward(hidden, labels_T, logsumexp_T)
        # Not saved: what recomputation and offload hand back of a saved tensor has lost its attributes.
        ctx.weight_VH, ctx.ranks, ctx.chunk_tokens = weight_VH, ranks, chunk_tokens
        return logsumexp_T - label_logit_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden, labels_T, logsumexp_T = ctx.saved_tensors
        ranks: TensorParallel | None = ctx.ranks
        of_hidden, of_weight, *_ = ctx.needs_input_grad
        hidden_TH, narrow_VH = _whole_rows(hidden, ranks), ctx.weight_VH.to(hidden.dtype)
        gradient_TH = torch.empty_like(hidden_TH) if of_hidden else None

        def products() -> Iterator[tuple[Tensor, Tensor]]:
            """Of each chunk the operands of the weight's product, once that of the hidden states is done."""
            for tokens, logits_CV in _logits(hidden_TH, narrow_VH, ctx.chunk_tokens):
                cross_entropy_gradient_(logits_CV, labels_T[tokens], logsumexp_T[tokens], gradient_T[tokens])
                if gradient_TH is not None:
                    torch.mm(logits_CV, narrow_VH, out=gradient_TH[tokens])
                yield logits_CV, hidden_TH[tokens]

        gradient_VH = None
        if of_weight:
            gradient_VH = _weight_gradient(ctx.weight_VH, products())
        else:
            deque(products(), maxlen=0)
        if gradient_TH is not None and ranks is not None:
            whole = gradient_TH.view(hidden.shape[0], -1, hidden.shape[-1])
            return _start_exchange(whole, ranks).wait(), gradient_VH, None, None, None
        return None if gradient_TH is None else gradient_TH.view_as(hidden), gradient_VH, None, None, None


def _whole_rows(hidden: Tensor, ranks: TensorParallel | None) -> Tensor:
    """[T, H]: the hidden states of whole sequences."""
    if ranks is not None and ranks.sequence_parallel:
        hidden = start_gather(hidden, ranks.group).wait()
    return hidden.reshape(-1, hidden.shape[-1]).contiguous()


def chunks(tokens: int, most: int) -> list[slice]:
    """The fewest runs of at most ``most`` tokens, no two of which differ in length by more than one."""
    number = max(1, -(-tokens // most))
    bounds = [tokens * index // number for index in range(number + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def _logits(hidden_TH: Tensor, weight_VH: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk's place among the tokens and its logits [C, V], all in the same memory: use them up before the next.

    Once the last ones are given up there is no such memory any more.
    """
    of_chunks = chunks(len(hidden_TH), chunk_tokens)
    longest = max(tokens.stop - tokens.start for tokens in of_chunks)
    memory_CV = hidden_TH.new_empty(longest, weight_VH.shape[0])
    for tokens in of_chunks:
        logits_CV = memory_CV[: tokens.stop - tokens.start]
        torch.mm(hidden_TH[tokens], weight_VH.T, out=logits_CV)
        yield tokens, logits_CV


def _weight_gradient(weight_VH: Tensor, products: Iterator[tuple[Tensor, Tensor]]) -> Tensor | None:
    """What autograd is given of the weight's gradient: none where the weight has a main gradient, which takes it."""
    main = main_gradient_of(weight_VH)
    if main is not None:
        main.add_products_now(products)
        return None
    wide_VH = torch.zeros_like(weight_VH, dtype=torch.promote_types(weight_VH.dtype, torch.float32))
    for gradient_CV, hidden_CH in products:
        accumulate_(wide_VH, gradient_CV, hidden_CH)
    return wide_VH.to(weight_VH.dtype)
