"""Pairs of texts, of which one is read and the other is written: what a table must hold, and which are held out."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .held_out import SplitRows, TaskDataArguments, TextRows, parted, warn_of_copies
from .tables import column_of, is_missing, other_columns, read_table, texts_of


# Columns that are written beside those of a file.
WRITTEN = ("row", "predicted", "exact")


@dataclass
class PairDataArguments(TaskDataArguments):
    """Where pairs of texts come from, and which of them are held out."""

    held_out_of = "the sources"
    predictions_end = ".jsonl"

    data: str | None = field(
        default=None, metadata={"help": "csv, tsv, json, jsonl or parquet with a source and a target in each row."}
    )
    source_column: str = field(default="source", metadata={"help": "The column of the texts that are read."})
    target_column: str = field(default="target", metadata={"help": "The column of the texts that are written."})
    exact_examples: int = field(
        default=64,
        metadata={"help": "Measured pairs, evenly spaced, whose targets the trained model is made to write."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.exact_examples < 1:
            raise ValueError(f"exact_examples is {self.exact_examples}; it must be at least 1.")
        if self.source_column == self.target_column:
            raise ValueError(
                f"source_column and target_column are both {self.source_column!r}: a text would be its own target. "
                "Name two columns."
            )


@dataclass(frozen=True)
class Pairs(TextRows):
    """
    Texts, each with the one that shall be written for it.

    Attributes:
        targets: Empty where they are not known.
        rows: The row of its file that each is from, counted from 0.
        others: Further columns of the file.
    """

    sources: list[str]
    targets: list[str]
    rows: list[int]
    others: dict[str, list[Any]] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """A short name for these pairs in this order."""
        return hashlib.sha256(json.dumps([self.sources, self.targets]).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line for a person."""
        read, written = (
            sum(len(text.encode("utf-8", "surrogatepass")) for text in side) for side in (self.sources, self.targets)
        )
        return f"{len(self):,} pairs, {read:,} bytes of sources and {written:,} bytes of targets"


class PairSides(SplitRows[Pairs]):
    """Pairs for training, held out, and perhaps for a test."""


def read_pairs(arguments: PairDataArguments) -> PairSides:
    """
    Read, check and split; pairs of one source are on one side.

    Raises:
        ValueError: Something is missing, or nothing can be held out.
    """
    if arguments.data is None:
        raise ValueError(
            "Name a file with --data: csv, tsv, json, jsonl or parquet with a source and a target in each row."
        )
    everything = pairs_of(arguments.data, arguments)
    if arguments.validation_data:
        train, held_out = everything, pairs_of(arguments.validation_data, arguments)
    else:
        train, held_out = parted(everything, everything.sources, arguments.held_out_fraction)
    test = pairs_of(arguments.test_data, arguments) if arguments.test_data else None
    warn_of_copies(train.sources, {"held-out": held_out.sources, "test": None if test is None else test.sources})
    return PairSides(train, held_out, test, arguments.how)


def pairs_of(path: str, arguments: PairDataArguments, *, with_targets: bool = True) -> Pairs:
    """
    The pairs of a file.

    Args:
        with_targets: There must be targets; otherwise they may be missing.

    Raises:
        ValueError: It cannot be read, or a row lacks a text.
    """
    table, names = read_table(path), (arguments.source_column, arguments.target_column)
    sources, rows = texts_of(table, names[0], path, drop=arguments.drop_incomplete, option="source_column")
    targets = [""] * len(rows)
    if with_targets:
        # It refuses rows without text; here they may be others than those without a source.
        given, with_text = texts_of(table, names[1], path, drop=arguments.drop_incomplete, option="target_column")
        target_of = dict(zip(with_text, given, strict=True))
        kept = [place for place, row in enumerate(rows) if row in target_of]
        if not kept:
            raise ValueError(f"No row of {path} has a source and a target.")
        sources, rows = [sources[place] for place in kept], [rows[place] for place in kept]
        targets = [target_of[row] for row in rows]
    elif names[1] in table.column_names:
        known = column_of(table, names[1], "target_column", path)
        targets = ["" if is_missing(known[row]) else str(known[row]) for row in rows]
    return Pairs(sources, targets, rows, other_columns(table, rows, (*names, *WRITTEN)))
