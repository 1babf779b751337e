"""Questions about texts, answered by a part of the text: tables of them, and the format of SQuAD."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from .held_out import SplitRows, TaskDataArguments, TextRows, parted, warn_of_copies
from .tables import column_of, excerpt, is_missing, other_columns, parsed, read_table, texts_of


class Answer(NamedTuple):
    """A part of a context: its first character, and the characters."""

    start: int
    text: str


@dataclass
class QuestionDataArguments(TaskDataArguments):
    """Where questions, contexts and answers come from."""

    held_out_of = "the contexts"
    predictions_end = ".jsonl"

    data: str | None = field(
        default=None, metadata={"help": "csv, json, jsonl or parquet with a question in each row; or SQuAD's json."}
    )
    question_column: str = field(default="question", metadata={"help": "The column of the questions."})
    context_column: str = field(default="context", metadata={"help": "The column of the texts they are about."})
    answers_column: str = field(
        default="answers",
        metadata={
            "help": "The column of the answers: a part of the text, or text and answer_start of one or several."
        },
    )


@dataclass(frozen=True)
class Questions(TextRows):
    """
    Questions, each with its context and the answers that are right.

    Attributes:
        answers: Of each question; none where the context has no answer.
        rows: The row of its file that each is from, counted from 0.
        others: Further columns of the file.
    """

    questions: list[str]
    contexts: list[str]
    answers: list[list[Answer]]
    rows: list[int]
    others: dict[str, list[Any]] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """A short name for these questions in this order."""
        return hashlib.sha256(json.dumps([self.questions, self.contexts, self.answers]).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line for a person."""
        without = sum(not answers for answers in self.answers)
        unanswered = f", {without:,} without an answer" if without else ""
        longest = max(map(len, self.contexts))
        about = f"{len(set(self.contexts)):,} texts of up to {longest:,} characters"
        return f"{len(self):,} questions about {about}{unanswered}"


class QuestionSides(SplitRows[Questions]):
    """Questions for training, held out, and perhaps for a test."""


def read_questions(arguments: QuestionDataArguments) -> QuestionSides:
    """
    Read, check and split; questions about one context are on one side.

    Raises:
        ValueError: Something is missing, or an answer is no part of its context.
    """
    if arguments.data is None:
        raise ValueError(
            "Name a file with --data: csv, json, jsonl or parquet with a question in each row, or SQuAD's json."
        )
    everything = questions_of(arguments.data, arguments)
    if arguments.validation_data:
        train, held_out = everything, questions_of(arguments.validation_data, arguments)
    else:
        train, held_out = parted(everything, everything.contexts, arguments.held_out_fraction)
    if not any(train.answers):
        raise ValueError(f"No question of {arguments.data} has an answer, so there is nothing to learn.")
    test = questions_of(arguments.test_data, arguments) if arguments.test_data else None
    pairs = [list(zip(side.questions, side.contexts, strict=True)) for side in (train, held_out, test) if side]
    warn_of_copies(pairs[0], dict(zip(("held-out", "test"), pairs[1:], strict=False)))
    return QuestionSides(train, held_out, test, arguments.how)


def questions_of(path: str, arguments: QuestionDataArguments, *, with_answers: bool = True) -> Questions:
    """
    The questions of a file.

    Args:
        with_answers: There must be answers; otherwise they may be missing.

    Raises:
        ValueError: It cannot be read, or an answer is no part of its context.
    """
    table = _read_squad(Path(path))
    names = ("question", "context", "answers")
    if table is None:
        table = read_table(path)
        names = arguments.question_column, arguments.context_column, arguments.answers_column
    how = {"drop": arguments.drop_incomplete}
    contexts, rows = texts_of(table, names[1], path, option="context_column", **how)
    asked = column_of(table, names[0], "question_column", path)
    given: list[Any] = [None] * len(asked)
    if with_answers or names[2] in table.column_names:
        given = column_of(table, names[2], "answers_column", path)
    missing = [row for row in rows if is_missing(asked[row]) or not str(asked[row]).strip()]
    if missing and not arguments.drop_incomplete:
        raise ValueError(
            f"{len(missing):,} rows of {path} have no question in column {names[0]!r} (the first is row "
            f"{missing[0] + 1}). Fill them in, or leave them out with --drop_incomplete True."
        )
    left_out = set(missing)
    kept = [place for place, row in enumerate(rows) if row not in left_out]
    contexts, rows = [contexts[place] for place in kept], [rows[place] for place in kept]
    if not rows:
        raise ValueError(f"No row of {path} has a question.")
    answers = [read_answers(given[row], context, row, path) for context, row in zip(contexts, rows, strict=True)]
    others = other_columns(table, rows, (*names, "row", "predicted", "start", "probability"))
    return Questions([str(asked[row]) for row in rows], contexts, answers, rows, others)


def read_answers(given: Any, context: str, row: int, source: str) -> list[Answer]:
    """
    The answers to a question.

    Args:
        given: A text, of which the first place in the context is taken; a mapping of lists `text` and `answer_start`;
            or a list of texts or of mappings with a `text` and perhaps an `answer_start`. It may be JSON of that.
            Nothing means that there is no answer.
        row: For the error.

    Raises:
        ValueError: One is not in the context, or not where it is said to be.
    """
    given = parsed(given)
    if isinstance(given, str | int | float) and not isinstance(given, bool):
        given = [{"text": str(given)}] if str(given) else []
    if isinstance(given, Mapping):
        texts, starts = given.get("text") or [], given.get("answer_start")
        texts = texts if isinstance(texts, list) else [texts]
        starts = starts if isinstance(starts, list) and starts else [starts] * len(texts)
        given = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=False)]
    found = []
    for one in given if isinstance(given, list) else [given] if given else []:
        one = {"text": one} if isinstance(one, str) else one
        text, start = (one.get("text"), one.get("answer_start")) if isinstance(one, Mapping) else (None, None)
        start = int(start) if isinstance(start, str) and start.isdigit() else start
        if not isinstance(text, str) or not (start is None or isinstance(start, int)):
            raise ValueError(
                f"Row {row + 1} of {source} has the answer {one!r}; an answer is a text, or a record of text and "
                "answer_start."
            )
        place = context.find(text) if start is None else start
        if not text or context[place : place + len(text)] != text or place < 0:
            where = (
                "" if start is None else f" at character {start}, where stands {context[start : start + len(text)]!r}"
            )
            raise ValueError(
                f"Row {row + 1} of {source} has the answer {excerpt(text)!r}, which is not in its context{where}. An "
                "answer is a part of the context, letter by letter."
            )
        found.append(Answer(place, text))
    return found


def _read_squad(path: Path) -> Dataset | None:
    """The table of a file in SQuAD's format, or of one with its rows under `data`; None for any other."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return None
    if all(isinstance(row, dict) and "paragraphs" not in row for row in content["data"]):
        rows = content["data"]
    else:
        rows = [
            {"id": str(asked.get("id", "")), "question": asked.get("question"), "context": paragraph.get("context")}
            # As JSON, which a column of any forms can hold.
            | {"answers": json.dumps(asked.get("answers") or [])}
            for article in content["data"]
            for paragraph in article.get("paragraphs", [])
            for asked in paragraph.get("qas", [])
        ]
    if not rows:
        raise ValueError(f"{path} has no questions.")
    return Dataset.from_list(rows)
