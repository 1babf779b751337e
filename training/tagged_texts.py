"""
Texts whose parts have tags: words with a tag each, or spans of a text with a label.

A text is cut into units, which are its words, or its characters where texts have hardly any blanks, as DNA has; the
training texts decide. Each unit has a tag. Labelled spans become tags of the scheme IOB2: `B-X` where a span of label
X begins, `I-X` inside of it, `O` outside.
"""

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import regex
from datasets import ClassLabel, Dataset

from .held_out import SplitRows, TaskDataArguments, TextRows, parted, warn_of_copies
from .tables import column_of, excerpt, have_blanks, parsed, read_table, texts_of


COLUMN_FILES = (".conll", ".bio", ".iob", ".iob2")
OUTSIDE = "O"
# What stands before the label in a tag, by what it says of a unit: it begins a span, or is inside of one.
BEGINS, INSIDE = ("B", "S", "U"), ("I", "E", "L", "M")
# Scripts without blanks between words, of which each letter is a unit.
ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# A letter of these, a word of the others, or a sign, each with its marks; or any character.
PATTERNS = {
    "words": regex.compile(rf"(?V1)[{ALONE}]\p{{M}}*|[\w--[{ALONE}]][[\w\p{{M}}]--[{ALONE}]]*|\S\p{{M}}*"),
    "characters": regex.compile(r"\S\p{M}*"),
}
COMMENT = re.compile(r"#\s*(id\b|newdoc|newpar|\w+\s*=)")
NAMED = 8


class Span(NamedTuple):
    """A labelled part of a text: its first character, the one behind its last, its label."""

    start: int
    end: int
    label: str


@dataclass
class TaggedDataArguments(TaskDataArguments):
    """Where texts with tags come from."""

    predictions_end = ".jsonl"

    data: str | None = field(
        default=None,
        metadata={"help": "json, jsonl or parquet with tokens and tags, or with text and spans; or a CoNLL file."},
    )
    text_column: str = field(default="text", metadata={"help": "The column of the texts."})
    spans_column: str = field(
        default="spans", metadata={"help": "The column of their labelled spans: start, end and label of each."}
    )
    tokens_column: str = field(default="tokens", metadata={"help": "Or the column of the words of each text,"})
    tags_column: str = field(default="tags", metadata={"help": "and that of their tags."})


@dataclass(frozen=True)
class TaggedTexts(TextRows):
    """
    Texts, and the units that each is cut into.

    Attributes:
        units: The first character of each unit and the one behind its last.
        tags: The tag of each unit.
        rows: The row of its file that each text is from, counted from 0.
        kind: What units are: "words" or "characters".
    """

    texts: list[str]
    units: list[list[tuple[int, int]]]
    tags: list[list[str]]
    rows: list[int]
    kind: str = "words"

    @cached_property
    def digest(self) -> str:
        """A short name for these texts and tags in this order."""
        return hashlib.sha256(json.dumps([self.texts, self.tags]).encode()).hexdigest()[:16]

    def words(self, place: int) -> list[str]:
        """The units of a text."""
        return [self.texts[place][start:end] for start, end in self.units[place]]

    def describe(self) -> str:
        """One line for a person."""
        counts = Counter(tag for tags in self.tags for tag in tags if not tag.startswith("I-"))
        counts.pop(OUTSIDE, None)
        common = counts.most_common()
        named = ", ".join(f"{excerpt(tag.removeprefix('B-'), 30)} {count:,}" for tag, count in common[:NAMED])
        others = f", and {len(common) - NAMED} others" if len(common) > NAMED else ""
        return f"{len(self):,} texts of {sum(map(len, self.units)):,} units ({named}{others})"


class TaggedSides(SplitRows[TaggedTexts]):
    """Texts with tags for training, held out, and perhaps for a test."""

    @cached_property
    def names(self) -> list[str]:
        """The tags of all sides, in the order of their ids."""
        tags = {tag for side in self._all for tags in side.tags for tag in tags}
        # There may be none inside, where each span of a label is one unit.
        tags |= {f"I-{tag[2:]}" for tag in tags if tag.startswith("B-")} if self.has_spans else set()
        return sorted(tags, key=lambda tag: (tag != OUTSIDE, tag[2:], tag))

    @cached_property
    def has_spans(self) -> bool:
        """Whether tags are those of spans, or each is a label by itself, such as a part of speech."""
        return are_of_spans(tag for side in self._all for tags in side.tags for tag in tags)

    @property
    def _all(self) -> list[TaggedTexts]:
        return [side for side in (self.train, self.held_out, self.test) if side is not None]


def read_tagged(arguments: TaggedDataArguments) -> TaggedSides:
    """
    Read, check and split.

    Raises:
        ValueError: Something is missing, or tags and texts do not fit.
    """
    if arguments.data is None:
        raise ValueError(
            "Name a file with --data: json, jsonl or parquet, or a CoNLL file (a word and its tag a line)."
        )
    everything = tagged_texts_of(arguments.data, arguments)
    # All files are cut as the first.
    kind = everything.kind
    if arguments.validation_data:
        train, held_out = everything, tagged_texts_of(arguments.validation_data, arguments, kind)
    else:
        train, held_out = parted(everything, everything.texts, arguments.held_out_fraction)
    test = tagged_texts_of(arguments.test_data, arguments, kind) if arguments.test_data else None
    sides = TaggedSides(train, held_out, test, arguments.how)
    if len(sides.names) < 2:
        raise ValueError(f"Every unit has the tag {sides.names[0]!r}, so there is nothing to find.")
    odd = [tag for tag in sides.names if not are_of_spans(iter([tag]))]
    if odd and are_of_spans(tag for tags in train.tags for tag in tags):
        raise ValueError(
            f"The tags of the training texts are those of spans, but others have {', '.join(map(repr, odd[:NAMED]))}. "
            "Give all in one scheme."
        )
    warn_of_copies(train.texts, {"held-out": held_out.texts, "test": test.texts if test else None})
    trained = {tag[2:] if sides.has_spans else tag for tags in train.tags for tag in tags}
    unknown = sorted({tag[2:] if sides.has_spans else tag for tag in sides.names} - trained)
    if unknown:
        warnings.warn(
            f"No training text has {', '.join(map(repr, unknown[:NAMED]))}, which others have: the model cannot learn "
            "to find that, and the figures count it as missed.",
            stacklevel=2,
        )
    return sides


def tagged_texts_of(path: str, arguments: TaggedDataArguments, kind: str | None = None) -> TaggedTexts:
    """
    The texts of a file.

    Args:
        kind: What texts are cut into, if that is known: "words" or "characters".

    Raises:
        ValueError: It cannot be read, or tags and texts do not fit.
    """
    if Path(path).suffix.lower() in COLUMN_FILES:
        tokens, tags = _read_columns(Path(path))
        return _of_tokens(tokens, tags, list(range(len(tokens))), path)
    return tagged_rows_of(read_table(path), path, arguments, kind)


def tagged_rows_of(table: Dataset, path: str, arguments: TaggedDataArguments, kind: str | None) -> TaggedTexts:
    """The same of a table; see `tagged_texts_of`."""
    names = table.column_names
    has_spans = arguments.spans_column in names
    if arguments.tokens_column in names and not (has_spans and arguments.tags_column not in names):
        tokens, tags, rows = _tokens_and_tags(table, arguments, path)
        return _of_tokens(tokens, tags, rows, path)
    if not has_spans:
        raise ValueError(
            f"{path} has neither a column {arguments.tokens_column!r}, of words, nor {arguments.spans_column!r}, of "
            f"labelled spans; it has {', '.join(map(repr, names))}. Name one with --tokens_column and "
            "--tags_column, or with --spans_column."
        )
    texts, rows = texts_of(table, arguments.text_column, path, drop=arguments.drop_incomplete)
    spans = column_of(table, arguments.spans_column, "spans_column", path)
    found = [read_spans(spans[row], texts[place], row, path) for place, row in enumerate(rows)]
    return _of_spans(texts, found, rows, path, kind or kind_of(texts))


def kind_of(texts: Sequence[str]) -> str:
    """What texts are cut into: "words", or "characters" where there are hardly any blanks."""
    return "words" if have_blanks(texts) else "characters"


def units_of(texts: Sequence[str], kind: str) -> list[list[tuple[int, int]]]:
    """The words and signs of each text, or its characters."""
    return [[found.span() for found in PATTERNS[kind].finditer(text)] for text in texts]


def read_spans(given: Any, text: str, row: int, source: str) -> list[Span]:
    """
    The spans of a text, by where they begin.

    Args:
        given: A list of mappings with start, end and label, or of lists of the three; or a mapping of three lists. It
            may be JSON of that.
        row: For the error.

    Raises:
        ValueError: One lies outside of the text, or two have a character in common.
    """
    given = parsed(given) or []
    if isinstance(given, Mapping):
        columns = list(given.values())
        is_one = not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
        given = [given] if is_one else [dict(zip(given, values, strict=True)) for values in zip(*columns, strict=True)]
    spans = []
    for one in given if isinstance(given, list | tuple) else [given]:
        values: list[Any] = [one.get(name) for name in Span._fields] if isinstance(one, Mapping) else []
        values = list(one) if isinstance(one, list | tuple) else values
        if len(values) != 3 or not all(isinstance(value, int) for value in values[:2]) or values[2] in (None, ""):
            raise ValueError(f"Row {row + 1} of {source} has a span {one!r}; a span has start, end and label.")
        spans.append(Span(int(values[0]), int(values[1]), str(values[2])))
    spans.sort()
    ends = [0, *(span.end for span in spans)]
    for span, before in zip(spans, ends, strict=False):
        if not before <= span.start < span.end <= len(text):
            raise ValueError(
                f"Row {row + 1} of {source} has the span {span.start} to {span.end} ({span.label}) in a text of "
                f"{len(text):,} characters: it must lie inside, and no two may overlap."
            )
    return spans


def tags_of(spans: Sequence[Span], units: Sequence[tuple[int, int]]) -> list[str]:
    """The tag of each unit: that of the span which holds its first character."""
    tags, left = [], list(reversed(spans))
    begun = False
    for start, _ in units:
        while left and left[-1].end <= start:
            left.pop()
            begun = False
        if left and left[-1].start <= start:
            tags.append(f"{'I' if begun else 'B'}-{left[-1].label}")
            begun = True
        else:
            tags.append(OUTSIDE)
    return tags


def spans_of(tags: Sequence[str], units: Sequence[tuple[int, int]]) -> list[Span]:
    """The reverse of `tags_of`; an inside without a beginning begins a span."""
    spans: list[Span] = []
    open_label = None
    for tag, (start, end) in zip(tags, units, strict=True):
        place, _, label = tag.partition("-")
        if tag == OUTSIDE:
            open_label = None
        elif place in INSIDE and label == open_label:
            spans[-1] = spans[-1]._replace(end=end)
        else:
            spans.append(Span(start, end, label))
            open_label = label
    return spans


def are_of_spans(tags: Iterator[str]) -> bool:
    """Whether every tag is `O`, or says whether its unit begins a span."""
    return all(tag == OUTSIDE or (tag[:1] in BEGINS + INSIDE and tag[1:2] == "-" and tag[2:]) for tag in set(tags))


def _of_spans(texts, spans, rows, source, kind):
    units = units_of(texts, kind)
    tags = [tags_of(*each) for each in zip(spans, units, strict=True)]
    begun = [sum(tag.startswith("B-") for tag in found) for found in tags]
    lost = sum(len(each) - count for each, count in zip(spans, begun, strict=True))
    found = [set(spans_of(*each)) for each in zip(tags, units, strict=True)]
    exact = sum(len(each & set(given)) for each, given in zip(found, spans, strict=True))
    for count, what in (
        (sum(begun) - exact, "begin or end inside of a word, which is taken whole"),
        (lost, "hold no beginning of a word and are left out"),
    ):
        if count:
            print(f"{count:,} spans of {source} {what}", flush=True)
    return TaggedTexts(list(texts), units, tags, rows, kind)


def _of_tokens(tokens, tags, rows, source):
    """Words become a text with a blank between each two; other schemes of tags become IOB2."""
    texts, units, found = [], [], []
    for row, words, of_words in zip(rows, tokens, tags, strict=True):
        if len(words) != len(of_words):
            raise ValueError(f"Row {row + 1} of {source} has {len(words):,} words and {len(of_words):,} tags.")
        empty = [word for word in words if not isinstance(word, str) or not word.strip()]
        if None in of_words:
            raise ValueError(f"Row {row + 1} of {source} has a word without a tag. Tag it, or leave the text out.")
        if empty or not words:
            raise ValueError(f"Row {row + 1} of {source} has no words, or one that is {empty[:1]!r}.")
        words, ends, end = [word.strip() for word in words], [], -1
        for word in words:
            end += 1 + len(word)
            ends.append(end)
        texts.append(" ".join(words))
        units.append([(end - len(word), end) for word, end in zip(words, ends, strict=True)])
        found.append([str(tag) for tag in of_words])
    if are_of_spans(tag for each in found for tag in each):
        found = [tags_of(spans_of(*each), each[1]) for each in zip(found, units, strict=True)]
    return TaggedTexts(texts, units, found, list(rows), "words")


def _tokens_and_tags(table: Dataset, arguments: TaggedDataArguments, source: str):
    tokens = column_of(table, arguments.tokens_column, "tokens_column", source)
    tags = column_of(table, arguments.tags_column, "tags_column", source)
    names = getattr(table.features[arguments.tags_column], "feature", None)
    if isinstance(names, ClassLabel):
        tags = [[names.int2str(tag) for tag in of_text] for of_text in tags]
    rows = [row for row in range(len(tokens)) if tokens[row] or not arguments.drop_incomplete]
    return [tokens[row] or [] for row in rows], [tags[row] or [] for row in rows], rows


def _read_columns(path: Path):
    """Words and tags of a file with a word a line, its tag in the last column, a blank line behind each text."""
    if not path.is_file():
        raise ValueError(f"There is no file at {path}; check the path.")
    tokens: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    try:
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it.") from error
    for number, line in enumerate(lines, start=1):
        parts = line.split("\t") if "\t" in line else re.split(" +", line.strip())
        if COMMENT.match(line) and not tokens[-1]:
            continue
        if not line.strip() or parts[0] == "-DOCSTART-":
            tokens.append([])
            tags.append([])
        elif len(parts) < 2:
            raise ValueError(f"Line {number} of {path} is {excerpt(line)!r}; it must be a word and its tag.")
        else:
            tokens[-1].append(parts[0])
            tags[-1].append(parts[-1].strip())
    kept = [place for place, words in enumerate(tokens) if words]
    if not kept:
        raise ValueError(f"{path} has no words.")
    return [tokens[place] for place in kept], [tags[place] for place in kept]
