"""The parts a layout may replace: linear maps, norms, embedding, head, attention and the loss over the vocabulary.

The transformer asks a :class:`Layers` for them by their *global* sizes and never learns how they are cut. A
tensor-parallel layout hands out column maps that hold a slice of the outputs, row maps that hold a slice of the
inputs and sum over the ranks, and a loss over a sliced vocabulary; a context-parallel one replaces the attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalrps.kernels.attention import attention
from megalrps.kernels.cross_entropy import cross_entropy
from megalrps.kernels.documents import Documents
from megalrps.kernels.options import AttentionBackend
from megalrps.kernels.rms_norm import add_rms_norm, rms_norm
from megalrps.parallel import tensor
from megalrps.parallel.context import ContextParallel
from megalrps.parallel.linear_loss import CHUNK_TOKENS, linear_cross_entropy
from megalrps.parallel.tensor import TensorParallel


class Linear(nn.Module):
    """``x @ weight.T`` without a bias; ``weight`` is [outputs, inputs] and uninitialised."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return tensor.column_maps(x, (self.weight,), None)[0]


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; ``weight`` is [size] and uninitialised."""

    def __init__(self, size: int, epsilon: float, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.epsilon = epsilon

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``x``; with a ``residual`` to which it is added, their sum and the norm of that.

        Under autocast a norm of fp32 is rounded to autocast's type: the linear maps that follow share this input, and
        autocast would make and keep a narrow copy for each of them.
        """
        wide = x if residual is None else residual
        narrowed = wide.dtype == torch.float32 and _autocast_enabled(x.device.type)
        out_dtype = torch.get_autocast_dtype(x.device.type) if narrowed else wide.dtype
        if residual is None:
            return rms_norm(x, self.weight, self.epsilon, out_dtype)
        return add_rms_norm(x, residual, self.weight, self.epsilon, out_dtype)


def _autocast_enabled(device_type: str) -> bool:
    """False also for devices that know no autocast, such as meta, where asking torch directly is an error."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class Embedding(nn.Module):
    """The token embedding, and the head too when tied; ``weight`` is [vocabulary, hidden] and uninitialised."""

    def __init__(self, vocabulary: int, hidden: int, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden, device=device, dtype=dtype))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return F.embedding(tokens_BS, self.weight)

    def logits(self, hidden_BSH: Tensor) -> Tensor:
        """The tied head: the product of every hidden state with every embedding, [B, S, V]."""
        return tensor.column_maps(hidden_BSH, (self.weight,), None)[0]

    def losses(self, hidden_BSH: Tensor, labels_BS: Tensor, chunk_tokens: int) -> Tensor:
        """The token losses [T] of the tied head's logits, which are never whole."""
        return linear_cross_entropy(hidden_BSH, self.weight, labels_BS, None, chunk_tokens)


class Head(Linear):
    """The untied head; ``weight`` is [vocabulary, hidden], of which ``ranks``, where there are any, hold a slice each.

    Logits and losses both come of a call, since calls are what gathers of parameters wait for
    (:mod:`megalrps.parallel.parameter_gathers`).
    """

    def __init__(
        self,
        hidden: int,
        vocabulary: int,
        device: torch.device | None,
        dtype: torch.dtype | None,
        ranks: TensorParallel | None = None,
    ) -> None:
        super().__init__(hidden, vocabulary, device, dtype)
        self.ranks = ranks

    def forward(self, hidden_BSH: Tensor, labels_BS: Tensor | None = None, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
        """The logits [B, S, V / ranks]; with ``labels_BS`` the token losses [T], of logits that are never whole."""
        if labels_BS is None:
            return tensor.column_maps(hidden_BSH, (self.weight,), self.ranks)[0]
        return linear_cross_entropy(hidden_BSH, self.weight, labels_BS, self.ranks, chunk_tokens)


class Layers(Protocol):
    """What a layout provides. Sizes are global; parameters come uninitialised."""

    def column_linear(self, inputs: int, outputs: int, heads: int | None = None) -> Linear:
        """A map whose outputs a layout may slice: the output is this process's slice.

        ``heads``: of how many heads the outputs consist. A head is not cut apart, and of fewer heads than processes
        several hold the same. None: the outputs may be cut anywhere.
        """

    def project(self, x: Tensor, maps: Sequence[Linear]) -> Sequence[Tensor]:
        """The outputs of column maps that share an input, which a layout may exchange once for all of them."""

    def row_linear(self, inputs: int, outputs: int) -> nn.Module:
        """A map whose inputs a layout may slice, taking a column map's output; the output is whole."""

    def norm(self, size: int, epsilon: float) -> nn.Module:
        """RMSNorm of the residual stream."""

    def embedding(self, vocabulary: int, hidden: int) -> Embedding:
        """The token embedding (and tied head)."""

    def head(self, hidden: int, vocabulary: int) -> Head:
        """The untied head; its output may be this process's slice of the vocabulary."""

    def attention(
        self, query_BSND: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """Causal attention of the heads this process holds, [B, S, N, D]; within ``documents`` where there are any."""

    def cross_entropy(self, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        """Token losses [T] from the head's output. It owns the logits: both passes may overwrite them."""


@dataclass(frozen=True)
class LocalLayers:
    """Every parameter whole, on one device (None: torch's default) and in one type.

    ``context``: the ranks that share every sequence; None: each sequence is whole too. ``attention_backend``: what
    computes the attention; that of a ``context`` is its own.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None
    context: ContextParallel | None = None
    attention_backend: AttentionBackend = "auto"

    def column_linear(self, inputs: int, outputs: int, heads: int | None = None) -> Linear:
        return Linear(inputs, outputs, self.device, self.dtype)

    def project(self, x: Tensor, maps: Sequence[Linear]) -> Sequence[Tensor]:
        return tensor.column_maps(x, [each.weight for each in maps], None)

    def row_linear(self, inputs: int, outputs: int) -> Linear:
        return Linear(inputs, outputs, self.device, self.dtype)

    def norm(self, size: int, epsilon: float) -> RMSNorm:
        return RMSNorm(size, epsilon, self.device, self.dtype)

    def embedding(self, vocabulary: int, hidden: int) -> Embedding:
        return Embedding(vocabulary, hidden, self.device, self.dtype)

    def head(self, hidden: int, vocabulary: int) -> Head:
        return Head(hidden, vocabulary, self.device, self.dtype)

    def attention(
        self, query_BSND: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, documents: Documents | None = None
    ) -> Tensor:
        if self.context is not None:
            assert documents is None, "Config.check refuses documents in sequences that are cut"
            return self.context.attention(query_BSND, key_BSKD, value_BSKD)
        return attention(query_BSND, key_BSKD, value_BSKD, documents=documents, backend=self.attention_backend)

    def cross_entropy(self, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        return cross_entropy(logits_TV, labels_T, overwrite_logits=True)
