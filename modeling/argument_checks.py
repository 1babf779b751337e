"""What a caller may get wrong in the arguments of a model, said before anything is computed with them."""

from collections.abc import Sequence

import torch


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
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    given = input_ids if inputs_embeds is None else inputs_embeds
    shape, size = tuple(given.shape[: len(dimensions)]), tuple(given.shape[len(dimensions) :])
    if len(shape) < len(dimensions) or size != (() if inputs_embeds is None else (hidden_size,)):
        names = ", ".join(dimensions)
        raise ValueError(
            f"`input_ids` must have shape [{names}] and `inputs_embeds` [{names}, hidden size {hidden_size}], but got "
            f"{list(given.shape)}."
        )
    if not shape[-1]:
        raise ValueError("The input has no tokens: a sequence needs at least one.")
    covered = (*shape[:-1], shape[-1] + past_length)
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


def check_labels(labels: torch.Tensor, expected: Sequence[int], name: str = "labels"):
    """Raise ValueError unless `labels` have the shape `expected`."""
    if tuple(labels.shape) != tuple(expected):
        raise ValueError(f"`{name}` must have shape {list(expected)}, but has {list(labels.shape)}.")


def check_num_hashes(num_hashes: int | None):
    """Raise ValueError unless a call's own number of hashing rounds is possible."""
    if num_hashes is not None and (not isinstance(num_hashes, int) or num_hashes < 1):
        raise ValueError(f"`num_hashes` must be an integer and at least 1, but got {num_hashes!r}.")
