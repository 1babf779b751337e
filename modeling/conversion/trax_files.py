"""The files of a trax checkpoint: their layouts over the years, and the settings that stand beside them."""

import ast
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .inert_pickle import SavedArray, read_maybe_gzip, read_npy_arrays, read_pickle


# Objects of trax that stand in its files beside the weights. They are not looked at.
RECORDS = {
    ("trax.shapes", "ShapeDtype"),
    ("trax.history", "History"),
    ("trax.supervised.history", "History"),
}
FILE_NAMES = ("model.pkl.gz", "model.pkl")
MOST_PARTS = 10**6
# Bytes of arrays for each byte of a file, where one array may stand for several weights.
MOST_REPEATS = 16
GIN_NAME = "config.gin"

STRING = re.compile(r"""'[^']*'|"[^"]*\"""")
LINE = re.compile(r"^([\w./]+)\s*=\s*(.*)$", re.DOTALL)
CONFIGURABLE = re.compile(r"@(?:[\w/]*\.)*(\w+)(?:\(\))?")


@dataclass
class TraxCheckpoint:
    """
    The weights of a checkpoint in trax's order, and what else is known of it.

    Args:
        num_hashing: Layers that keep buckets; None where the file has no state of layers.
        gin: What its `config.gin` says.
    """

    path: Path
    arrays: list[torch.Tensor]
    num_hashing: int | None = None
    gin: dict[str, Any] = field(default_factory=dict)


class Configurable(str):
    """The name of a class or function that a gin file sets something to."""


class Unread(str):
    """What a gin file sets something to, in words that are not read."""


def read_trax_checkpoint(path: str | os.PathLike) -> TraxCheckpoint:
    """
    The weights of `path`, a file that trax wrote or the folder it is in.

    Nothing of the file is run. A `config.gin` beside it is read, too.

    Raises:
        ValueError: No such file, a damaged one, one that is no trax checkpoint, one that names more than arrays.
    """
    file = _file_of(Path(path))
    content, size = _read(file, lambda data: read_pickle(data, RECORDS))
    if not isinstance(content, dict) or not {"weights", "flat_weights"} & set(content):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{str(file)!r} is no checkpoint of trax: it must hold a dict with `flat_weights`, or `weights` in older "
            f"files, but holds {str(found)[:200]}."
        )
    weights = content["weights"] if "weights" in content else content["flat_weights"]
    if isinstance(weights, int):
        weights, size = _weights_beside(file, weights)
    try:
        saved = flatten(weights)
        if sum(len(array.data) for array in saved) > MOST_REPEATS * size:
            raise ValueError("arrays stand in it again and again, which those of `ReformerLM` do not.")
        arrays = [_tensor(array) for array in saved]
    except ValueError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    return TraxCheckpoint(file, arrays, _num_hashing(content.get("flat_state")), _read_gin(file.parent / GIN_NAME))


def _read_gin(file):
    if not file.is_file():
        return {}
    try:
        return parse_gin(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is no text: byte {error.start} is not UTF-8. Mend it, or move it.") from error


def _num_hashing(state):
    if not state:
        return None
    try:
        arrays = flatten(state)
    except ValueError:
        return None
    return sum(
        len(array.shape) == 2 and array.dtype is not None and array.dtype.code in ("i4", "i8") for array in arrays
    )


def _file_of(path):
    if path.is_file():
        return path
    found = [path / name for name in FILE_NAMES if (path / name).is_file()]
    if not found:
        raise ValueError(f"There is no trax checkpoint at {str(path)!r}. Give a file, or a folder with {FILE_NAMES}.")
    return found[0]


def _read(file, parse):
    """What a file holds, and how many bytes it has unpacked."""
    try:
        data = read_maybe_gzip(file.read_bytes())
        return parse(data), len(data)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} cannot be read. {error}") from error


def _weights_beside(file, number):
    """Weights in files of their own, arrays one after the other or `number` shards; and the bytes of all."""
    name = str(file)
    stem = name.removesuffix(".pkl.gz")
    shards = [Path(f"{name}.shard{index}") for index in range(min(number, MOST_PARTS))]
    arrays = [Path(f"{stem}.weights.npy.gz"), Path(f"{name}.npy")]
    for candidate in arrays:
        if candidate.is_file():
            return _read(candidate, read_npy_arrays)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise ValueError(
            f"The weights of {name!r} are in files of their own, and they are missing: either {arrays[0].name!r} or "
            f"{missing[:3] or 'shards'}. Put them beside it."
        )
    read = [_read(shard, lambda data: read_pickle(data, RECORDS)) for shard in shards]
    return [content for content, _ in read], sum(size for _, size in read)


def flatten(weights: Any) -> list[SavedArray]:
    """
    The arrays of nested tuples, lists and dicts, in their order.

    Raises:
        ValueError: Something else among them; more parts than any model has.
    """
    found: list[SavedArray] = []
    waiting = [weights]
    for _ in range(MOST_PARTS):
        if not waiting:
            return found
        part = waiting.pop()
        if isinstance(part, SavedArray):
            found.append(part)
        elif isinstance(part, tuple) and len(part) == 2 and type(part[1]) is str:
            if part[1] != "bfloat16" or not isinstance(part[0], SavedArray):
                raise ValueError(f"the dtype {part[1][:40]!r} is not known; only bfloat16 stands beside its array.")
            found.append(part[0])
        elif isinstance(part, tuple | list):
            waiting.extend(reversed(part))
        elif isinstance(part, dict):
            waiting.extend(reversed(part.values()))
        elif part is not None:
            raise ValueError(f"among the weights is something of type {type(part).__name__} instead of an array.")
    raise ValueError(f"the weights have more than {MOST_PARTS} parts.")


def _tensor(array):
    tensor = array.tensor()
    # By trax's own rule: it has no other use for this dtype.
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def parse_gin(text: str) -> dict[str, Any]:
    """
    The settings of a gin file, as `{"ReformerLM.d_model": 512}`; nothing of it is run.

    Literals become values, `@name` a `Configurable`, `%name` what that name is set to, anywhere in the file. What is
    more complicated than that becomes `Unread`.
    """
    written: dict[str, str] = {}
    for line in _logical_lines(text):
        match = LINE.match(line)
        if match:
            name, value = match.groups()
            written[".".join(name.rpartition("/")[2].split(".")[-2:])] = value.strip()
    return {name: _read_value(value, written) for name, value in written.items()}


def _read_value(text, written):
    try:
        return _gin_value(text, written)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return Unread(text)


def _logical_lines(text):
    line = ""
    for part in text.splitlines():
        part = _without_comment(part).rstrip()
        line += part.removesuffix("\\")
        bare = STRING.sub("", line)
        if not part.endswith("\\") and all(bare.count(a) <= bare.count(b) for a, b in ("()", "[]", "{}")):
            yield line.strip()
            line = ""


def _without_comment(line):
    strings = [match.span() for match in STRING.finditer(line)]
    for match in re.finditer("#", line):
        if not any(start < match.start() < end for start, end in strings):
            return line[: match.start()]
    return line


def _gin_value(text, written):
    if text.startswith("%"):
        macro = text[1:].rpartition(".")[2]
        value = written.get(macro, "%")
        if value.startswith("%"):
            raise ValueError(f"{text} is not set")
        return _gin_value(value, written)
    names = CONFIGURABLE.findall(text)
    if names and not CONFIGURABLE.sub("", text).strip("()[], \n"):
        found = [Configurable(name) for name in names]
        return found if text[0] in "([" else found[0]
    return ast.literal_eval(text)
