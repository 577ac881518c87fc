"""The parts of the network cut over a tensor-parallel group; the arithmetic is megalrps.parallel.tensor's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalrps.kernels.attention import attention
from megalrps.kernels.documents import Documents
from megalrps.kernels.options import AttentionBackend
from megalrps.model.layers import Embedding, Head, Linear, RMSNorm
from megalrps.parallel import tensor
from megalrps.parallel.context import ContextParallel
from megalrps.parallel.linear_loss import linear_cross_entropy
from megalrps.parallel.tensor import TensorParallel
from megalrps.parallel.vocabulary import cross_entropy_


class CutLinear(Linear):
    """A map of which this rank holds a slice: ``inputs`` and ``outputs`` are the slice's."""

    def __init__(
        self, inputs: int, outputs: int, ranks: TensorParallel, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__(inputs, outputs, device, dtype)
        self.ranks = ranks


class ColumnLinear(CutLinear):
    """A map that holds a slice of the outputs; its input is whole (a slice of it under sequence parallelism)."""

    def forward(self, x: Tensor) -> Tensor:
        return tensor.column_maps(x, (self.weight,), self.ranks)[0]


class RowLinear(CutLinear):
    """A map that holds a slice of the inputs; its output is whole (a slice of it under sequence parallelism)."""

    def forward(self, x: Tensor) -> Tensor:
        return tensor.row_map(x, self.weight, self.ranks)


class VocabularyEmbedding(Embedding):
    """The embedding, and tied head, that holds a run of the vocabulary's rows."""

    def __init__(
        self, rows: int, hidden: int, ranks: TensorParallel, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__(rows, hidden, device, dtype)
        self.ranks = ranks

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return tensor.embedding(tokens_BS, self.weight, self.ranks)

    def logits(self, hidden_BSH: Tensor) -> Tensor:
        """The tied head: this rank's slice of the logits, [B, S, V / ranks]."""
        return tensor.column_maps(hidden_BSH, (self.weight,), self.ranks)[0]

    def losses(self, hidden_BSH: Tensor, labels_BS: Tensor, chunk_tokens: int) -> Tensor:
        """The token losses [T] of the tied head's logits, of which this rank has its slice of some at a time."""
        return linear_cross_entropy(hidden_BSH, self.weight, labels_BS, self.ranks, chunk_tokens)


@dataclass(frozen=True)
class TensorLayers:
    """Every matrix cut over ``ranks``; a :class:`megalrps.model.layers.Layers`.

    Sizes that cannot be cut are refused before, by :func:`megalrps.model.sharding.check_tensor_parallel`.
    """

    ranks: TensorParallel
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    context: ContextParallel | None = None
    attention_backend: AttentionBackend = "auto"

    def column_linear(self, inputs: int, outputs: int, heads: int | None = None) -> ColumnLinear:
        pieces = self._size if heads is None else min(self._size, heads)
        return ColumnLinear(inputs, _share(outputs, pieces), self.ranks, self.device, self.dtype)

    def project(self, x: Tensor, maps: Sequence[Linear]) -> Sequence[Tensor]:
        return tensor.column_maps(x, [each.weight for each in maps], self.ranks)

    def row_linear(self, inputs: int, outputs: int) -> RowLinear:
        return RowLinear(_share(inputs, self._size), outputs, self.ranks, self.device, self.dtype)

    def norm(self, size: int, epsilon: float) -> RMSNorm:
        return RMSNorm(size, epsilon, self.device, self.dtype)

    def embedding(self, vocabulary: int, hidden: int) -> VocabularyEmbedding:
        return VocabularyEmbedding(_share(vocabulary, self._size), hidden, self.ranks, self.device, self.dtype)

    def head(self, hidden: int, vocabulary: int) -> Head:
        return Head(hidden, _share(vocabulary, self._size), self.device, self.dtype, self.ranks)

    def attention(
        self, query_BSND: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, documents: Documents | None = None
    ) -> Tensor:
        if self.context is not None:
            assert documents is None, "Config.check refuses documents in sequences that are cut"
            return self.context.attention(query_BSND, key_BSKD, value_BSKD)
        return attention(query_BSND, key_BSKD, value_BSKD, documents=documents, backend=self.attention_backend)

    def cross_entropy(self, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        return cross_entropy_(logits_TV, labels_T, self.ranks.group)

    @property
    def _size(self) -> int:
        return self.ranks.group.size


def _share(size: int, pieces: int) -> int:
    assert size % pieces == 0
    return size // pieces
