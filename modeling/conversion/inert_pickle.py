"""
Arrays and plain containers out of files that other programs pickled, without running anything.

`pickle.load` calls whatever a file names. Here a small machine follows the operations of the file itself: it calls
nothing, imports nothing and sets no attribute of an object that is not its own, so a file can only describe data. What
it may name is listed below; any other name is an error. NumPy is not needed: arrays become tensors.
"""

import ast
import pickletools
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch


DTYPES = {
    "b1": torch.bool,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "bfloat16": torch.bfloat16,
}
# NumPy has had two names for the package that its pickles name.
NUMPY = ("numpy.core", "numpy._core")
BFLOAT16 = {("ml_dtypes", "bfloat16"), ("jaxlib.xla_extension", "bfloat16")}
# Jax's way to write an array: NumPy's own, one step further inside.
JAX_ARRAYS = {("jax._src.array", "_reconstruct_array"), ("jax._src.device_array", "reconstruct_device_array")}
DICTS = {("collections", "defaultdict"), ("collections", "OrderedDict")}
# Protocol 2 has Python's older name for its own types, and calls one for no bytes.
BUILTINS = ("builtins", "__builtin__")
FACTORIES = {(module, name) for module in BUILTINS for name in ("bytes", "dict", "float", "int", "list")}

# A file of weights has some dozens for each array.
MOST_OPERATIONS = 10**7
# Weights hardly shrink; what zeros an optimizer keeps beside them shrinks more.
MOST_EXPANSION = 64
SMALL_FILE = 2**26
MOST_AXES, MOST_ELEMENTS = 64, 2**62
MOST_MEMBERS = 1000
LONGEST_HEADER = 10_000
NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names. It stays a name."""

    module: str
    name: str

    @property
    def pair(self) -> tuple[str, str]:
        """What the tables of allowed names hold."""
        return self.module, self.name

    def is_of_numpy(self, module: str, name: str) -> bool:
        """Whether this is `name` of NumPy's inner `module`."""
        return self.name == name and self.module in {f"{package}.{module}" for package in NUMPY}


@dataclass
class SavedDtype:
    """A NumPy dtype: its code, such as `"f4"`, and whether its bytes stand in this machine's order."""

    code: str
    order: str


class SavedArray:
    """An array as a file describes it, once it is filled."""

    def __init__(self) -> None:
        self.dtype: SavedDtype | None = None
        self.shape: tuple[int, ...] = ()
        self.data: bytes | bytearray = b""
        self.is_fortran = False

    def fill(self, dtype: Any, shape: Any, data: Any, is_fortran: bool = False):
        """Take in a description; ValueError if it does not fit together."""
        if not isinstance(dtype, SavedDtype) or not _is_shape(shape):
            raise ValueError(f"an array has {_what(shape)} for its shape and {_what(dtype)} for its dtype")
        if dtype.code not in DTYPES or dtype.order == ">":
            raise ValueError(
                f"an array has the dtype {dtype.order + dtype.code[:40]!r}; only little-endian numbers are read, "
                f"{sorted(DTYPES)}, and no Python objects"
            )
        if not isinstance(data, bytes | bytearray):
            raise ValueError(f"the numbers of an array are given as {_what(data)} instead of bytes")
        needed = prod(shape) * DTYPES[dtype.code].itemsize
        if needed != len(data):
            raise ValueError(f"an array of shape {list(shape)} needs {needed} bytes, and the file has {len(data)}")
        self.dtype, self.shape, self.data, self.is_fortran = dtype, tuple(shape), data, bool(is_fortran)

    def tensor(self) -> torch.Tensor:
        """The array, in its shape and dtype."""
        if self.dtype is None:
            raise ValueError("an array has no content")
        dtype = DTYPES[self.dtype.code]
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        numbers = torch.frombuffer(bytearray(self.data), dtype=dtype)
        if not self.is_fortran:
            return numbers.reshape(self.shape)
        return numbers.reshape(self.shape[::-1]).permute(*reversed(range(len(self.shape)))).contiguous()


class SavedRecord:
    """An object of a class of which only the name is known, with whatever was stored in it."""

    def __init__(self, name: Name) -> None:
        self.name = name
        self.state: Any = None


def read_pickle(data: bytes, records: Collection[tuple[str, str]] = ()) -> Any:
    """
    What a pickle holds.

    Args:
        data: The whole pickle, of protocol 2 or later.
        records: Classes, as pairs of module and name, whose objects may stand in it. They become `SavedRecord`.

    Returns:
        Tuples, lists, dicts, strings, numbers, None; `SavedArray` for arrays of NumPy and Jax.

    Raises:
        ValueError: A class or function that is not on the list, which the message names; an operation that plain data
            do not need; arrays of Python objects, or whose shape does not fit their bytes; a damaged file.
    """
    return _Machine(records).run(data)


class _Machine:
    """The stack and the memo of a pickle; each operation is a method, and none calls what the pickle names."""

    def __init__(self, records: Collection[tuple[str, str]]) -> None:
        self.records = records
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # Bytes that calls may still make: all there are stand in the file.
        self.room = 0

    def run(self, data):
        self.room = len(data)
        for count, (operation, argument, _) in enumerate(_operations(data)):
            if operation == "STOP":
                return self.pop()
            if count >= MOST_OPERATIONS:
                raise ValueError(f"The pickle has more than {MOST_OPERATIONS} operations, which no weights need.")
            step = OPERATIONS.get(operation)
            if step is None:
                raise ValueError(
                    f"The pickle uses the operation {operation}, which arrays and plain containers do not need. It is "
                    "refused, and nothing was run."
                )
            try:
                step(self, argument)
            except RefusedName:
                raise
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"The pickle is damaged or not what it should be: {_words(error)}.") from error
        raise ValueError("The pickle is damaged or incomplete: it has no end.")

    def pop(self):
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("an operation has nothing to work on")
        return self.stack.pop()

    def pop_to_mark(self):
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                found = self.stack[place + 1 :]
                del self.stack[place:]
                return found
        raise ValueError("an operation has nothing to work on")

    def top(self, kind):
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"something is put into what is no {kind.__name__}")
        return self.stack[-1]

    def fill_dict(self, pairs):
        table = self.top(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int | float):
                raise ValueError(f"a dict has a key of type {type(key).__name__}")
            table[key] = value

    def name(self, module, name):
        found = Name(module, name)
        if not (self.is_allowed(found) or found.pair in self.records):
            raise RefusedName(
                f"The pickle names {_what(found)}, which is neither an array nor a plain container. It is refused, "
                "and nothing was run: a pickle can make its reader do anything. Save the arrays alone."
            )
        self.stack.append(found)

    @staticmethod
    def is_allowed(found):
        known = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        known |= BFLOAT16 | JAX_ARRAYS | DICTS | FACTORIES
        of_numpy = (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
        return found.pair in known or any(found.is_of_numpy(*pair) for pair in of_numpy)

    def reduce(self, _=None):
        arguments, function = self.pop(), self.pop()
        made = _called(function, arguments)
        self.room -= len(made) if isinstance(made, bytes) else 0
        if self.room < 0:
            raise ValueError("it makes more bytes than it holds")
        self.stack.append(made)

    def new_object(self, _=None):
        arguments, kind = self.pop(), self.pop()
        if not isinstance(kind, Name) or kind.pair not in self.records or arguments != ():
            raise ValueError(f"an object of {_what(kind)} is made of {_what(arguments)}")
        self.stack.append(SavedRecord(kind))

    def build(self, _=None):
        state = self.pop()
        if not self.stack or type(self.stack[-1]) not in (SavedArray, SavedDtype, SavedRecord):
            raise ValueError("a state is set where there is no array")
        _set_state(self.stack[-1], state)

    def stack_global(self, _=None):
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name is no text")
        self.name(module, name)


class RefusedName(ValueError):
    """A pickle names something that is not on the list."""


_MARK = object()


def _push(value_of: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(value_of(argument))


def _last(count: int) -> Callable[[_Machine, Any], None]:
    def step(machine, _):
        taken = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(taken)))

    return step


def _to_dict(machine, _):
    pairs = machine.pop_to_mark()
    machine.stack.append({})
    machine.fill_dict(pairs)


def _set_item(machine, _):
    value, key = machine.pop(), machine.pop()
    machine.fill_dict([key, value])


def _append(machine, _):
    value = machine.pop()
    machine.top(list).append(value)


def _append_all(machine, _):
    values = machine.pop_to_mark()
    machine.top(list).extend(values)


def _remember(machine, index):
    if not machine.stack:
        raise ValueError("there is nothing to remember")
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


def _global(machine, argument):
    module, _, name = argument.partition(" ")
    machine.name(module, name)


OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"), _push(lambda number: number)),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _push(lambda text: text)),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _push(lambda data: data)),
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    "EMPTY_TUPLE": _push(lambda _: ()),
    "EMPTY_LIST": _push(lambda _: []),
    "EMPTY_DICT": _push(lambda _: {}),
    "MARK": _push(lambda _: _MARK),
    "TUPLE1": _last(1),
    "TUPLE2": _last(2),
    "TUPLE3": _last(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "DICT": _to_dict,
    "APPEND": _append,
    "APPENDS": _append_all,
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, _: machine.fill_dict(machine.pop_to_mark()),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.stack.append(machine.memo[index])),
    "GLOBAL": _global,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
}


def _operations(data: bytes) -> Iterator[tuple[str, Any, int | None]]:
    try:
        for operation, argument, place in pickletools.genops(data):
            yield operation.name, argument, place
    except (IndexError, ValueError) as error:
        raise ValueError(f"The pickle is damaged or incomplete: {_words(error)}.") from error


def _called(function: Any, arguments: Any) -> Any:
    """What NumPy, Jax or Python would make of `arguments`, as a description."""
    if not isinstance(function, Name) or type(arguments) is not tuple:
        raise ValueError(f"{_what(function)} is called")
    if function.pair == ("numpy", "dtype"):
        code = arguments[0]
        if isinstance(code, Name) and code.pair in BFLOAT16:
            code = "bfloat16"
        if type(code) is not str:
            raise ValueError(f"a dtype is {_what(code)}")
        return SavedDtype(code, "<")
    if function.is_of_numpy("multiarray", "_reconstruct"):
        if arguments[:1] != (Name("numpy", "ndarray"),):
            raise ValueError("an array is not NumPy's own")
        return SavedArray()
    if function.is_of_numpy("multiarray", "scalar"):
        dtype, data = arguments
        array = SavedArray()
        array.fill(dtype, (), data)
        return array
    if function.is_of_numpy("numeric", "_frombuffer"):
        data, dtype, shape, order = arguments
        array = SavedArray()
        array.fill(dtype, shape, data, order == "F")
        return array
    if function.pair in JAX_ARRAYS:
        inner, inner_arguments, state, _ = arguments
        if not isinstance(inner, Name) or not inner.is_of_numpy("multiarray", "_reconstruct"):
            raise ValueError(f"an array is made by {_what(inner)}")
        array = _called(inner, inner_arguments)
        _set_state(array, state)
        return array
    if function.pair == ("_codecs", "encode") and arguments[1:] == ("latin1",):
        return arguments[0].encode("latin1")
    if function.module in BUILTINS and function.name == "bytes" and not arguments:
        return b""
    if function.pair in DICTS and all(isinstance(argument, Name) for argument in arguments):
        return {}
    raise ValueError(f"{_what(function)} is called with arguments that are not expected")


def _set_state(target, state):
    if isinstance(target, SavedRecord):
        target.state = state
    elif isinstance(target, SavedDtype):
        _, order, *inner = state
        if any(part is not None for part in inner[:3]) or order not in ("<", "|", "=", ">"):
            raise ValueError("a dtype has fields")
        target.order = order
    else:
        _, shape, dtype, is_fortran, data = state
        target.fill(dtype, shape, data, is_fortran)


def read_npy_arrays(data: bytes) -> list[SavedArray]:
    """
    The arrays of a file that `numpy.save` wrote one after the other.

    Raises:
        ValueError: A damaged or incomplete file; arrays of anything but numbers.
    """
    arrays: list[SavedArray] = []
    place = 0
    while place < len(data):
        header, place = _npy_header(data, place)
        descr, shape = header.get("descr"), header.get("shape")
        if not isinstance(descr, str) or not _is_shape(shape):
            raise ValueError(f"Array {len(arrays)} of the file is described as {header!r:.200}, which is no array.")
        code = descr[1:]
        size = prod(shape) * (DTYPES[code].itemsize if code in DTYPES else 0)
        array = SavedArray()
        try:
            array.fill(SavedDtype(code, descr[:1]), shape, data[place : place + size], header.get("fortran_order"))
        except ValueError as error:
            raise ValueError(f"The file is damaged or not what it should be: {_words(error)}.") from error
        arrays.append(array)
        place += size
    return arrays


def _npy_header(data, place):
    start = place + len(NPY_MAGIC) + 2
    version = data[start - 2 : start - 1]
    width = 2 if version == b"\x01" else 4
    length = int.from_bytes(data[start : start + width], "little")
    end = start + width + length
    if data[place : place + len(NPY_MAGIC)] != NPY_MAGIC or length > LONGEST_HEADER or end > len(data):
        raise ValueError(f"The file is damaged or incomplete: there is no array at byte {place}.")
    try:
        header = ast.literal_eval(data[start + width : end].decode("latin1").strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"The file is damaged: the array at byte {place} has no description.") from error
    if not isinstance(header, dict):
        raise ValueError(f"The file is damaged: the array at byte {place} has no description.")
    return header, end


def read_maybe_gzip(data: bytes) -> bytes:
    """`data`, unpacked if it is packed by gzip; ValueError if that is damaged or grows beyond all weights."""
    if data[:2] != b"\x1f\x8b":
        return data
    most = MOST_EXPANSION * len(data) + SMALL_FILE
    pieces: list[bytes] = []
    size = 0
    while data:
        if len(pieces) == MOST_MEMBERS:
            raise ValueError(f"The file consists of more than {MOST_MEMBERS} packed files, which weights never do.")
        unpacker = zlib.decompressobj(wbits=31)
        try:
            piece = unpacker.decompress(data, most - size + 1)
        except zlib.error as error:
            raise ValueError(f"The file is damaged or incomplete ({error}). Copy or download it again.") from error
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise ValueError(f"The file unpacks to more than {MOST_EXPANSION} times its size, which weights never do.")
        if not unpacker.eof:
            raise ValueError("The file is incomplete: it ends before its content does. Copy or download it again.")
        # Some programs fill the end of a file up.
        data = unpacker.unused_data.lstrip(b"\0")
    return b"".join(pieces)


def _is_shape(shape):
    if not isinstance(shape, tuple) or len(shape) > MOST_AXES:
        return False
    if not all(type(size) is int and 0 <= size < MOST_ELEMENTS for size in shape):
        return False
    # Also where there are no elements: PyTorch computes with the lengths of all axes.
    return prod(max(size, 1) for size in shape) < MOST_ELEMENTS


def _what(found):
    # Never what a thing holds: a file can put containers into each other until no text holds them.
    if isinstance(found, Name):
        return f"`{found.module[:100]}.{found.name[:100]}`"
    return f"something of type {type(found).__name__}"


def _words(error):
    return str(error) or type(error).__name__
