"""Text for training: where documents come from, how they are split, and how they become windows of tokens."""

import hashlib
import sysconfig
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, get_dataset_split_names, load_dataset
from transformers import PreTrainedTokenizerBase

from .packing import best_fit


# Other people's packages and tests are not the library. What a program wrote is not prose or code: the codec tables of
# `encodings` are near copies of one another that would fall on both sides of the split, `pydoc_data` is one literal of
# 700 KB, and _sysconfigdata describes one machine.
LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
LEFT_OUT_FILES = "_sysconfigdata"


@dataclass
class TextArguments:
    """Where the text comes from; with neither `text_path` nor `dataset_name`, Python's own standard library."""

    text_path: str | None = field(default=None, metadata={"help": "A UTF-8 text file, or a folder of them."})
    file_pattern: str = field(default="*", metadata={"help": "Which files of the folder to read, e.g. *.txt."})
    dataset_name: str | None = field(default=None, metadata={"help": "A name or folder for datasets.load_dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "The split of the dataset to read."})
    held_out_split: str | None = field(
        default=None, metadata={"help": "A split of the dataset to hold out, instead of a part of dataset_split."}
    )
    text_column: str = field(default="text", metadata={"help": "The column of the dataset that holds the text."})
    held_out_fraction: float = field(default=0.05, metadata={"help": "Share of the documents that is held out."})

    def __post_init__(self):
        if self.text_path and self.dataset_name:
            raise ValueError(
                f"Both text_path ({self.text_path}) and dataset_name ({self.dataset_name}) were given; give one."
            )
        if self.held_out_split and not self.dataset_name:
            raise ValueError(f"held_out_split ({self.held_out_split}) is a split of a dataset; give dataset_name too.")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction is {self.held_out_fraction}; it must lie between 0 and 1.")

    @property
    def source(self) -> str:
        """One line for a person: what text this is."""
        if self.text_path:
            return f"text from {Path(self.text_path).name}"
        if self.dataset_name:
            splits = " and ".join(filter(None, [self.dataset_split, self.held_out_split]))
            return " ".join(filter(None, [self.dataset_name, self.dataset_config_name, splits]))
        return f"the source files of the standard library of Python {sysconfig.get_python_version()}"


@dataclass
class DataArguments(TextArguments):
    """The text, and the windows that it is cut into."""

    context_length: int = field(default=4096, metadata={"help": "Tokens in a training window."})
    packing: bool = field(
        default=False,
        metadata={
            "help": "Keep the documents of a window apart: none sees another. Windows are filled up by best fit."
        },
    )
    max_held_out_windows: int | None = field(
        default=None, metadata={"help": "Evaluate on this many held-out windows, evenly spaced, instead of all."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.context_length < 2:
            raise ValueError(f"context_length is {self.context_length}; a window needs at least 2 tokens.")
        if self.max_held_out_windows is not None and self.max_held_out_windows < 1:
            raise ValueError(f"max_held_out_windows is {self.max_held_out_windows}; it must be at least 1.")


@dataclass(frozen=True)
class Windows:
    """One side of the corpus, packed.

    Attributes:
        dataset: rows of `input_ids`, each `context_length` tokens; where documents are kept apart, with an
            `attention_mask` that numbers them, 0 for what fills a window up.
        token_bytes: bytes of text each token stands for, `[windows, context_length]`; none for end of text.
        text: the bytes of the windows, in their order.
        num_documents, num_bytes, num_packed: what was packed, and into how many windows.
        tail_tokens, tail_bytes: what was left over after the last full window.
    """

    dataset: Dataset
    token_bytes: np.ndarray
    text: bytes
    num_documents: int
    num_bytes: int
    num_packed: int
    tail_tokens: int
    tail_bytes: int

    @property
    def causal_tokens_per_byte(self) -> float:
        """Predicted tokens per byte of text for a causal model.

        The first token of a window, or of a document that is kept apart, is predicted by nothing, so neither it nor
        its bytes count. An end-of-text token is predicted and costs bits, but stands for no byte.
        """
        is_predicted = self.is_predicted
        return np.count_nonzero(is_predicted) / max(int(self.token_bytes[is_predicted].sum()), 1)

    @property
    def are_apart(self) -> bool:
        """Whether the documents of a window are kept apart."""
        return "attention_mask" in self.dataset.column_names

    @property
    def documents(self) -> np.ndarray:
        """The number of each token's document in its window, `[windows, context_length]`, 0 for what fills it up."""
        if not self.are_apart:
            return np.ones_like(self.token_bytes)
        return self.dataset.with_format("numpy")["attention_mask"][:]

    @property
    def is_predicted(self) -> np.ndarray:
        """Which tokens a causal model predicts, bool, `[windows, context_length]`."""
        numbers = self.documents
        return np.pad((numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] > 0), ((0, 0), (1, 0)))

    @property
    def tokens_per_window(self) -> float:
        """Tokens of documents in a window, on average."""
        return np.count_nonzero(self.documents) / len(self.dataset)

    @property
    def masked_tokens_per_byte(self) -> float:
        """Tokens per byte of text for a masked model, which is never asked for an end-of-text token."""
        return np.count_nonzero(self.token_bytes) / max(int(self.token_bytes.sum()), 1)

    @property
    def digest(self) -> str:
        """A short name for these windows in this order."""
        digest = hashlib.sha256(str(self.token_bytes.shape).encode())
        for rows in self.dataset.with_format("arrow").iter(1024):
            for column in rows.columns:
                digest.update(np.ascontiguousarray(column.combine_chunks().flatten()).data)
        return digest.hexdigest()[:16]

    def evenly_spaced(self, count: int | None) -> "Windows":
        """At most `count` of the windows, evenly spaced; all of them if `count` is None."""
        if count is None or count >= len(self.dataset):
            return self
        rows = np.linspace(0, len(self.dataset) - 1, count).round().astype(int)
        edges = np.append(0, self.token_bytes.sum(axis=1).cumsum())
        return replace(
            self,
            dataset=self.dataset.select(rows),
            token_bytes=self.token_bytes[rows],
            text=b"".join(self.text[edges[row] : edges[row + 1]] for row in rows),
        )

    def describe(self) -> str:
        """One line for a person: what was packed, into what, what was left over, and what of it is used."""
        line = (
            f"{self.num_documents:,} documents, {self.num_bytes:,} bytes: {self.num_packed:,} windows of "
            f"{self.token_bytes.shape[1]:,} tokens, "
        )
        if self.are_apart:
            line += "documents kept apart"
        else:
            line += f"left over {self.tail_tokens:,} tokens with {self.tail_bytes:,} bytes"
        if len(self.dataset) == self.num_packed:
            return line
        return f"{line}; {len(self.dataset):,} windows, evenly spaced, with {len(self.text):,} bytes are used"


@dataclass(frozen=True)
class Corpus:
    """Train and held-out windows of one source; no document is on both sides, but a single one is cut."""

    train: Windows
    held_out: Windows


def build_corpus(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, alignment: int = 1) -> Corpus:
    """Read, split and pack what `arguments` name.

    Args:
        alignment: Where documents are kept apart, they begin at multiples of this.

    Raises:
        ValueError: for a source that is missing, unreadable, empty, or too short for one window on either side.
    """
    if arguments.dataset_name:
        documents = read_dataset(arguments, arguments.dataset_split)
    elif arguments.text_path:
        documents = read_text(Path(arguments.text_path), arguments.file_pattern)
    else:
        documents = read_standard_library()
    if arguments.held_out_split:
        train, held_out = documents, read_dataset(arguments, arguments.held_out_split)
    else:
        train, held_out = split_documents(documents, arguments.held_out_fraction)

    def windows(documents: Dataset, side: str) -> Windows:
        return pack(documents, tokenizer, arguments.context_length, side, apart=arguments.packing, alignment=alignment)

    return Corpus(
        train=windows(train, "training"),
        held_out=windows(held_out, "held-out").evenly_spaced(arguments.max_held_out_windows),
    )


def read_standard_library() -> Dataset:
    """The source files of the running Python's standard library, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in root.rglob("*.py")
        if not LEFT_OUT_FOLDERS.intersection(path.relative_to(root).parts) and not path.name.startswith(LEFT_OUT_FILES)
    ]
    return _read_files(root, paths)


def read_text(path: Path, pattern: str = "*") -> Dataset:
    """A text file as one document, or the files of a folder and its subfolders that match `pattern`."""
    if path.is_file():
        return _read_files(path.parent, [path])
    if not path.is_dir():
        raise ValueError(f"There is no file or folder at {path}; check text_path.")
    paths = [found for found in path.rglob(pattern) if found.is_file()]
    if not paths:
        raise ValueError(f"No file in {path} matches {pattern!r}; check text_path and file_pattern.")
    return _read_files(path, paths)


def _read_files(root: Path, paths: list[Path]) -> Dataset:
    """Files as documents named by their path under `root`; bytes are kept as they are, line ends included."""
    names, texts = [], []
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            texts.append(path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text (byte {error.start}); convert it, or choose other files with file_pattern."
            ) from error
        names.append(path.relative_to(root).as_posix())
    return _documents(names, texts)


def read_dataset(arguments: DataArguments, split: str) -> Dataset:
    """The rows of one split of a `datasets` source, named by their content, so that copies stay on one side."""
    name, config = arguments.dataset_name, arguments.dataset_config_name
    try:
        splits = get_dataset_split_names(name, config)
    except FileNotFoundError as error:
        raise ValueError(f"There is no dataset {name!r}; check dataset_name. {error}") from error
    if split.split("[")[0] not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}.")
    rows = load_dataset(name, config, split=split)
    column = arguments.text_column
    if column not in rows.column_names:
        raise ValueError(f"{name} has no column {column!r}; set text_column to one of {', '.join(rows.column_names)}.")
    texts = rows[column][:]
    if missing := [row for row, text in enumerate(texts) if text is None]:
        raise ValueError(
            f"{len(missing)} of the {len(texts)} rows of {name} have no text in column {column!r} (the first is row "
            f"{missing[0]}); leave them out of the dataset."
        )
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"Column {column!r} of {name} does not hold text; its type is {rows.features[column]}.")
    return _documents([hashlib.sha256(text.encode("utf-8")).hexdigest() for text in texts], texts)


def _documents(names: list[str], texts: list[str]) -> Dataset:
    """Columns name and text, without the documents that have no text."""
    kept = [(name, text) for name, text in zip(names, texts, strict=True) if text]
    if not kept:
        raise ValueError("The corpus is empty: no document has any text.")
    return Dataset.from_dict({"name": [name for name, _ in kept], "text": [text for _, text in kept]})


def split_documents(documents: Dataset, held_out_fraction: float) -> tuple[Dataset, Dataset]:
    """Train and held-out documents, chosen by a hash of the document's name.

    A document stays on its side when others are added or removed. Where the hash would leave one side empty (a
    handful of documents), the nearest document moves over. A single document is cut: its end is held out.
    """
    if len(documents) == 1:
        name, text = documents["name"][0], documents["text"][0]
        cut = round(len(text) * (1 - held_out_fraction))
        return tuple(Dataset.from_dict({"name": [name], "text": [part]}) for part in (text[:cut], text[cut:]))
    if len(set(documents["name"])) == 1:
        raise ValueError(
            f"All {len(documents)} documents hold the same text, so none of them can be held out. Give other text, or "
            "a held_out_split."
        )
    ranks = np.array([_uniform(name) for name in documents["name"]])
    threshold = np.clip(held_out_fraction, np.nextafter(ranks.min(), 1), ranks.max())
    return documents.select(np.flatnonzero(ranks >= threshold)), documents.select(np.flatnonzero(ranks < threshold))


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends on nothing but `name`."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:6], "big") / 2**48


def pack(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    side: str = "given",
    apart: bool = False,
    alignment: int = 1,
) -> Windows:
    """Documents, each followed by the end-of-text token, in windows of `context_length` tokens.

    Args:
        side: What the text is for, to say what is done.
        apart: Keep documents apart: a window holds whole ones, or pieces of those that are longer, and is filled up.
            Otherwise one text of all of them is cut.
        alignment: With `apart`, documents begin at multiples of this where the model works on them.

    Raises:
        ValueError: if there is not one full window, with `apart` no text at all, or the tokenizer has no end-of-text
            token.
    """
    end_of_text = end_of_text_of(tokenizer)

    def tokenize(text: str) -> dict[str, np.ndarray]:
        tokens, widths = tokens_and_widths(text, tokenizer, end_of_text)
        return {"token": tokens, "width": widths}

    tokenized = documents.map(
        tokenize, input_columns="text", remove_columns=documents.column_names, desc=f"Tokenizing the {side} text"
    )
    tokens, widths = _flat(tokenized, "token"), _flat(tokenized, "width")
    stream = "".join(documents["text"]).encode("utf-8")
    about = {"num_documents": len(documents), "num_bytes": len(stream)}
    if apart:
        filled_up_with = end_of_text if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        lengths = np.concatenate([pc.list_value_length(part) for part in tokenized.data.column("token").chunks])
        return _apart(tokens, widths, lengths, stream, context_length, alignment, filled_up_with, about)
    num_windows = len(tokens) // context_length
    if num_windows == 0:
        raise ValueError(
            f"The {side} text ({len(documents)} documents, {len(stream)} bytes, {len(tokens)} tokens) is too short "
            f"for one window of {context_length} tokens. Give more text, a shorter context_length or another "
            "held_out_fraction."
        )
    packed = num_windows * context_length
    text = stream[: widths[:packed].sum()]
    return Windows(
        dataset=_rows(input_ids=tokens[:packed].reshape(num_windows, context_length)),
        token_bytes=widths[:packed].reshape(num_windows, context_length),
        text=text,
        num_packed=num_windows,
        tail_tokens=len(tokens) - packed,
        tail_bytes=len(stream) - len(text),
        **about,
    )


def _apart(tokens, widths, lengths, stream, context_length, alignment, filled_up_with, about) -> Windows:
    """Windows of the documents that have `lengths` of the `tokens`."""
    starts = [
        start + offset
        for start, length in zip(lengths.cumsum() - lengths, lengths, strict=True)
        for offset in range(0, length, context_length)
    ]
    # A single token, an end of text, predicts nothing and is predicted by nothing.
    pieces = [(start, end) for start, end in pairwise([*starts, len(tokens)]) if end - start > 1]
    if not pieces:
        raise ValueError(f"The {about['num_documents']} documents are empty; give some text.")
    windows = best_fit([int(end - start) for start, end in pieces], context_length, alignment)
    shape, edges = (len(windows), context_length), np.append(0, widths.cumsum())
    ids, token_bytes, numbers = (np.full(shape, value, np.int32) for value in (filled_up_with, 0, 0))
    text = []
    for window, found in enumerate(windows):
        place = 0
        for number, piece in enumerate(found, start=1):
            start, end = pieces[piece]
            here = window, slice(place, place := place + end - start)
            ids[here], token_bytes[here], numbers[here] = tokens[start:end], widths[start:end], number
            text.append(stream[edges[start] : edges[end]])
    return Windows(
        dataset=_rows(input_ids=ids, attention_mask=numbers),
        token_bytes=token_bytes,
        text=b"".join(text),
        num_packed=len(windows),
        tail_tokens=0,
        tail_bytes=0,
        **about,
    )


def _rows(**columns: np.ndarray) -> Dataset:
    """A dataset of rows of one length."""
    table = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        for name, values in columns.items()
    }
    return Dataset(pa.table(table)).with_format("torch")


def end_of_text_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands behind a text.

    Raises:
        ValueError: There is none.
    """
    end_of_text = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end_of_text is None:
        raise ValueError(f"{type(tokenizer).__name__} has neither eos_token nor sep_token to stand between documents.")
    return end_of_text


def tokens_and_widths(
    text: str, tokenizer: PreTrainedTokenizerBase, end_of_text: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of `text` with the end-of-text token, and the UTF-8 bytes each stands for.

    The bytes sum to those of `text`: a character that several tokens share counts for the first of them, and text
    that got no token for the token after it.

    Raises:
        ValueError: The tokenizer does not say which bytes a token stands for.
    """
    # A special token's name in a text, such as a typed "<pad>", is text.
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    tokens = np.array([*encoding["input_ids"], end_of_text], dtype=np.int32)
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (characters >= 0x80).astype(np.int32) + (characters >= 0x800) + (characters >= 0x10000)
    if len(tokens) - 1 == widths.sum():
        return tokens, np.append(np.ones(len(tokens) - 1, dtype=np.int32), np.int32(0))
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which bytes a token stands for, so bits per byte cannot be "
            "counted; use the byte tokenizer or a fast tokenizer."
        )
    ends = np.maximum.accumulate([end for _, end in encoding.encodings[0].offsets] + [len(text)])
    return tokens, np.diff(np.append(0, widths.cumsum())[ends], prepend=0).astype(np.int32)


def _flat(dataset: Dataset, column: str) -> np.ndarray:
    """All values of a column of lists, one after the other."""
    return np.concatenate([chunk.flatten().to_numpy() for chunk in dataset.data.column(column).chunks])
