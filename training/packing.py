"""Documents of many lengths in rows of one: which goes where, and batches of such rows."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


IGNORED = -100


def best_fit(lengths: Sequence[int], room: int, alignment: int = 1) -> list[list[int]]:
    """
    Documents in rows, the longest first, each in the row where it leaves the least room (best-fit decreasing).

    Args:
        lengths: Tokens of each document.
        room: Tokens that a row takes.
        alignment: Documents begin at multiples of this, so what they take is rounded up to it.

    Returns:
        The documents of each row, by number.

    Raises:
        ValueError: A document is longer than a row.
    """
    if room < 1 or alignment < 1:
        raise ValueError(f"room is {room} and alignment is {alignment}; both must be at least 1.")
    rows: list[list[int]] = []
    # What is left in each row, with the row, ascending.
    left: list[tuple[int, int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        if length > room:
            raise ValueError(
                f"Document {number} has {length:,} tokens, a row takes {room:,}. Cut it, or take longer rows."
            )
        index = bisect_left(left, (length, 0))
        row, space = (len(rows), room) if index == len(left) else left.pop(index)[::-1]
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        taken = (length + alignment - 1) // alignment * alignment
        insort(left, (max(0, space - taken), row))
    return rows


@dataclass
class DataCollatorForPacking:
    """
    Packs examples of any lengths into few rows, for a model that keeps documents apart.

    Documents are put where they leave the least room. A batch has `input_ids`, `labels`, `position_ids` that start
    again with each document, and an `attention_mask` that numbers them, 0 for padding. The first label of a document
    does not count, because nothing in it predicts that token.

    Args:
        context_length: Tokens in a row.
        alignment: Of the model (`modeling.packed_rows.alignment_of(config)`), to count what a row takes inside it.
        pad_token_id: What fills a row up; it is masked.
        pad_to_context: Rows of exactly `context_length`, instead of the longest of the batch.

    Example:

    >>> from hf_reformer.training import DataCollatorForPacking
    >>> batch = DataCollatorForPacking(context_length=8)([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 5, 6, 7]}])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[8, 9, 5, 6, 7, 5, 6, 7]], [[1, 1, 1, 1, 1, 2, 2, 2]])
    """

    context_length: int
    alignment: int = 1
    pad_token_id: int = 0
    pad_to_context: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples: Each with `input_ids` and, unless every token is one, `labels`.

        Raises:
            ValueError: An example has no tokens, or more than a row takes.
        """
        if not examples:
            raise ValueError("There are no examples to pack.")
        ids = [_real_tokens(example, example["input_ids"]) for example in examples]
        if not all(map(len, ids)):
            raise ValueError(f"Example {[len(tokens) for tokens in ids].index(0)} has no tokens; leave it out.")
        labels = [_real_tokens(example, example.get("labels", example["input_ids"])) for example in examples]
        for number, (tokens, own) in enumerate(zip(ids, labels, strict=True)):
            if len(tokens) != len(own):
                raise ValueError(f"Example {number} has {len(tokens)} tokens, but {len(own)} labels.")
        rows = best_fit([len(tokens) for tokens in ids], self.context_length, self.alignment)
        length = max(sum(len(ids[number]) for number in row) for row in rows)
        length = self.context_length if self.pad_to_context else length
        batch = {
            name: torch.full((len(rows), length), filled_up_with)
            for name, filled_up_with in (
                ("input_ids", self.pad_token_id),
                ("labels", IGNORED),
                ("position_ids", 0),
                ("attention_mask", 0),
            )
        }
        for row, documents in enumerate(rows):
            start = 0
            for place, number in enumerate(documents, start=1):
                where = row, slice(start, start + len(ids[number]))
                batch["input_ids"][where], batch["labels"][where] = ids[number], labels[number]
                batch["position_ids"][where] = torch.arange(len(ids[number]))
                batch["attention_mask"][where] = place
                batch["labels"][row, start] = IGNORED
                start = where[1].stop
        return batch


@dataclass
class TextPacker:
    """
    Batches of texts with labels in as few rows as they need, for a model that keeps documents apart.

    A batch has what `DataCollatorForPacking` makes. Labels of tokens stand where their tokens do; a label of a text
    stands in the order in which the model's heads give vectors of documents: row by row.

    Args:
        context_length, alignment, pad_token_id: As of `DataCollatorForPacking`.
    """

    context_length: int
    alignment: int = 1
    pad_token_id: int = 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples: Each with `input_ids` and `labels`, one for each token or one for all.
        """
        ids = [torch.as_tensor(example["input_ids"]) for example in examples]
        labels = [torch.as_tensor(example["labels"]) for example in examples]
        rows = best_fit([len(tokens) for tokens in ids], self.context_length, self.alignment)
        numbers = [torch.cat([torch.full_like(ids[n], place) for place, n in enumerate(row, start=1)]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence

        def in_rows(of_texts, filled_up_with):
            joined = [torch.cat([of_texts[number] for number in row]) for row in rows]
            return pad(joined, batch_first=True, padding_value=filled_up_with)

        of_tokens = labels[0].ndim > 0
        return {
            "input_ids": in_rows(ids, self.pad_token_id),
            "position_ids": in_rows([torch.arange(len(tokens)) for tokens in ids], 0),
            "attention_mask": pad(numbers, batch_first=True),
            "labels": in_rows(labels, IGNORED) if of_tokens else torch.stack([labels[n] for row in rows for n in row]),
        }


def _real_tokens(example: Mapping[str, Any], values: Any) -> torch.Tensor:
    """`values` of an example where its mask, if it has one, is not 0."""
    tokens = torch.as_tensor(values).flatten()
    mask = example.get("attention_mask")
    return tokens if mask is None else tokens[torch.as_tensor(mask).flatten().bool()]
