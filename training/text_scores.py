"""How well a causal model predicts each text by itself: bits per byte, so that odd ones stand out."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tokenization.tokenization_reformer_byte import ReformerByteTokenizer
from .compression import bits_per_byte
from .row_batches import encode, through_model


# Tokens whose logits are turned into chances at a time.
PIECE = 4096


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    context_length: int | None = None,
    quiet: bool = False,
) -> dict[str, list]:
    """
    Columns of scores, a row for each text.

    A text stands behind an end of text, as in training, so that its first token is predicted, too. It is read by
    itself: none sees another.

    Args:
        model: Causal.
        tokenizer: With an end-of-text token.
        context_length: Tokens that are read of a text; None for all.
        quiet: Show no bar.

    Returns:
        `bits_per_byte` of what was read, `mean_log_likelihood` of a token in nats, `tokens` that were read and
        `bytes` that they stand for.

    Raises:
        ValueError: The tokenizer has no token to stand in front.
    """
    first = _token_in_front(tokenizer)
    ids, _ = encode(texts, tokenizer, context_length, add_special_tokens=False)
    nats = through_model(
        model,
        [[first, *row] for row in ids],
        nats_of_rows,
        pad_token_id=tokenizer.pad_token_id,
        description="scoring",
        quiet=quiet,
    ).tolist()
    # A tokenizer may have no token for a text of odd characters.
    num_tokens = [max(len(row), 1) for row in ids]
    num_bytes = [
        _bytes_read(text, len(row), tokenizer, row, context_length) for text, row in zip(texts, ids, strict=True)
    ]
    return {
        "bits_per_byte": [
            bits_per_byte(of_text / tokens, tokens / max(read, 1))
            for of_text, tokens, read in zip(nats, num_tokens, num_bytes, strict=True)
        ],
        "mean_log_likelihood": [-of_text / tokens for of_text, tokens in zip(nats, num_tokens, strict=True)],
        "tokens": num_tokens,
        "bytes": num_bytes,
    }


def _token_in_front(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return token
    raise ValueError(
        f"{type(tokenizer).__name__} has no eos_token, bos_token or sep_token to stand in front of a text."
    )


def _bytes_read(text: str, tokens: int, tokenizer: PreTrainedTokenizerBase, row: Sequence[int], length) -> int:
    """Bytes of what was read of a text: all of it, unless it may have been cut."""
    if isinstance(tokenizer, ReformerByteTokenizer):
        return tokens
    part = text if length is None or tokens < length else str(tokenizer.decode(list(row)))
    return len(part.encode("utf-8", "surrogatepass"))


def nats_of_rows(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What all tokens of each row but the first cost, float64, `[B]`."""
    logits, targets = model(**batch).logits[:, :-1], batch["input_ids"][:, 1:]
    is_real, nats = batch["attention_mask"][:, 1:].bool(), torch.zeros(len(logits), dtype=torch.float64)
    for begin in range(0, targets.shape[1], PIECE):
        here = slice(begin, begin + PIECE)
        chances = logits[:, here].float().log_softmax(-1)
        of_tokens = -chances.gather(-1, targets[:, here, None])[..., 0]
        nats += of_tokens.masked_fill(~is_real[:, here], 0).double().sum(1).cpu()
    return nats


def oddest(bits: Sequence[float], count: int) -> list[int]:
    """Places of the texts that cost most per byte, the oddest first."""
    return np.argsort(-np.asarray(bits), kind="stable")[:count].tolist()
