"""The documents of packed rows, as the layers see them: side by side, each from a chunk border on."""

from dataclasses import dataclass

import torch

from .movable import Movable
from .row_layout import RowLayout


# trf-ignore: TRF031 this goes into the layers, it is no output
@dataclass(frozen=True)
class Documents(Movable):
    """
    N documents in B rows of P places. A document's tokens are neighbours; masked places fill it up to a border.

    Attributes:
        number: `[B, P]`, int32: which document of its row, ascending from 1. Masked places that fill a document up
            belong to it; those behind the last one have a number of their own.
        position: `[B, P]`, places since the document began.
        row, start, length: `[N]`: where each document is, and how many tokens it has.
        spans: The same three numbers of each document.
        longest: Tokens of the longest.
    """

    number: torch.Tensor
    position: torch.Tensor
    row: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    spans: tuple[tuple[int, int, int], ...]
    longest: int

    def first_places(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `count` places of each document, `[N, count]`, and which of them have a token of it, bool."""
        offset = torch.arange(count, device=self.start.device)
        places = self.start[:, None] + offset
        return places.clamp(max=self.number.shape[1] - 1), offset < self.length[:, None]


def lay_out(numbers: torch.Tensor, alignment: int) -> tuple[RowLayout, torch.Tensor, Documents]:
    """
    Documents side by side, each beginning at a multiple of `alignment`.

    Args:
        numbers: `[B, L]`, integer: 0 for padding, else which document of the row, ascending from 1 without a gap.

    Returns:
        The layout, which places have a token, `[B, P]`, bool, and the documents.
    """
    batch, device = len(numbers), numbers.device
    is_real, most = numbers > 0, int(numbers.max())
    lengths = torch.zeros(batch, most + 1, dtype=torch.long, device=device)
    lengths = lengths.scatter_add(1, numbers.long(), torch.ones_like(numbers, dtype=torch.long))[:, 1:]
    ends = ((lengths + alignment - 1) // alignment * alignment).cumsum(1)
    starts = torch.nn.functional.pad(ends, (1, 0))[:, :-1]
    num_places = max(int(ends.max()), 1)
    row, index = lengths.nonzero(as_tuple=True)
    own = (numbers.long() - 1).clamp(min=0)
    before = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).gather(1, own)
    place = starts.gather(1, own) + is_real.long().cumsum(1) - 1 - before
    layout = RowLayout.of_places(torch.where(is_real, place, num_places), num_places)
    # Where a document begins, and behind the last one.
    marks = torch.zeros(batch, num_places + 1, dtype=torch.int32, device=device)
    marks[row, starts[row, index]] = 1
    marks.scatter_(1, ends[:, -1:], 1)
    number = marks[:, :-1].cumsum(1, dtype=torch.int32)
    borders = torch.where(marks[:, :-1] > 0, torch.arange(num_places, device=device), 0).cummax(1).values
    position = torch.arange(num_places, device=device) - borders
    in_documents = torch.nn.functional.pad(lengths, (1, 1)).gather(1, number.long().clamp(max=most + 1))
    found = row, starts[row, index], lengths[row, index]
    spans = tuple(zip(*(numbers.tolist() for numbers in found), strict=True))
    return layout, position < in_documents, Documents(number, position, *found, spans, int(lengths.max()))
