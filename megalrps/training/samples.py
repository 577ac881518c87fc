"""Samples where they are computed with, cut into micro-batches together with what is known of their documents."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megalrps.kernels.documents import Documents, documents_from_starts

UNCOUNTED = -1
"""Stands for a label that does not count in the loss: no token has that index."""


@dataclass(frozen=True, eq=False)
class Samples:
    """A rank's samples of an update, or a micro-batch of them, on its device.

    ``tokens`` [B, S + 1] are int64. ``documents`` are those of the inputs, the first S of them; None: the
    samples come without. ``counted`` [B, S] says which labels, the last S tokens, count in the loss; None: all do.
    """

    tokens: Tensor
    documents: Documents | None = None
    counted: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """All tokens but the last, [B, S]."""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> Tensor:
        """All tokens but the first, [B, S]; :data:`UNCOUNTED` in the place of one that does not count."""
        labels = self.tokens[:, 1:]
        return labels if self.counted is None else labels.masked_fill(~self.counted, UNCOUNTED)

    def split(self, size: int) -> list["Samples"]:
        """Micro-batches of ``size`` samples, in order."""
        tokens = self.tokens.split(size)
        nothing = [None] * len(tokens)
        counted = nothing if self.counted is None else self.counted.split(size)
        documents = nothing if self.documents is None else _split(self.documents, size)
        return [Samples(*each) for each in zip(tokens, documents, counted, strict=True)]


def documents_at(starts_BS: Tensor) -> Documents:
    """The documents of windows, from the place in its window where each token's document begins (int32 [B, S])."""
    places_S = torch.arange(starts_BS.shape[1], dtype=starts_BS.dtype, device=starts_BS.device)
    return documents_from_starts(starts_BS == places_S)


def _split(documents: Documents, size: int) -> list[Documents]:
    both = zip(documents.starts_BS.split(size), documents.ends_BS.split(size), strict=True)
    return [Documents(*each) for each in both]
