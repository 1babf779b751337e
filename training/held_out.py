"""What every task is asked for: its rows, which of them are held out, and what a trained model shall be put to."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from .tables import check_writable


Rows = TypeVar("Rows", bound="TextRows")


@dataclass
class TaskDataArguments:
    """Where the rows of a task come from, and which of them are held out; or the rows to put a trained model to."""

    held_out_of: ClassVar[str] = "the texts"
    predictions_end: ClassVar[str] = ".csv"

    data: str | None = field(default=None, metadata={"help": "The file of the rows to train on."})
    validation_data: str | None = field(
        default=None, metadata={"help": "A file of texts to hold out, instead of a part of data."}
    )
    test_data: str | None = field(
        default=None, metadata={"help": "A file of further texts, which nothing but the last figures is from."}
    )
    held_out_fraction: float = field(default=0.2, metadata={"help": "Share of the texts held out."})
    drop_incomplete: bool = field(
        default=False, metadata={"help": "Leave out rows that lack something, instead of refusing them."}
    )
    baseline: bool = field(
        default=True, metadata={"help": "Fit a model without a Reformer to the same rows, to stand beside."}
    )
    predict: str | None = field(
        default=None, metadata={"help": "A file to put --model_name_or_path to, instead of training."}
    )
    predictions_path: str | None = field(
        default=None, metadata={"help": "Where its answers go: csv, jsonl or parquet; by default beside the file."}
    )

    def __post_init__(self):
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction is {self.held_out_fraction}; it must lie between 0 and 1.")
        if self.predict and self.data:
            raise ValueError(
                f"Both data ({self.data}) and predict ({self.predict}) were given: train first, then predict."
            )
        if self.predictions_path is not None:
            check_writable(self.predictions_path)
        if self.predict and self.predictions.resolve() == Path(self.predict).resolve():
            raise ValueError(f"{self.predict} is read, so answers cannot go there. Give another predictions_path.")

    @property
    def source(self) -> str:
        """One line for a person: what text this is."""
        return ", ".join(Path(name).name for name in (self.data, self.validation_data, self.test_data) if name)

    @property
    def predictions(self) -> Path:
        """Where the answers of a trained model go."""
        given = Path(self.predict or "")
        return Path(self.predictions_path or given.with_name(f"{given.stem}_predictions{self.predictions_end}"))

    @property
    def how(self) -> str:
        """One line for a person: how it is parted."""
        if self.validation_data:
            how = f"{Path(self.validation_data).name} is held out"
        else:
            share = f"{100 * self.held_out_fraction:g}% of {self.held_out_of}"
            how = f"{share} are held out, chosen by a hash of the text, copies on one side"
        return f"{how}; the figures are of {Path(self.test_data).name}" if self.test_data else how


class TextRows:
    """A dataclass of lists with something for each row of a file; `rows` is where each is from, counted from 0."""

    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self: Rows, places: Sequence[int]) -> Rows:
        """Those at these places."""

        def chosen(values):
            if isinstance(values, dict):
                return {name: chosen(column) for name, column in values.items()}
            return [values[place] for place in places] if isinstance(values, list) else values

        # Its subclasses are dataclasses.
        own: Any = self
        return replace(own, **{item.name: chosen(getattr(self, item.name)) for item in fields(own)})


@dataclass(frozen=True)
class SplitRows(Generic[Rows]):
    """
    Rows for training, those that training is watched on, and, if there are any, others for the last figures.

    Attributes:
        how: How they were parted, for a person.
    """

    train: Rows
    held_out: Rows
    test: Rows | None
    how: str

    @property
    def measured(self) -> Rows:
        """What the last figures are from."""
        return self.held_out if self.test is None else self.test


def parted(everything: Rows, texts: Sequence[str], fraction: float) -> tuple[Rows, Rows]:
    """
    Rows for training, and those that are held out by `places_held_out` of a text for each.

    Raises:
        ValueError: There is one text only.
    """
    is_out = places_held_out(texts, fraction)
    train, held_out = ([place for place, out in enumerate(is_out) if out is wanted] for wanted in (False, True))
    return everything.select(train), everything.select(held_out)


def warn_of_copies(train: Sequence[Any], others: Mapping[str, Sequence[Any] | None]) -> None:
    """Say how many texts of other sides are training texts, too."""
    known = set(train)
    for name, texts in others.items():
        copies = sum(text in known for text in texts or ())
        if copies:
            warnings.warn(
                f"{copies:,} of the {len(texts or ()):,} {name} texts are training texts, too: figures of them say "
                "nothing about new texts.",
                stacklevel=3,
            )


def hash_of(text: str) -> bytes:
    """A hash of a text, the same on every machine."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def places_held_out(texts: Sequence[str], fraction: float) -> list[bool]:
    """
    Which texts are held out: those with the smallest hashes. Copies of a text are on one side.

    Raises:
        ValueError: There is one text only.
    """
    different = sorted(set(texts), key=hash_of)
    if len(different) < 2:
        raise ValueError("There is one text, copies aside, so none can be held out. Give more, or validation_data.")
    count = min(max(round(fraction * len(different)), 1), len(different) - 1)
    held_out = set(different[:count])
    return [text in held_out for text in texts]
