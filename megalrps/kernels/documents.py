"""Which tokens of a window belong together: attention sees no token of another document.

A window of S tokens holds documents, or parts of them, one after the other. For every token the first position of its
document in the window and the position after its last one are kept: what a kernel needs to know for a tile of rows.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch of windows: for token s of window b its document is ``starts_BS[b, s]`` on, up to and
    without ``ends_BS[b, s]``; both int32, contiguous, on the tokens' device.
    """

    starts_BS: Tensor  # noqa: N815
    ends_BS: Tensor  # noqa: N815

    def to(self, device: torch.device | str) -> "Documents":
        """The same on ``device``."""
        return Documents(self.starts_BS.to(device), self.ends_BS.to(device))

    @cached_property
    def positions(self) -> Tensor:
        """The place of each token in its document, int32 [B, S]: 0 for the first that lies in the window."""
        return self._places - self.starts_BS

    @cached_property
    def attended(self) -> Tensor:
        """Whether a query attends to a key, bool [B, 1, S, S]: the mask of a kernel that knows no documents."""
        place = self._places
        return ((place <= place[:, None]) & (place >= self.starts_BS[:, :, None])).unsqueeze(1)

    @cached_property
    def cumulative_lengths(self) -> Tensor:
        """Where the documents begin in the B*S tokens in order, and B*S: int32 [documents + 1].

        On a GPU the host waits for their number, the first time.
        """
        batch, length = self.starts_BS.shape
        first = (self.starts_BS == self._places).flatten().nonzero().flatten()
        return torch.cat((first, first.new_tensor([batch * length]))).int()

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document; on a GPU the host waits for it, the first time."""
        return int((self.ends_BS - self.starts_BS).max())

    @property
    def _places(self) -> Tensor:
        return torch.arange(self.starts_BS.shape[1], dtype=torch.int32, device=self.starts_BS.device)


def documents_of(cumulative_lengths: Tensor, batch: int, length: int) -> Documents:
    """The documents that begin at ``cumulative_lengths`` [n + 1] of the batch * length tokens in order.

    The first of the integers is 0 and the last batch * length; equal neighbours are an empty document. A document that
    passes the end of a window is cut there: its parts do not see one another. ValueError where the numbers do not fit.
    """
    tokens = batch * length
    if cumulative_lengths.dim() != 1 or len(cumulative_lengths) < 2 or cumulative_lengths.is_floating_point():
        raise ValueError(
            f"the cumulative lengths of documents are integers [documents + 1], "
            f"not {cumulative_lengths.dtype} {list(cumulative_lengths.shape)}"
        )
    first, last = int(cumulative_lengths[0]), int(cumulative_lengths[-1])
    if (first, last) != (0, tokens):
        raise ValueError(
            f"the cumulative lengths of documents go from {first} to {last}, and must go from 0 to {tokens}, "
            f"the tokens of {batch} windows of {length}"
        )
    falling = (cumulative_lengths.diff() < 0).nonzero()
    if len(falling):
        at = int(falling[0])
        raise ValueError(
            f"the cumulative lengths of documents fall from {int(cumulative_lengths[at])} to "
            f"{int(cumulative_lengths[at + 1])} at {at + 1}: a document cannot end before it begins"
        )
    is_start = torch.zeros(tokens + 1, dtype=torch.bool, device=cumulative_lengths.device)
    is_start[cumulative_lengths.long()] = True  # where only empty documents follow, that is beyond the last token
    return documents_from_starts(is_start[:-1].view(batch, length))


def documents_from_starts(is_start_BS: Tensor) -> Documents:
    """The documents whose first tokens are marked (bool [B, S]); what comes first in a window begins one in any case.

    ValueError for anything but a boolean matrix.
    """
    if is_start_BS.dtype != torch.bool or is_start_BS.dim() != 2:
        raise ValueError(
            f"the first tokens of documents are marked by a boolean [windows, tokens], "
            f"not {is_start_BS.dtype} {list(is_start_BS.shape)}"
        )
    length = is_start_BS.shape[1]
    place_S = torch.arange(length, dtype=torch.int32, device=is_start_BS.device)
    starts_BS = torch.where(is_start_BS, place_S, 0).cummax(1).values
    # The end of a token's document is the nearest start after the token: the least of those that lie there.
    next_BS = torch.where(is_start_BS, place_S, length).roll(-1, 1)
    next_BS[:, -1:] = length
    ends_BS = next_BS.flip(1).cummin(1).values.flip(1)
    return Documents(starts_BS.int().contiguous(), ends_BS.int().contiguous())
