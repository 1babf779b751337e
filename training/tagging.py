"""
Tags of units as rows for a model, what it finds as tags again, and how good that is.

Every token learns a tag: the first of a unit that of the unit, those behind it that they are inside. What the model
finds in a unit is what it says of its first token. A text longer than the context is cut into windows, and nothing of
it is lost.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from nervaluate import Evaluator
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import SGDClassifier
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .classification_figures import classification_figures
from .row_batches import check_offsets, each_through_model
from .tagged_texts import OUTSIDE, TaggedSides, TaggedTexts, are_of_spans


IGNORED = -100
# A token between units, such as a blank, and one that the tokenizer has added.
BETWEEN, SPECIAL = -1, -2
# Units that a figure is of at a time: spans are compared each with each.
UNITS_AT_ONCE = 200
# Units that a baseline learns from, and how many neighbours it looks at: words, or characters and each three of them.
MOST_UNITS, WORDS_AROUND, CHARACTERS_AROUND, AT_ONCE = 200_000, 2, 8, 3


@dataclass(frozen=True)
class Window:
    """
    Tokens of a text that a model reads at once.

    Attributes:
        ids: Special tokens around them included.
        text: The place of the text.
        units: The places of the units that begin here.
        columns: Where the first token of each stands in `ids`; units may share one.
        owners: For each token the place of its unit, or `BETWEEN`, or `SPECIAL`.
    """

    ids: list[int]
    text: int
    units: list[int]
    columns: list[int]
    owners: list[int]


def windows_of(texts: TaggedTexts, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Window]:
    """
    Texts as windows of at most `length` tokens.

    Raises:
        ValueError: The tokenizer does not say which characters a token is from.
    """
    check_offsets(tokenizer)
    return [window for place in range(len(texts)) for window in _windows_of_text(texts, place, tokenizer, length)]


def _windows_of_text(texts, place, tokenizer, length) -> Iterator[Window]:
    encoded = tokenizer(
        texts.texts[place],
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        split_special_tokens=True,
        verbose=False,
    )
    ids, is_special = np.asarray(encoded["input_ids"]), np.asarray(encoded["special_tokens_mask"], dtype=bool)
    content = np.flatnonzero(~is_special)
    first, behind = (content[0], content[-1] + 1) if len(content) else (len(ids), len(ids))
    before, tokens, after = ids[:first].tolist(), ids[first:behind].tolist(), ids[behind:].tolist()
    offsets = np.asarray(encoded["offset_mapping"]).reshape(-1, 2)[first:behind]
    places = _first_tokens(offsets, texts.units[place])
    owners = _owners(offsets, texts.units[place], places)
    step = max(1, length - len(before) - len(after))
    for begin in range(0, len(tokens), step):
        inside = [(unit, token) for unit, token in places if begin <= token < begin + step]
        yield Window(
            [*before, *tokens[begin : begin + step], *after],
            place,
            [unit for unit, _ in inside],
            [token - begin + len(before) for _, token in inside],
            [SPECIAL] * len(before) + owners[begin : begin + step] + [SPECIAL] * len(after),
        )


def _first_tokens(offsets, units) -> list[tuple[int, int]]:
    """Each unit with the token that holds its first character."""
    if not len(offsets):
        return []
    found = np.searchsorted(offsets[:, 0], [start for start, _ in units])
    places = []
    for unit, (token, (start, _)) in enumerate(zip(found.tolist(), units, strict=True)):
        if token == len(offsets) or offsets[token, 0] > start:
            token -= 1
        if token >= 0 and offsets[token, 1] > start:
            places.append((unit, token))
    return places


def _owners(offsets, units, places) -> list[int]:
    """For each token the unit in which it begins, or that begins in it."""
    if not units:
        return [BETWEEN] * len(offsets)
    starts, ends = np.asarray(units).T
    unit = np.searchsorted(starts, offsets[:, 0], side="right") - 1
    owners = np.where((unit >= 0) & (offsets[:, 0] < ends[unit]), unit, BETWEEN)
    # Of several that begin in a token the first.
    for begun, token in reversed(places):
        owners[token] = begun
    return owners.tolist()


def rows_of(windows: Sequence[Window], texts: TaggedTexts, names: Sequence[str]) -> Dataset:
    """`input_ids`, and `labels` with the id of each token's tag; of plain tags, what is between units has none."""
    number = {name: place for place, name in enumerate(names)}
    spans = are_of_spans(iter(names))
    labels = [
        [IGNORED if tag is None else number[tag] for tag in _tags_of_tokens(window, texts.tags[window.text], spans)]
        for window in windows
    ]
    return Dataset.from_dict({"input_ids": [window.ids for window in windows], "labels": labels})


def _tags_of_tokens(window, tags, spans) -> list[str | None]:
    begins, found = set(window.columns), []
    following = OUTSIDE
    for column in reversed(range(len(window.ids))):
        owner = window.owners[column]
        tag = None if owner < 0 else tags[owner]
        if spans and owner == BETWEEN:
            tag = following if following.startswith("I-") else OUTSIDE
        elif spans and tag is not None and column not in begins and tag != OUTSIDE:
            tag = f"I-{tag[2:]}"
        if tag is not None:
            following = tag
        found.append(tag)
    return found[::-1]


def find_tags(
    model: PreTrainedModel,
    windows: Sequence[Window],
    texts: TaggedTexts,
    names: Sequence[str],
    *,
    pad_token_id: int | None,
    quiet: bool = False,
) -> tuple[list[list[str]], list[list[float]]]:
    """The tag of each unit and its chance; of units that share a token, the first has what the others go on with."""
    best = each_through_model(
        model,
        [window.ids for window in windows],
        lambda model, batch: torch.stack(model(**batch).logits.float().softmax(-1).max(-1), dim=-1),
        pad_token_id=pad_token_id,
        description="tagging",
        quiet=quiet,
    )
    places, chances = ([rows[:, side].tolist() for rows in best] for side in (1, 0))
    return tags_at(windows, places, texts, names), _spread(windows, chances, texts, 0.0)


def tags_at(
    windows: Sequence[Window], numbers: Sequence[Sequence[float]], texts: TaggedTexts, names: Sequence[str]
) -> list[list[str]]:
    """
    The tag of each unit, which is that of its first token.

    Args:
        numbers: Of each window the number of each token's tag.
        names: Of the tags.
    """
    tags = _spread(windows, [[names[int(number)] for number in row] for row in numbers], texts, OUTSIDE)
    for window in windows:
        of_text = tags[window.text]
        # The label that a token begins goes on in its other units.
        for (_, before), (unit, column) in pairwise(zip(window.units, window.columns, strict=True)):
            if column == before and of_text[unit].startswith("B-"):
                of_text[unit] = f"I-{of_text[unit][2:]}"
    return tags


def _spread(windows, of_tokens, texts, missing):
    """What is known of each token as what is known of each unit, by its first token."""
    found = [[missing] * len(units) for units in texts.units]
    for window, row in zip(windows, of_tokens, strict=True):
        for unit, column in zip(window.units, window.columns, strict=True):
            found[window.text][unit] = row[column]
    return found


def tag_figures(given: Sequence[Sequence[str]], found: Sequence[Sequence[str]], spans: bool) -> dict[str, float]:
    """
    How good tags are.

    Args:
        given, found: Of each text.
        spans: They are those of spans. Then `f1`, `precision` and `recall` of spans that are right in both ends and
            the label, all labels together; otherwise `accuracy` and `macro_f1` of units.
    """
    if not spans:
        labels, predicted = ([tag for tags in part for tag in tags] for part in (given, found))
        return classification_figures(labels, predicted)
    strict = _evaluate(given, found)["overall"]["strict"]
    return {"f1": float(strict.f1), "precision": float(strict.precision), "recall": float(strict.recall)}


def figures_by_label(given: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 of the spans of each label."""
    return {label: float(kinds["strict"].f1) for label, kinds in _evaluate(given, found)["entities"].items()}


def _evaluate(given, found):
    labels = sorted({tag[2:] for part in (given, found) for tags in part for tag in tags if tag != OUTSIDE})
    parts = [part for pair in zip(given, found, strict=True) for part in _parts(*pair)]
    return Evaluator([part[0] for part in parts], [part[1] for part in parts], tags=labels, loader="list").evaluate()


def _parts(given, found) -> Iterator[tuple[list[str], list[str]]]:
    """A text in parts that no span crosses."""
    begin = 0
    for end in range(1, len(given) + 1):
        crosses = end < len(given) and any(
            tags[end].startswith("I-") and tags[end - 1][2:] == tags[end][2:] for tags in (given, found)
        )
        if end == len(given) or (end - begin >= UNITS_AT_ONCE and not crosses):
            yield list(given[begin:end]), list(found[begin:end])
            begin = end


def baselines(sides: TaggedSides) -> dict[str, dict[str, float]]:
    """
    The same figures of what takes no Reformer: logistic regression on the neighbours of a unit, and a table.

    The regression sees the words beside a unit and how they begin and end, or where units are characters, those beside
    it and each three in a row. The table knows the most frequent tag of each unit.
    """
    train, measured = sides.train, sides.measured
    all_words = [train.words(place) for place in range(len(train))]
    counts: dict[str, Counter] = defaultdict(Counter)
    for words, tags in zip(all_words, train.tags, strict=True):
        for word, tag in zip(words, tags, strict=True):
            counts[word][tag] += 1
    frequent = Counter(tag for tags in train.tags for tag in tags).most_common(1)[0][0]
    words_measured = [measured.words(place) for place in range(len(measured))]
    of_table = [
        [counts[word].most_common(1)[0][0] if word in counts else frequent for word in words]
        for words in words_measured
    ]
    figures = {
        f"the most frequent tag of each {train.kind[:-1]}": tag_figures(measured.tags, of_table, sides.has_spans)
    }
    around = WORDS_AROUND if train.kind == "words" else CHARACTERS_AROUND
    features, labels = _sample(all_words, train.tags, around)
    if len(set(labels)) < 2:
        return figures
    vectorizer = DictVectorizer(dtype=np.float32).fit(features)
    regression = SGDClassifier(loss="log_loss", alpha=1e-6, random_state=0)
    regression.fit(_matrix(vectorizer, features), labels)
    of_regression = [
        regression.predict(_matrix(vectorizer, _features(words, around))).tolist() if words else []
        for words in words_measured
    ]
    name = f"logistic regression on {around} {train.kind} on both sides"
    return {name: tag_figures(measured.tags, of_regression, sides.has_spans)} | figures


def _sample(all_words, tags, around):
    """Features and tags of some units: of all texts in a random order, of long ones a part."""
    generator = np.random.default_rng(0)
    most = max(1000, MOST_UNITS // len(all_words))
    features, labels = [], []
    for place in generator.permutation(len(all_words)):
        words = all_words[place]
        begin = int(generator.integers(0, max(1, len(words) - most + 1)))
        features += _features(words[begin : begin + most], around)
        labels += tags[place][begin : begin + most]
        if len(features) >= MOST_UNITS:
            break
    return features, labels


def _matrix(vectorizer, features):
    matrix = vectorizer.transform(features)
    # The regression takes no others.
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32)
    return matrix


def _features(words: Sequence[str], around: int) -> list[dict[str, str]]:
    padded = [*[""] * around, *words, *[""] * around]
    features = []
    for place in range(len(words)):
        seen = {str(offset): padded[place + around + offset] for offset in range(-around, around + 1)}
        if around == WORDS_AROUND:
            for offset in (-1, 0, 1):
                word = padded[place + around + offset]
                seen |= {f"{offset} begins": word[:3], f"{offset} ends": word[-3:]}
        else:
            for offset in range(-around, around - AT_ONCE + 2):
                begin = place + around + offset
                seen[f"{offset} and on"] = "".join(padded[begin : begin + AT_ONCE])
        features.append(seen)
    return features


def draw_labels(path: Path, of_labels: dict[str, float]) -> None:
    """Draw the F1 of each label as bars."""
    names = sorted(of_labels, key=lambda name: of_labels[name])
    figure = Figure(figsize=(6, max(2.0, 0.3 * len(names) + 1)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(names)), [of_labels[name] for name in names])
    axes.set_yticks(range(len(names)), [name if len(name) <= 24 else f"{name[:23]}…" for name in names])
    axes.set(xlabel="F1 of spans", xlim=(0, 1))
    axes.grid(alpha=0.2, axis="x")
    figure.savefig(path, dpi=120)
