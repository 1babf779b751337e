"""Texts with labels: what a table must hold, and which texts are held out."""

import hashlib
import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from datasets import Dataset

from .held_out import SplitRows, TaskDataArguments, TextRows, hash_of, warn_of_copies
from .tables import column_of, excerpt, is_missing, read_table, texts_of


# More different numbers than this are a quantity, and more different labels of which most texts share none are names.
MOST_NUMBERS, FEW_LABELS = 50, 20
NAMED = 5
SIDE_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "held_out",
    "validation": "held_out",
    "val": "held_out",
    "dev": "held_out",
    "test": "test",
}


@dataclass
class LabelledDataArguments(TaskDataArguments):
    """Where texts and labels come from, and which of them are held out."""

    held_out_of = "the texts of each label"

    data: str | None = field(
        default=None,
        metadata={
            "help": "csv, tsv, json, jsonl, parquet, or a folder that has a folder of text files for each label."
        },
    )
    text_column: str = field(default="text", metadata={"help": "The column of the texts."})
    label_column: str = field(default="label", metadata={"help": "The column of the labels."})
    split_column: str | None = field(
        default=None, metadata={"help": "A column of data that says train, validation or test for each row."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.split_column and (self.validation_data or self.test_data):
            raise ValueError(
                f"split_column ({self.split_column}) says which rows are held out, and so do validation_data and "
                "test_data; give one or the others."
            )

    @property
    def how(self) -> str:
        """One line for a person: how it is parted."""
        return f"column {self.split_column!r} says which side a text is on" if self.split_column else super().how


@dataclass(frozen=True)
class LabelledTexts(TextRows):
    """Texts, the label of each, and the row of its file that it is from, counted from 0."""

    texts: list[str]
    labels: list[str]
    rows: list[int]

    @cached_property
    def digest(self) -> str:
        """A short name for these texts and labels in this order."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line for a person."""
        counts = Counter(self.labels).most_common()
        named = ", ".join(f"{excerpt(label, 30)} {count:,}" for label, count in counts[:NAMED])
        others = f", and {len(counts) - NAMED} other labels" if len(counts) > NAMED else ""
        return f"{len(self):,} texts ({named}{others})"


class LabelledSides(SplitRows[LabelledTexts]):
    """Texts with labels for training, held out, and perhaps for a test."""

    @property
    def names(self) -> list[str]:
        """The labels, in the order of their ids: numbers by value, others by name."""
        return sorted(set(self.train.labels), key=_by_value)


def read_labelled(arguments: LabelledDataArguments) -> LabelledSides:
    """
    Read, check and split.

    Raises:
        ValueError: Something is missing, or the labels are none.
    """
    if arguments.data is None:
        raise ValueError(
            "Name a file with --data: csv, json, jsonl, parquet, or a folder with a folder for each label."
        )
    table = read_table(arguments.data)
    everything = _labelled(table, arguments.data, arguments)
    if arguments.split_column:
        sides = _by_column(table, everything, arguments)
    elif arguments.validation_data:
        held_out = _labelled(read_table(arguments.validation_data), arguments.validation_data, arguments)
        sides = {"train": everything, "held_out": held_out}
    else:
        check_labels(everything.labels, arguments.label_column)
        sides = split_labelled(everything, arguments.held_out_fraction)
        warn_of_single_texts(everything.labels)
    if arguments.test_data:
        sides["test"] = _labelled(read_table(arguments.test_data), arguments.test_data, arguments)
    check_labels(sides["train"].labels, arguments.label_column)
    known = set(sides["train"].labels)
    for name, side in sides.items():
        if unknown := sorted(set(side.labels) - known):
            raise ValueError(
                f"The {name.replace('_', '-')} texts have labels that no training text has: {_listed(unknown)}. Leave "
                "them out, or put texts of them into the training data."
            )
    warn_of_copies(
        sides["train"].texts, {name.replace("_", "-"): side.texts for name, side in sides.items() if name != "train"}
    )
    return LabelledSides(sides["train"], sides["held_out"], sides.get("test"), arguments.how)


def _labelled(table: Dataset, source: str, arguments: LabelledDataArguments) -> LabelledTexts:
    """The texts and labels of a table; refuses rows without one of them unless they shall be left out."""
    texts, rows = texts_of(table, arguments.text_column, source, drop=arguments.drop_incomplete)
    labels = column_of(table, arguments.label_column, "label_column", source)
    missing = [row for row in rows if is_missing(labels[row])]
    if missing and not arguments.drop_incomplete:
        raise ValueError(
            f"{len(missing):,} of the {len(labels):,} rows of {source} have no label in column "
            f"{arguments.label_column!r} (the first is row {missing[0] + 1}). Fill them in, or leave them out with "
            "--drop_incomplete True."
        )
    left_out = set(missing)
    kept = [place for place, row in enumerate(rows) if row not in left_out]
    if not kept:
        raise ValueError(f"No row of {source} has a text and a label.")
    return LabelledTexts(
        [texts[place] for place in kept],
        [_as_name(labels[rows[place]], arguments.label_column) for place in kept],
        [rows[place] for place in kept],
    )


def _as_name(label: Any, column: str) -> str:
    """A label as text: what stands in a file, but no 1.0 where somebody wrote 1."""
    if isinstance(label, list | dict):
        raise ValueError(
            f"Column {column!r} holds {label!r}: several labels for one text. A text has one; give a column that has "
            "one label for each row."
        )
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip()


def check_labels(labels: Sequence[str], column: str) -> None:
    """
    Refuse labels that are none.

    Args:
        labels: Of the texts.
        column: What they are from.

    Raises:
        ValueError: There is one label only, or they look like a quantity or like names of the texts.
    """
    counts = Counter(labels)
    if len(counts) == 1:
        raise ValueError(
            f"All {len(labels):,} texts have the label {labels[0]!r}, so there is nothing to tell apart. Give texts "
            "of at least two labels."
        )
    numbers = [value for value in map(_number, counts) if value is not None]
    are_numbers = len(numbers) == len(counts)
    broken = [label for label in counts if not float(label).is_integer()] if are_numbers else []
    if are_numbers and (len(counts) > MOST_NUMBERS or (broken and len(counts) > FEW_LABELS)):
        raise ValueError(
            f"Column {column!r} looks like a quantity: {len(counts):,} different numbers, such as "
            f"{_listed(list(counts))}. classify takes classes. Make some of it, such as low, middle and high, or name "
            "another column with --label_column."
        )
    alone = [label for label, count in counts.items() if count == 1]
    if len(counts) > FEW_LABELS and len(alone) > len(counts) / 2:
        raise ValueError(
            f"{len(alone):,} of the {len(counts):,} labels in column {column!r} appear once, such as "
            f"{_listed(alone)}: they name texts and are no classes. Name another column with --label_column."
        )


def warn_of_single_texts(labels: Sequence[str]) -> None:
    """Say which labels one text alone has."""
    alone = [label for label, count in Counter(labels).items() if count == 1]
    if alone:
        warnings.warn(
            f"{len(alone):,} labels appear once: {_listed(alone)}. Their texts are trained on, and none can be held "
            "out.",
            stacklevel=2,
        )


def split_labelled(everything: LabelledTexts, fraction: float) -> dict[str, LabelledTexts]:
    """
    Hold out a share of the texts of each label, chosen by a hash of the text.

    So copies of a text are on one side, and a text stays there when others are added in moderation. Of each label with
    two texts one is held out, and one is not.

    Raises:
        ValueError: No text can be held out.
    """
    of_label: dict[str, dict[str, None]] = defaultdict(dict)
    label_of: dict[str, str] = {}
    for text, label in zip(everything.texts, everything.labels, strict=True):
        of_label[label_of.setdefault(text, label)][text] = None
    held_out: set[str] = set()
    for texts in of_label.values():
        count = min(max(round(fraction * len(texts)), 1), len(texts) - 1)
        held_out.update(sorted(texts, key=hash_of)[:count])
    if not held_out:
        raise ValueError(
            f"Each of the {len(of_label)} labels has one text, copies aside, so none can be held out. Give more "
            "texts, or validation_data."
        )
    places = [text in held_out for text in everything.texts]
    train = everything.select([place for place, is_out in enumerate(places) if not is_out])
    known = set(train.labels)
    # A copy of a text may have another label, which then no training text has.
    kept = [place for place, is_out in enumerate(places) if is_out and everything.labels[place] in known]
    return {"train": train, "held_out": everything.select(kept)}


def _by_column(
    table: Dataset, everything: LabelledTexts, arguments: LabelledDataArguments
) -> dict[str, LabelledTexts]:
    said = column_of(table, arguments.split_column or "", "split_column", arguments.data or "")
    unknown = sorted({str(said[row]) for row in everything.rows if str(said[row]).lower() not in SIDE_NAMES})
    if unknown:
        raise ValueError(
            f"Column {arguments.split_column!r} says {_listed(unknown)}; it must say one of {', '.join(SIDE_NAMES)}."
        )
    places: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(everything.rows):
        places[SIDE_NAMES[str(said[row]).lower()]].append(place)
    if "train" not in places or len(places) == 1:
        raise ValueError(
            f"Column {arguments.split_column!r} says {_listed(sorted(places))} only; it must say train in some rows "
            "and validation or test in others."
        )
    sides = {name: everything.select(found) for name, found in places.items()}
    if "held_out" not in sides:
        sides["held_out"] = sides.pop("test")
    return sides


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _by_value(label: str) -> tuple[bool, float, str]:
    value = _number(label)
    return value is None, 0.0 if value is None else value, label


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(excerpt(name, 40)) for name in names[:NAMED])
    return f"{shown} and {len(names) - NAMED:,} others" if len(names) > NAMED else shown
