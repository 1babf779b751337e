"""The documents of packed rows, as the layers see them: side by side, each from a chunk border on."""

from collections.abc import Callable
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


def attend_by_document(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_real: torch.Tensor,
    documents: tuple[Documents, Documents],
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention of each document by itself, so that nothing has the size of a row squared but a map that is asked for.

    Args:
        attend: Makes of one document's vectors, `[1, L, H, D]`, its output and its map or None.
        query, key, value: `[B, P, H, D]`, `[B, S, H, D]` twice.
        is_real: `[B, P]`, bool: which places have a query.
        documents: Of the queries, and of the keys that they read: as many in each row.

    Returns:
        Output `[B, P, H, D]`, and the map `[B, H, P, S]` or None.
    """
    outputs, weights = [], None
    if return_weights:
        weights = query.new_zeros(len(query), query.shape[2], query.shape[1], key.shape[1])
    spans = (each.spans for each in documents)
    for (row, start, length), (_, begin, size) in zip(*spans, strict=True):
        target, source = slice(start, start + length), slice(begin, begin + size)
        here = slice(row, row + 1)
        output, its_weights = attend(query[here, target], key[here, source], value[here, source])
        outputs.append(output[0])
        if weights is not None and its_weights is not None:
            weights[row, :, target, source] = its_weights[0]
    return torch.zeros_like(query).index_put(is_real.nonzero(as_tuple=True), torch.cat(outputs)), weights


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
