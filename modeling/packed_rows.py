"""Rows of several documents: the forms in which callers give them, brought into one."""

from collections.abc import Mapping
from math import lcm
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .argument_checks import (
    DOCUMENT_BORDERS,
    DOCUMENT_LENGTHS,
    DOCUMENT_NUMBERS,
    PACKING_ARGUMENTS,
    check_labels,
    check_mask,
    check_one_document_per_row,
    differs_from_row_to_row,
)
from .ops.documents import Documents, lay_out
from .ops.row_layout import RowLayout, into_rows


def documents_of_call(
    given: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    others: Mapping[str, Any],
    past_length: int | None = None,
) -> torch.Tensor | None:
    """
    `number_documents` of a call, where rows may hold several.

    A cache holds one text for each row. A compiler, `torch.export` and `torch.func.vmap` have no values to look at; a
    compiler stops for what says nothing else than where documents begin.

    Args:
        past_length: Tokens in a cache, or None without one.

    Raises:
        ValueError: There are several where there may not be.
    """
    if past_length is None and _can_be_looked_at(attention_mask, position_ids, others):
        return number_documents(given, attention_mask, position_ids, others)
    check_one_document_per_row(attention_mask, position_ids, others, past_length or 0)
    return None


def _can_be_looked_at(attention_mask, position_ids, others):
    named = [others[name] for name in PACKING_ARGUMENTS if others.get(name) is not None]
    if torch.compiler.is_compiling():
        return bool(named) and not torch.compiler.is_exporting()
    tensors = [given for given in (attention_mask, position_ids, *named) if torch.is_tensor(given)]
    return bool(named or tensors) and all(_has_values(tensor) for tensor in tensors)


def number_documents(
    given: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    others: Mapping[str, Any],
) -> torch.Tensor | None:
    """
    Which document of its row each token belongs to.

    Documents begin where position ids do not grow, where `seq_idx` or the numbers of an attention mask change, and at
    the borders of `cu_seq_lens_q` and `cu_seq_lens_k`, which count the tokens of all rows together, as
    `DataCollatorWithFlattening` and TRL give them. Several of these must agree.

    Args:
        given: `[B, L]` or `[B, L, size]`, the input.
        attention_mask: `[B, L]`, 0 for padding; other values number documents. None if every token is real.
        position_ids: `[B or 1, L]`, or None.
        others: Further keyword arguments of the call.

    Returns:
        `[B, L]`, 0 for padding, ascending from 1 in each row; None if each row holds one document.

    Raises:
        ValueError: What is given contradicts itself.
    """
    shape = given.shape[0], given.shape[1]
    check_mask(attention_mask, may_number=True)
    is_real = None if attention_mask is None else attention_mask.bool()
    numbers, found = _what_begins(shape, given.device, is_real, attention_mask, position_ids, others)
    first = _first_tokens(shape, is_real, given.device)
    found = {name: begins | first for name, begins in found.items()}
    # Asked together, so that a GPU waits once.
    several = torch.stack([(begins & ~first).any() for begins in found.values()]).tolist() if found else []
    packed = {name: begins for (name, begins), is_packed in zip(found.items(), several, strict=True) if is_packed}
    if not packed:
        return None
    name, begins = next(iter(packed.items()))
    # A mask of 0 and 1 says nothing about documents.
    silent = ["attention_mask"] if "attention_mask" not in packed else []
    for other, others_begin in found.items():
        if other not in silent and not torch.equal(others_begin, begins):
            raise ValueError(
                f"`{name}` and `{other}` say that documents begin at other tokens. Give one of them, or positions "
                "that start again with each document."
            )
    for name in packed.keys() & numbers.keys():
        _check_that_none_comes_again(name, numbers[name], begins)
    is_packed_row = (begins & ~first).any(1, keepdim=True)
    if position_ids is not None and bool((position_ids.expand(shape) * (begins & is_packed_row)).any()):
        raise ValueError(
            "`position_ids` start again in the middle of a row, but not from 0. Each document of a packed row has "
            "positions from 0 on."
        )
    counted = begins.long().cumsum(1)
    return counted if is_real is None else counted.masked_fill(~is_real, 0)


def _what_begins(shape, device, is_real, attention_mask, position_ids, others):
    """Two dictionaries by the name of the argument: each token's document number; where documents begin."""
    numbers = {}
    if attention_mask is not None and not attention_mask.is_floating_point() and attention_mask.dtype != torch.bool:
        numbers["attention_mask"] = attention_mask
    for name in (name for name in DOCUMENT_NUMBERS if others.get(name) is not None):
        of_tokens = torch.as_tensor(others[name], device=device)
        if tuple(of_tokens.shape) not in (shape, (1, shape[1])):
            raise ValueError(f"`{name}` must have shape {list(shape)}, but has {list(of_tokens.shape)}.")
        numbers[name] = of_tokens.expand(shape)
    found = {name: _changes(of_tokens, is_real) for name, of_tokens in numbers.items()}
    if position_ids is not None:
        found["position_ids"] = _changes(position_ids.expand(shape), is_real, grows=True)
    for name in (name for name in DOCUMENT_BORDERS if others.get(name) is not None):
        begins = _begins_at(torch.as_tensor(others[name], device=device), name, shape)
        # Where a border is on padding, the next real token begins.
        found[name] = begins if is_real is None else _changes(begins.long().cumsum(1), is_real)
    lengths = [f"`{name}`" for name in DOCUMENT_LENGTHS if others.get(name) is not None]
    if lengths and not found.keys() - {"attention_mask"}:
        raise ValueError(
            f"{', '.join(lengths)}: which tokens are whose is not said. Give `position_ids` that start again with "
            "each document, or `seq_idx`."
        )
    return numbers, found


def _has_values(tensor):
    return not tensor.is_meta and not isinstance(tensor, FakeTensor) and not differs_from_row_to_row(tensor)


def _changes(values, is_real, grows=False):
    """Where a real token's value differs from that of the real token before it, or with `grows` is no larger."""
    before = values[:, :-1]
    if is_real is not None:
        # Of the last real token so far; what stands before the first one does not count.
        index = torch.where(is_real, torch.arange(values.shape[1], device=values.device), 0).cummax(1).values
        before = values.gather(1, index)[:, :-1]
    differs = values[:, 1:] <= before if grows else values[:, 1:] != before
    differs = torch.nn.functional.pad(differs, (1, 0))
    return differs if is_real is None else differs & is_real


def _check_that_none_comes_again(name, numbers, begins):
    ordered = torch.where(begins, numbers.long(), -1).sort(dim=1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise ValueError(
            f"`{name}` numbers a document that comes again behind another. The tokens of a document are neighbours, "
            "and each document has a number of its own."
        )


def _begins_at(borders, name, shape):
    num_tokens = shape[0] * shape[1]
    flat = borders.flatten().long()
    if not len(flat) or flat[0] != 0 or flat[-1] != num_tokens or bool((flat[1:] < flat[:-1]).any()):
        raise ValueError(
            f"`{name}` must lead from 0 to {num_tokens}, the tokens of all rows, without going back, but is "
            f"{flat.tolist()}."
        )
    begins = torch.zeros(num_tokens + 1, dtype=torch.bool, device=borders.device)
    begins[flat] = True
    return begins[:-1].view(shape)


def _first_tokens(shape, is_real, device):
    """`[B, L]`, bool: each row's first real token."""
    if is_real is None:
        return torch.arange(shape[1], device=device).expand(shape) == 0
    return is_real & (is_real.long().cumsum(1) == 1)


def alignment_of(config) -> int:
    """Documents begin at multiples of this, so that chunks are those of each document alone."""
    lengths = {
        "local": config.local_attn_chunk_length,
        # CODEPATH: published checkpoints have chunks; windows, which need no borders, are for new models.
        "lsh": 1 if config.lsh_sliding_window else config.lsh_attn_chunk_length,
        "full": 1,
    }
    return lcm(*(lengths[kind] for kind in config.attn_layers))


class Rows(NamedTuple):
    """
    What the layers are given of the rows of a call.

    Attributes:
        layout: Where the caller's tokens stand, or None if they stay where they are.
        attention_mask: `[B, P]`, bool, or None if every place has a real token.
        position_ids: `[B or 1, P]`, or None to count from 0.
        documents: The documents of each row, or None if a row is one.
    """

    layout: RowLayout | None
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    documents: Documents | None

    @property
    def longest(self) -> int | None:
        """Tokens of the longest document, where rows hold several."""
        return None if self.documents is None else self.documents.longest


def arrange_rows(
    config,
    given: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    others: Mapping[str, Any],
    past_length: int | None,
) -> Rows:
    """
    Documents, or the real tokens of a row, side by side from the front on; what continues a text stays where it is.

    Arguments and errors are those of `documents_of_call`; the mask covers what is in the cache, too.
    """
    numbers = documents_of_call(given, attention_mask, position_ids, others, past_length)
    if numbers is not None:
        layout, is_real, documents = lay_out(numbers, alignment_of(config))
        # What fills up has a position that there is.
        position_ids = documents.position * is_real if position_ids is None else layout.into(position_ids)
        return Rows(layout, is_real, position_ids, documents)
    if attention_mask is None:
        return Rows(None, None, position_ids, None)
    attention_mask = attention_mask[:, past_length or 0 :].bool()
    if past_length:
        return Rows(None, attention_mask, position_ids, None)
    layout = RowLayout.of_mask(attention_mask)
    return Rows(layout, layout.into(attention_mask), into_rows(layout, position_ids), None)


def labels_of_call(
    labels: torch.Tensor,
    given: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    others: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """
    `shift_labels` for the loss, where the next column is not always the next token of the text, else nothing.

    Args:
        labels: `[B, L]`.
        given, attention_mask, position_ids, others: See `documents_of_call`.
    """
    numbers = documents_of_call(given, attention_mask, position_ids, others)
    is_real = attention_mask if numbers is None else numbers
    if is_real is None:
        return {}
    check_labels(labels, given.shape[:2])
    labels, is_real = labels.to(given.device), is_real.bool()
    return {"shift_labels": labels_of_next_tokens(labels, is_real, numbers, others.get("ignore_index", -100))}


def labels_of_next_tokens(
    labels: torch.Tensor, is_real: torch.Tensor, numbers: torch.Tensor | None = None, ignore_index: int = -100
) -> torch.Tensor:
    """
    At each token the label of the next one, passing over padding between real tokens.

    Args:
        labels: `[B, L]`.
        is_real: `[B, L]`, bool.
        numbers: See `number_documents`; what is of no document, or the last of its own, then has no label.
    """
    # Padding in front and behind is left as transformers shifts it, and as the Trainer counts it.
    num_real = is_real.cumsum(1)
    is_gap = ~is_real & (num_real > 0) & (num_real < num_real[:, -1:])
    layout = RowLayout.of_mask(~is_gap)
    labels, token = layout.into(labels), layout.source
    follows = token[:, 1:] > token[:, :-1]
    if numbers is not None:
        numbers = layout.into(numbers)
        follows = follows & (numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] > 0)
    following = labels[:, 1:].masked_fill(~follows, ignore_index)
    following = torch.nn.functional.pad(following, (0, 1), value=ignore_index)
    return layout.back(following).masked_fill(~layout.has_place, ignore_index)
