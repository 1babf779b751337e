"""What a caller may get wrong in the arguments of a model, said before anything is computed with them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


# What collators and trainers add to rows of several documents: borders, lengths, and the number of each token's.
DOCUMENT_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
DOCUMENT_LENGTHS = ("max_length_q", "max_length_k", "seq_lengths")
DOCUMENT_NUMBERS = ("seq_idx", "document_ids", "segment_ids", "sequence_ids")
PACKING_ARGUMENTS = sorted((*DOCUMENT_BORDERS, *DOCUMENT_LENGTHS, *DOCUMENT_NUMBERS))
ONE_DOCUMENT_PER_ROW = (
    "The documents of a packed row would read each other here, with a cache or in a compiled program. Give each one a "
    "row of its own and pad: with `packing=False` and `padding_free=False` in TRL, with a collator that pads for "
    "`DataCollatorWithFlattening`."
)


def given_input(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """The one of both that is given; ValueError unless it is one."""
    given = [tensor for tensor in (input_ids, inputs_embeds) if tensor is not None]
    if len(given) != 1:
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    return given[0]


def check_is_one_stack(config):
    """Raise ValueError if a config is that of an encoder with a decoder."""
    if config.is_encoder_decoder:
        raise ValueError(
            "`is_encoder_decoder=True` is for `ReformerForConditionalGeneration`: all other models are one stack. "
            "Load the checkpoint by `AutoModelForSeq2SeqLM`, or leave the setting out."
        )


def check_inputs(
    hidden_size: int,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    dimensions: Sequence[str] = ("batch", "length"),
    past_length: int = 0,
):
    """
    Raise ValueError unless either ids or vectors are given, of shape `dimensions`, and the others fit them.

    Args:
        past_length: Tokens in a cache, which the attention mask covers too.
    """
    given = given_input(input_ids, inputs_embeds)
    shape, size = tuple(given.shape[: len(dimensions)]), tuple(given.shape[len(dimensions) :])
    if len(shape) < len(dimensions) or size != (() if inputs_embeds is None else (hidden_size,)):
        names = ", ".join(dimensions)
        raise ValueError(
            f"`input_ids` must have shape [{names}] and `inputs_embeds` [{names}, hidden size {hidden_size}], but got "
            f"{list(given.shape)}."
        )
    if not shape[-1]:
        raise ValueError("The input has no tokens: a sequence needs at least one.")
    if not all(shape):
        raise ValueError(f"The input, {list(given.shape)}, has no rows: a batch needs at least one. Leave it out.")
    covered = (*shape[:-1], shape[-1] + past_length)
    if attention_mask is not None and (not torch.is_tensor(attention_mask) or attention_mask.ndim > len(covered)):
        raise ValueError(
            f"`attention_mask` must be a tensor of shape {list(covered)}, 1 for real tokens and 0 for padding, but is "
            f"a {type(attention_mask).__name__} of shape {list(getattr(attention_mask, 'shape', []))}. Who attends to "
            f"whom cannot be chosen. {ONE_DOCUMENT_PER_ROW}"
        )
    if attention_mask is not None and attention_mask.shape != covered:
        of_what = f"with the {past_length} tokens in the cache " if past_length else ""
        raise ValueError(
            f"`attention_mask` must have the input's shape {of_what}{list(covered)}, but has "
            f"{list(attention_mask.shape)}."
        )
    if position_ids is not None and tuple(position_ids.shape) not in (shape, (1, *shape[1:])):
        raise ValueError(
            f"`position_ids` must have shape {list(shape)} or {[1, *shape[1:]]}, but has {list(position_ids.shape)}."
        )


def check_mask(attention_mask: torch.Tensor | None, may_number: bool):
    """Raise ValueError unless a mask is 0 and 1, in any dtype, or numbers documents where it may."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return
    if may_number and not attention_mask.is_floating_point():
        _demand(
            (attention_mask >= 0).all(),
            "attention_mask",
            attention_mask,
            "must be 0 for padding and 1 for real tokens, or number the documents of each row: 1, 1, 2, 2, 2, 0.",
            may_wait=True,
        )
        return
    advice = "Integers may number documents." if may_number else ONE_DOCUMENT_PER_ROW
    _demand(
        (attention_mask == attention_mask.bool()).all(),
        "attention_mask",
        attention_mask,
        "must be 1 for real tokens and 0 for padding. It is neither added to scores (0 and -inf) nor does it number "
        f"documents. {advice}",
        may_wait=attention_mask.is_floating_point(),
    )


def check_one_document_per_row(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    others: Mapping[str, Any],
    past_length: int = 0,
):
    """
    Raise ValueError where rows hold several documents: attention does not know where one ends.

    Args:
        attention_mask: `[B, past_length + L]`; 0 and 1 in any dtype.
        position_ids: `[B, L]` or `[1, L]`; each real token's must be larger than those of the ones before it, so that
            none is smaller than the number of those.
        others: Further keyword arguments of the call.
        past_length: Tokens in a cache.
    """
    given = [f"`{name}`" for name in PACKING_ARGUMENTS if others.get(name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: this model takes one document per row. {ONE_DOCUMENT_PER_ROW}")
    check_mask(attention_mask, may_number=False)
    if position_ids is not None and position_ids.shape[1] + past_length > 1:
        if attention_mask is None:
            attention_mask = torch.ones_like(position_ids[:, :1]).expand(-1, past_length + position_ids.shape[1])
        is_past, is_real = attention_mask[:, :past_length].bool(), attention_mask[:, past_length:].bool()
        # the smallest position that is left for the next token
        free = torch.where(is_real, position_ids + 1, 0)
        num_past = is_past.sum(1, keepdim=True)
        # The position that a text begins at is checked elsewhere.
        first = num_past.masked_fill(num_past == 0, torch.iinfo(torch.int64).min)
        free = torch.cat([first, free[:, :-1]], dim=1).cummax(dim=1).values
        _demand(
            (~is_real | (position_ids >= free)).all(),
            "position_ids",
            position_ids,
            f"must grow along each row, without starting again. {ONE_DOCUMENT_PER_ROW} Padding needs an "
            "`attention_mask`.",
            may_wait=True,
        )


def check_labels(
    labels: torch.Tensor,
    expected: Sequence[int],
    num_classes: int | None = None,
    name: str = "labels",
    ignore_index: int = -100,
):
    """Raise ValueError unless `labels` have the shape `expected` and, given `num_classes`, are classes or ignored."""
    if tuple(labels.shape) != tuple(expected):
        raise ValueError(f"`{name}` must have shape {list(expected)}, but has {list(labels.shape)}.")
    if num_classes is not None:
        _demand(
            (((labels >= 0) & (labels < num_classes)) | (labels == ignore_index)).all(),
            name,
            labels,
            f"must lie between 0 and {num_classes - 1}, or be {ignore_index} where they do not count.",
        )


def check_chances(labels: torch.Tensor):
    """Raise ValueError unless `labels` say of each of several classes how likely it holds."""
    _demand(
        ((labels >= 0) & (labels <= 1)).all(),
        "labels",
        labels,
        "must lie between 0 and 1, one for each class that may hold. For other numbers set "
        "`problem_type='regression'` in the config.",
    )


def check_answer(positions: torch.Tensor, batch: int, name: str):
    """Raise ValueError unless `positions` are the places of tokens; those beyond the input do not count."""
    check_labels(positions.flatten(), (batch,), name=name)
    _demand(
        (positions >= 0).all(),
        name,
        positions,
        "must not be negative. Without an answer give the first token's, 0, or one beyond the input, which does not "
        "count.",
    )


def check_num_hashes(num_hashes: int | None):
    """Raise ValueError unless a call's own number of hashing rounds is possible."""
    if num_hashes is not None and (not isinstance(num_hashes, int) or num_hashes < 1):
        raise ValueError(f"`num_hashes` must be an integer and at least 1, but got {num_hashes!r}.")


def _demand(holds: torch.Tensor, name: str, given: torch.Tensor, rule: str, may_wait: bool = False):
    """
    Raise ValueError unless `holds`: a scalar, whether the values of the argument `name` are what they must be.

    To ask makes a GPU wait, and a compiler cannot. There the device checks it, with an error of its own; but a GPU is
    asked if the call `may_wait`.
    """
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and differs_from_row_to_row(holds):
        return
    is_traced = is_compiling or isinstance(holds, FakeTensor) or holds.is_meta
    if is_traced or (holds.is_cuda and not may_wait):
        torch._assert_async(holds, f"`{name}` {rule}")
    elif not holds:
        raise ValueError(f"`{name}` holds values from {given.min()} to {given.max()}, but {rule}")


def differs_from_row_to_row(answer: torch.Tensor) -> bool:
    """Whether `torch.func.vmap` is at work, alone or below other transforms: then there is no one answer."""
    while torch._C._functorch.is_functorch_wrapped_tensor(answer):
        if torch._C._functorch.is_batchedtensor(answer):
            return True
        answer = torch._C._functorch.get_unwrapped(answer)
    return False
