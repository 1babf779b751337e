"""Texts of ragged length through a model, a batch of about one length at a time, results in the order of the texts."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# Tokens in a batch, padding included; a longer text has one of its own.
TOKENS_IN_BATCH = 16384
# What a tokenizer says that knows of no longest text is beyond this.
NO_BOUND = 10**9
# Folders that an error names.
SHOWN = 8


def existing(name: str) -> str:
    """
    The name of a model, in a folder or on the Hub.

    Raises:
        ValueError: It can only be a folder, and there is none.
    """
    path = Path(name)
    is_local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2
    if not path.exists() and (is_local or (len(path.parts) == 2 and path.parent.is_dir())):
        folders = (
            sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir()) if path.parent.is_dir() else []
        )
        there = f" {path.parent} has {', '.join(folders[:SHOWN])}." if folders else ""
        raise ValueError(f"There is no folder {name}.{there}")
    return name


def longest_input(config: PreTrainedConfig) -> int | None:
    """Tokens that a model takes at most; None without a bound."""
    if hasattr(config, "max_sequence_length"):
        return config.max_sequence_length
    return getattr(config, "max_position_embeddings", None)


def check_length(length: int, config: PreTrainedConfig, option: str = "context_length") -> None:
    """
    Raises:
        ValueError: A text of this many tokens is longer than the model's table of positions.
    """
    longest = longest_input(config)
    if longest is not None and length > longest:
        raise ValueError(
            f"{option} is {length:,}, but this model has a table of {longest:,} positions. Give at most that many "
            "tokens, so that longer texts are cut, or a model without a table (position_embedding_type='rotary')."
        )


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        ValueError: The tokenizer does not say from which characters a token is.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say from which characters a token is, so parts of a text have no "
            "tokens. Give another one with --tokenizer_name, or none for bytes."
        )


def encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: float | None, *, add_special_tokens: bool = True
) -> tuple[list[list[int]], int]:
    """
    The token ids of each text, and how many texts were cut.

    The name of a special token in a text, such as a typed "<pad>", is text.

    Args:
        length: Tokens that are kept of a text, special ones included; None for all.
    """
    rows = _encode(texts, tokenizer, add_special_tokens)
    return cut_long(texts, rows, tokenizer, length, add_special_tokens=add_special_tokens)


def cut_long(
    texts: Sequence[str],
    rows: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    length: float | None,
    *,
    add_special_tokens: bool = True,
) -> tuple[list[list[int]], int]:
    """As `encode`, of texts whose token ids are known: none but those that are too long is encoded again."""
    if length is None:
        return list(rows), 0
    long = [place for place, row in enumerate(rows) if len(row) > length]
    special = tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
    # A tokenizer without a bound says a number that no text reaches.
    how = {"truncation": True, "max_length": max(int(length), special + 1)}
    again = _encode([texts[place] for place in long], tokenizer, add_special_tokens, **how)
    shortened = list(rows)
    for place, row in zip(long, again, strict=True):
        shortened[place] = row
    return shortened, len(long)


def _encode(texts, tokenizer, add_special_tokens, **how):
    how = {"add_special_tokens": add_special_tokens, "split_special_tokens": True, "truncation": False} | how
    return [tokenizer(text, return_attention_mask=False, verbose=False, **how)["input_ids"] for text in texts]


def in_batches(lengths: Sequence[int], most: int = TOKENS_IN_BATCH) -> Iterator[list[int]]:
    """Rows of about one length, the longest first, so that memory runs out at once or not at all."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if rows and (len(rows) + 1) * lengths[rows[0]] > most:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def padded(ids: Sequence[Sequence[int]], pad_token_id: int | None, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, `[B, L]`, with padding behind."""
    rows = [torch.tensor(row) for row in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True, padding_value=pad_token_id or 0).to(device),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True).to(device),
    }


def through_model(
    model: PreTrainedModel,
    ids: Sequence[Sequence[int]],
    compute: Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor],
    **how,
) -> torch.Tensor:
    """What `compute` makes of each row, as one tensor, `[N, ...]`; see `each_through_model`."""
    return torch.stack(each_through_model(model, ids, compute, **how))


@torch.no_grad()
def each_through_model(
    model: PreTrainedModel,
    ids: Sequence[Sequence[int]],
    compute: Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor],
    *,
    pad_token_id: int | None,
    description: str,
    quiet: bool = False,
) -> list[torch.Tensor]:
    """
    What `compute` makes of each row, on the CPU; the bar shows tokens and the time left.

    Args:
        model: Is in evaluation mode meanwhile.
        ids: Of each row.
        compute: Takes the model and a batch, gives a tensor `[B, ...]`.
        description: What is done, for the bar.
        quiet: Show no bar.
    """
    lengths = [len(row) for row in ids]
    found: list[torch.Tensor | None] = [None] * len(ids)
    was_training = model.training
    model.eval()
    with tqdm(total=sum(lengths), unit="token", unit_scale=True, desc=description, disable=quiet) as bar:
        for rows in in_batches(lengths):
            batch = padded([ids[row] for row in rows], pad_token_id, model.device)
            for row, result in zip(rows, compute(model, batch).cpu(), strict=True):
                found[row] = result
            bar.update(sum(lengths[row] for row in rows))
    model.train(was_training)
    return [result for result in found if result is not None]
