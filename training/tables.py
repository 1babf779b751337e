"""Tables of text, a row for each document: csv, json, parquet, lines of text, FASTA, a folder for each label."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError


# What `datasets` calls a reader, by how a file ends.
READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".log": "text",
}
FASTA = (".fa", ".fasta", ".fna")
WRITERS = (".csv", ".jsonl", ".parquet")
# Below this share of blanks there are no words.
FEWEST_BLANKS = 0.02
# A document is one field, and may be longer than the 128 KiB that Python's reader of csv takes by default.
LONGEST_FIELD = 2**31 - 1


def read_table(path: str | Path) -> Dataset:
    """
    The rows of a file, or of a folder that has a folder of text files for each label.

    All columns of csv are text as it stands there: "NA" is no missing value, and "01" no number. Lines of text,
    records of FASTA and files of folders have the column `text`; records also `name`, files `name` and `label`.

    Args:
        path: Its ending says what it is.

    Raises:
        ValueError: There is no such file, its type is unknown, it cannot be read, or it has no rows.
    """
    path = Path(path)
    if path.is_dir():
        table = Dataset.from_dict(_read_folders(path))
    elif not path.is_file():
        raise ValueError(f"There is no file or folder at {path}; check the path.")
    elif path.suffix.lower() in FASTA:
        table = Dataset.from_dict(_read_fasta(path))
    elif path.suffix.lower() in READERS:
        table = _read_file(path)
    else:
        raise ValueError(
            f"{path} ends with {path.suffix!r}, which is no known type. Give one of "
            f"{', '.join((*READERS, *FASTA))}, or a folder that has a folder of text files for each label."
        )
    if not len(table):
        raise ValueError(f"{path} has no rows.")
    return table


def _read_file(path: Path) -> Dataset:
    kind, options = READERS[path.suffix.lower()], {}
    try:
        if kind == "csv":
            options = _csv_options(path)
        found = load_dataset(kind, data_files=str(path), split="train", **options)
    except (DatasetGenerationError, UnicodeDecodeError, ValueError, csv.Error) as error:
        reason = _innermost(error)
        if "corresponds to no data" in str(reason):
            raise ValueError(f"{path} has no rows.") from error
        raise ValueError(
            f"{path} cannot be read as {path.suffix.lower().removeprefix('.')} ({type(reason).__name__}: "
            f"{str(reason).strip()}). It must be UTF-8, and every row must have the columns of the first one."
        ) from error
    return found


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _csv_options(path: Path) -> dict[str, Any]:
    """Every column is text, so that nothing is taken for a number or for missing."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=separator), [])
    if not names:
        raise ValueError("it is empty")
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name: {', '.join(names)}")
    return {
        "sep": separator,
        "features": Features({name: Value("string") for name in names}),
        "keep_default_na": False,
        "na_filter": False,
    }


def _read_fasta(path: Path) -> dict[str, list[str]]:
    names: list[str] = []
    lines: list[list[str]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if line.startswith(">"):
                names.append(line[1:].strip())
                lines.append([])
            elif line and not names:
                raise ValueError(f"{path} begins in line {number} without a '>' and a name: it is no FASTA file.")
            elif line:
                lines[-1].append(line)
    return {"name": names, "text": ["".join(parts) for parts in lines]}


def _read_folders(folder: Path) -> dict[str, list[str]]:
    paths = sorted(found for found in folder.rglob("*") if found.is_file() and found.parent != folder)
    if not paths:
        raise ValueError(
            f"{folder} has no folder with files in it. Give a file, or a folder that has a folder of text files for "
            "each label."
        )
    columns: dict[str, list[str]] = {"name": [], "text": [], "label": []}
    for path in paths:
        try:
            columns["text"].append(path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or take it out.") from error
        name = path.relative_to(folder)
        columns["name"].append(name.as_posix())
        columns["label"].append(name.parts[0])
    return columns


def column_of(table: Dataset, name: str, option: str, source: str | Path) -> list[Any]:
    """
    The values of a column; the names of classes where the table knows them.

    Args:
        table: From `read_table`.
        name: Of the column.
        option: What names it on the command line.
        source: What the table is called.

    Raises:
        ValueError: There is no such column.
    """
    if name not in table.column_names:
        raise ValueError(
            f"{source} has no column {name!r}; it has {', '.join(map(repr, table.column_names))}. Name one of them "
            f"with --{option}."
        )
    values, feature = table[name][:], table.features[name]
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.int2str(value) for value in values]
    return values


def is_missing(value: Any) -> bool:
    """Whether a field holds nothing."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value)


def texts_of(
    table: Dataset, name: str, source: str | Path, *, drop: bool = False, option: str = "text_column"
) -> tuple[list[str], list[int]]:
    """
    The texts of a column and the number of each one's row, counted from 0.

    Args:
        table: From `read_table`.
        name: Of the column.
        source: What the table is called.
        drop: Leave out rows without text, instead of refusing them.
        option: What names the column on the command line.

    Raises:
        ValueError: There is no such column, it does not hold text, or a row has none.
    """
    texts = column_of(table, name, option, source)
    other = next((value for value in texts if not is_missing(value) and not isinstance(value, str)), None)
    if other is not None:
        raise ValueError(
            f"Column {name!r} of {source} does not hold text but {type(other).__name__}, such as {other!r}. Name the "
            f"column of the texts with --{option}; there are {', '.join(map(repr, table.column_names))}."
        )
    empty = [row for row, text in enumerate(texts) if is_missing(text) or not text.strip()]
    if empty and not drop:
        raise ValueError(
            f"{len(empty):,} of the {len(texts):,} rows of {source} have no text in column {name!r} (the first is row "
            f"{empty[0] + 1}). Fill them in, or leave them out with --drop_incomplete True."
        )
    left_out = set(empty)
    rows = [row for row in range(len(texts)) if row not in left_out]
    if not rows:
        raise ValueError(f"No row of {source} has text in column {name!r}.")
    return [texts[row] for row in rows], rows


def write_table(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """
    Write columns to a file whose ending says what it is; in csv, lists and records are JSON.

    Raises:
        ValueError: The type is unknown.
    """
    path = check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside it first, so that there is never half a file.
    part = path.with_name(f".{path.name}.part")
    if path.suffix == ".parquet":
        Dataset.from_dict(dict(columns)).to_parquet(str(part))
    elif path.suffix == ".jsonl":
        Dataset.from_dict(dict(columns)).to_json(str(part), force_ascii=False)
    else:
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(map(_in_csv, zip(*columns.values(), strict=True)))
    part.replace(path)


def _in_csv(row):
    return [json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value for value in row]


def parsed(value: Any) -> Any:
    """What a text that is JSON of a list or of a record stands for, as csv has it; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def other_columns(table: Dataset, rows: Sequence[int], without: Sequence[str]) -> dict[str, list[Any]]:
    """The values of all columns but some, in these rows."""
    names = [name for name in table.column_names if name not in without]
    return {name: [values[row] for row in rows] for name in names for values in [table[name][:]]}


def check_writable(path: str | Path, endings: Sequence[str] = WRITERS) -> Path:
    """
    The path, if a table can be written there.

    Raises:
        ValueError: Its ending is unknown, or its folder cannot be written to.
    """
    path = Path(path)
    if path.suffix not in endings:
        raise ValueError(f"{path} ends with {path.suffix!r}; what is written ends with one of {', '.join(endings)}.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: {folder} is no folder that you may write to.")
    return path


def have_blanks(texts: Sequence[str]) -> bool:
    """Whether texts have blanks between words; DNA has hardly any."""
    sample = "".join(text[:1000] for text in texts[:1000])
    return sum(map(str.isspace, sample)) >= FEWEST_BLANKS * len(sample)


def excerpt(text: str, length: int = 80) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
