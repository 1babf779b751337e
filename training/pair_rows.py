"""Pairs of texts as rows for an encoder and a decoder, what the targets cost, and what a model writes for a source."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .compression import reference_figures
from .corpus import end_of_text_of, tokens_and_widths
from .packing import IGNORED
from .pairs import Pairs
from .row_batches import encode, in_batches, padded
from .tables import have_blanks


BITS, EXACT = "bits_per_target_byte", "exact"
# Of TF-IDF.
MOST_FEATURES = 100_000


@dataclass(frozen=True)
class PairRows:
    """
    Pairs as token ids.

    Attributes:
        sources: Of each pair, cut.
        targets: Of each pair, cut, with an end of text.
        whole: The targets that were not cut, without the end of text; None for those that were.
        num_bytes: Bytes of text in all targets as they were cut.
        cut_sources, cut_targets: How many were cut.
    """

    sources: list[list[int]]
    targets: list[list[int]]
    whole: list[list[int] | None]
    num_bytes: int
    cut_sources: int
    cut_targets: int

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pair."""
        return [len(source) + len(target) for source, target in zip(self.sources, self.targets, strict=True)]

    @property
    def dataset(self) -> Dataset:
        """Rows of `input_ids` and `labels`, as `DataCollatorForSeq2Seq` takes them."""
        return Dataset.from_dict({"input_ids": self.sources, "labels": self.targets})


def rows_of_pairs(
    pairs: Pairs, tokenizer: PreTrainedTokenizerBase, source_length: int | None, target_length: int | None
) -> PairRows:
    """
    Token ids of pairs.

    Args:
        source_length: Tokens that are kept of a source; None for all.
        target_length: The same of a target, the end of text included.

    Raises:
        ValueError: The tokenizer has no end-of-text token, or does not say which bytes a token stands for.
    """
    end = end_of_text_of(tokenizer)
    sources, cut_sources = encode(pairs.sources, tokenizer, source_length)
    targets: list[list[int]] = []
    whole: list[list[int] | None] = []
    num_bytes = 0
    for text in pairs.targets:
        tokens, widths = tokens_and_widths(text, tokenizer, end)
        kept = len(tokens) - 1 if target_length is None else min(len(tokens), target_length) - 1
        ids = tokens[:kept].tolist()
        targets.append([*ids, end])
        whole.append(ids if kept == len(tokens) - 1 else None)
        num_bytes += int(widths[:kept].sum())
    return PairRows(sources, targets, whole, num_bytes, cut_sources, sum(ids is None for ids in whole))


def nats_of_targets(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What the labels of each row cost, and how many count, float32, `[B, 2]`."""
    counts = labels != IGNORED
    chances = logits.float().log_softmax(-1)
    nats = -chances.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.stack([nats.masked_fill(~counts, 0).sum(1), counts.sum(1).float()], dim=1)


def bits_of(nats: np.ndarray, num_bytes: int) -> float:
    """Bits per byte of text; its tokens, ends of text included, cost so many nats together."""
    return float(np.asarray(nats, np.float64).sum()) / math.log(2) / max(num_bytes, 1)


@torch.no_grad()
def bits_per_target_byte(model: PreTrainedModel, rows: PairRows, pad_token_id: int | None, *, quiet: bool) -> float:
    """What a model spends on a byte of the targets, an end of text for each included."""
    nats = []
    for places in _batches(model, rows.lengths, "measuring", quiet):
        batch = padded([rows.sources[place] for place in places], pad_token_id, model.device)
        targets = [torch.tensor(rows.targets[place]) for place in places]
        labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED).to(model.device)
        nats.append(nats_of_targets(model(**batch, labels=labels).logits, labels)[:, 0].double().cpu().numpy())
    return bits_of(np.concatenate(nats), rows.num_bytes)


@torch.no_grad()
def written(
    model: PreTrainedModel,
    sources: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    target_length: int,
    *,
    quiet: bool = False,
) -> list[list[int]]:
    """
    What a model writes for each source, always with the likeliest token, without its end of text.

    Args:
        sources: Token ids.
        target_length: Tokens after which it stops, the end of text included.
    """
    end = end_of_text_of(tokenizer)
    found: list[list[int]] = [[] for _ in sources]
    # Its type is not known of the base class.
    generate: Any = model.generate
    for places in _batches(model, [len(source) + target_length for source in sources], "writing", quiet):
        batch = padded([sources[place] for place in places], tokenizer.pad_token_id, model.device)
        outputs = generate(**batch, max_new_tokens=target_length, do_sample=False, num_beams=1, eos_token_id=end)
        # In front stands the token that the decoder starts with.
        for place, ids in zip(places, outputs[:, 1:].tolist(), strict=True):
            found[place] = before_end(ids, end)
    return found


def before_end(ids: list[int], end: int) -> list[int]:
    """What a model wrote, without its end of text and what fills the row behind it."""
    return ids[: ids.index(end)] if end in ids else ids


def _batches(model: PreTrainedModel, lengths: Sequence[int], description: str, quiet: bool) -> Iterator[list[int]]:
    """Places of pairs of about one length, with the model in evaluation mode and a bar."""
    was_training = model.training
    model.eval()
    with tqdm(total=len(lengths), unit="pair", desc=description, disable=quiet) as bar:
        for places in in_batches(lengths):
            yield places
            bar.update(len(places))
    model.train(was_training)


def evenly_spaced(count: int, most: int) -> list[int]:
    """Places of at most `most` among `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def baselines_of_pairs(train: Pairs, measured: Pairs, places: Sequence[int]) -> dict[str, dict[str, float]]:
    """
    Figures of what takes no Reformer.

    Args:
        places: Of the measured pairs whose targets are written.

    Returns:
        Of `lzma` and order-2 entropies the bits per byte of the measured targets; of the target whose source is most
        like the one that is read, by TF-IDF, the share of exact ones.
    """
    found: dict[str, dict[str, float]] = {}
    data = "".join(measured.targets).encode("utf-8", "surrogatepass")
    if len(data) > 2:
        references = reference_figures(data)
        found |= {f"{name} of the targets alone": {BITS: references[name]} for name in ("lzma", "order-2")}
    how = {"token_pattern": r"(?u)\w+"} if have_blanks(train.sources) else {"analyzer": "char", "ngram_range": (1, 5)}
    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=MOST_FEATURES, **how)
    try:
        known = vectorizer.fit_transform(train.sources)
    except ValueError:
        # There is no word in them.
        return found
    likeness = vectorizer.transform([measured.sources[place] for place in places]) @ known.T
    nearest = [int(row.toarray().argmax()) for row in likeness]
    right = [train.targets[near] == measured.targets[place] for near, place in zip(nearest, places, strict=True)]
    return found | {"target of the most similar source": {EXACT: sum(right) / len(right)}}
