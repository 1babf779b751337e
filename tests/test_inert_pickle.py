"""Pickles are read without being run: arrays and containers come out, everything else is refused by its name."""

import collections
import copyreg
import gzip
import io
import os
import pickle
import random
import struct

import numpy as np
import pytest
import torch

from hf_reformer.modeling.conversion import inert_pickle
from hf_reformer.modeling.conversion.inert_pickle import (
    SavedArray,
    SavedRecord,
    read_maybe_gzip,
    read_npy_arrays,
    read_pickle,
)


class Signature:
    """Stands for a class of trax whose objects are kept as records."""

    __slots__ = ("dtype", "shape")


RECORD = (__name__, "Signature")
DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"]


def unfold(value):
    """Arrays of a result as tensors."""
    if isinstance(value, SavedArray):
        return value.tensor()
    if isinstance(value, dict):
        return {key: unfold(item) for key, item in value.items()}
    return type(value)(map(unfold, value)) if isinstance(value, list | tuple) else value


# --- what is read ---


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_and_numbers(protocol):
    value = {
        "a": [1, -2, 2**70, 0.5, None, True, False],
        "b": (),
        "c": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        5: "é",
    }
    value["twice"] = value["a"]
    found = read_pickle(pickle.dumps(value, protocol=protocol))
    assert found == value
    assert found["twice"] is found["a"]
    if protocol > 2:
        assert read_pickle(pickle.dumps(b"x" * 300, protocol=protocol)) == b"x" * 300


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("code", DTYPES)
def test_arrays(code, protocol):
    array = (np.arange(24).reshape(2, 3, 4) % 2).astype(code)
    # Also one that is no contiguous piece of memory, one in columns, one without elements, one number.
    arrays = [array, array[:, ::2], np.asfortranarray(array), array[:0], array[0, 0, 1]]
    found = unfold(read_pickle(pickle.dumps(arrays, protocol=protocol)))
    for tensor, expected in zip(found, arrays, strict=True):
        assert tensor.shape == expected.shape and tensor.is_contiguous()
        assert np.array_equal(tensor.numpy(), expected) and tensor.numpy().dtype == expected.dtype
        tensor.view(torch.uint8 if code == "b1" else tensor.dtype).zero_()


def test_both_names_of_numpys_inner_package():
    pickled = pickle.dumps(np.ones(3, np.float32), protocol=2)
    old, new = pickled.replace(b"numpy._core", b"numpy.core"), pickled.replace(b"numpy.core", b"numpy._core")
    assert old != new
    assert torch.equal(unfold(read_pickle(old)), unfold(read_pickle(new)))


def test_dicts_with_a_factory_are_dicts():
    table = collections.defaultdict(list, {"loss": [(1, np.float32(0.5))]})
    for value in (table, collections.OrderedDict(table)):
        found = read_pickle(pickle.dumps(value, protocol=4))
        assert type(found) is dict and unfold(found)["loss"][0][1] == 0.5


def test_records_are_not_made_into_objects():
    signature = Signature()
    signature.shape, signature.dtype = (2, 3), np.dtype("f4")
    found = read_pickle(pickle.dumps(signature, protocol=4), records={RECORD})
    assert type(found) is SavedRecord and (found.name.module, found.name.name) == RECORD
    assert found.state[1]["shape"] == (2, 3)
    with pytest.raises(ValueError, match=r"names `test_inert_pickle.Signature`"):
        read_pickle(pickle.dumps(signature, protocol=4))


def test_bfloat16_of_ml_dtypes():
    array = np.arange(3, dtype=np.uint16)
    pickled = pickle.dumps(array, protocol=2).replace(b"X\x02\x00\x00\x00u2", b"cml_dtypes\nbfloat16\n")
    assert unfold(read_pickle(pickled)).equal(torch.from_numpy(array).view(torch.bfloat16))


def test_arrays_of_jax():
    _, (function, arguments, state) = None, np.ones((2, 2), np.float32).__reduce__()
    pickled = reduced("jax._src.array", "_reconstruct_array", function, arguments, state, {"weak_type": False})
    assert unfold(read_pickle(pickled)).equal(torch.ones(2, 2))
    for bad in (os.system, np.dtype):
        pickled = reduced("jax._src.array", "_reconstruct_array", bad, ("true",), state, {})
        with pytest.raises(ValueError, match=r"names `(posix|nt).system`|is made by `numpy.dtype`"):
            read_pickle(pickled)


def reduced(module, name, *arguments):
    """A pickle that calls `module.name` with arguments."""
    body = pickle.dumps(arguments, protocol=2)[2:-1]
    return b"\x80\x02" + f"c{module}\n{name}\n".encode() + body + b"R."


# --- what is refused, and runs nothing ---


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def evil(path):
    return Calls(os.system, f"echo ran > {path}")


def stacked_name(module, name, argument):
    """Names put together on the stack."""
    text = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)]
    return b"\x80\x04" + b"".join(text) + b"\x93" + b"\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."


def object_scalar(path):
    """NumPy's own `scalar` unpickles what it is given, if the dtype says objects."""
    inner = pickle.dumps(evil(path))
    return reduced("numpy.core.multiarray", "scalar", np.dtype("O"), inner)


def with_state(setup, state):
    """A pickle that sets the state of whatever `setup` leaves on the stack."""
    return b"\x80\x02" + setup + pickle.dumps(state, protocol=2)[2:-1] + b"b."


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R".replace(
    b"U\x01b", b"X\x01\x00\x00\x00b"
)
FLOAT = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R"
PICKLES = {
    "os.system": (lambda path: pickle.dumps(evil(path)), r"names `(posix|nt)\.system`"),
    "in an array": (lambda path: pickle.dumps(np.array([evil(path)], dtype=object)), r"names `(posix|nt)\.system`"),
    "objects": (lambda path: pickle.dumps(np.array([{}], dtype=object)), r"dtype '\|O8'|instead of bytes"),
    "object scalar": (object_scalar, r"dtype '\|O8'"),
    "eval": (lambda path: reduced("builtins", "eval", "1"), "names `builtins.eval`"),
    "eval, stacked": (lambda path: stacked_name("builtins", "eval", "1"), "names `builtins.eval`"),
    "attribute": (lambda path: stacked_name("numpy", "dtype.__class__", "f4"), "names `numpy.dtype.__class__`"),
    "getattr": (lambda path: reduced("builtins", "getattr", 1, "real"), "names `builtins.getattr`"),
    "load": (lambda path: reduced("numpy", "load", str(path)), "names `numpy.load`"),
    "codecs": (lambda path: reduced("_codecs", "encode", "x", "rot13"), "arguments that are not expected"),
    "codecs lookup": (lambda path: reduced("_codecs", "lookup", "x"), "names `_codecs.lookup`"),
    "jax": (lambda path: reduced("jax", "jit", 1), "names `jax.jit`"),
    "newobj": (lambda path: b"\x80\x02cnumpy\nndarray\n)\x81.", r"an object of `numpy.ndarray`"),
    "newobj_ex": (lambda path: b"\x80\x04cnumpy\nndarray\n)}\x92.", "operation NEWOBJ_EX"),
    "inst": (lambda path: b"\x80\x02(ios\nsystem\n.", "operation INST"),
    "obj": (lambda path: b"\x80\x02(cnumpy\nndarray\no.", "operation OBJ"),
    "persistent": (lambda path: b"\x80\x02Pid\n.", "operation PERSID"),
    "persistent, binary": (lambda path: b"\x80\x02X\x01\x00\x00\x00aQ.", "operation BINPERSID"),
    "extension": (lambda path: b"\x80\x02\x82\x01.", "operation EXT1"),
    "out of band": (lambda path: b"\x80\x05\x97.", "operation NEXT_BUFFER"),
    "set": (lambda path: pickle.dumps({1}, protocol=4), "operation EMPTY_SET"),
    "protocol 0": (lambda path: pickle.dumps([1], protocol=0), "operation (PUT|INT|LONG)"),
    "state of a name": (lambda path: with_state(b"cnumpy\ndtype\n", {"x": 1}), "state is set where there is no array"),
    "state of a list": (lambda path: with_state(b"]", {"x": 1}), "state is set where there is no array"),
    "call of a list": (lambda path: b"\x80\x02])R.", "something of type list is called"),
    "call of an array": (lambda path: b"\x80\x02" + ARRAY + b")R.", "something of type SavedArray is called"),
    "fields": (lambda path: pickle.dumps(np.zeros(2, dtype=[("a", "f4")]), protocol=2), "a dtype has fields"),
    "fields of a number": (
        lambda path: with_state(FLOAT, (3, "<", None, ("a",), {}, -1, -1, 0)),
        "a dtype has fields",
    ),
    "no bytes": (lambda path: with_state(ARRAY, (1, (2,), np.dtype("f4"), False, "abcdefgh")), "instead of bytes"),
    "big-endian": (lambda path: pickle.dumps(np.zeros(2, ">f4"), protocol=2), "dtype '>f4'"),
    "key": (lambda path: pickle.dumps({(1,): 2}), "a dict has a key of type tuple"),
    "no stack": (lambda path: b"\x80\x02R.", "nothing to work on"),
    "no mark": (lambda path: b"\x80\x02t.", "nothing to work on"),
    "no memo": (lambda path: b"\x80\x02h\x05.", "damaged"),
    "empty": (lambda path: b"", "damaged or incomplete"),
    "text": (lambda path: b"not a pickle", "damaged|operation"),
    "old numpy name": (lambda path: reduced("numpy.core.multiarray", "fromstring", "x"), "multiarray.fromstring`"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_are_refused(name, tmp_path):
    make, message = PICKLES[name]
    pickled = make(tmp_path / "ran")
    with pytest.raises(ValueError, match=message):
        read_pickle(pickled)
    assert not list(tmp_path.iterdir())


def test_the_dangerous_ones_are_dangerous(tmp_path):
    """Python's own reader runs what this one refuses, so the tests above try what they should."""
    for name in ("os.system", "in an array"):
        make, _ = PICKLES[name]
        pickle.loads(make(tmp_path / "ran"))
        assert (tmp_path / "ran").exists(), name
        (tmp_path / "ran").unlink()


def test_the_extension_registry_is_not_asked(tmp_path):
    copyreg.add_extension("os", "system", 200)
    try:
        with pytest.raises(ValueError, match="operation EXT1"):
            read_pickle(b"\x80\x02\x82\xc8X\x04\x00\x00\x00true\x85R.")
    finally:
        copyreg.remove_extension("os", "system", 200)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2**40,), "needs 4398046511104 bytes, and the file has 8"),
        ((2**30, 2**30), "needs .* bytes, and the file has 8"),
        ((-2,), "for its shape"),
        ((2**80, 0), "for its shape"),
        ((2**40, 2**40, 0), "for its shape"),
        ((1,) * 100 + (2,), "for its shape"),
        ([2], "for its shape"),
        ((2.0,), "for its shape"),
    ],
)
def test_shapes_that_do_not_fit_the_bytes(shape, message):
    _, _, (version, _, dtype, order, data) = np.ones(2, np.float32).__reduce__()
    with pytest.raises(ValueError, match=message):
        read_pickle(with_state(ARRAY, (version, shape, dtype, order, data)))


def test_few_bytes_do_not_become_many():
    """Each level holds the one below twice: whoever looks at all of it does not end."""
    nested = b")" + b"q\x00h\x00\x86" * 1000
    assert len(read_pickle(b"\x80\x02" + nested + b".")) == 2
    with pytest.raises(ValueError, match="an array has something of type tuple for its shape"):
        read_pickle(b"\x80\x02" + ARRAY + b"(K\x01" + nested + b"NK\x00Ntb.")
    with pytest.raises(ValueError, match="key of type tuple"):
        read_pickle(b"\x80\x02}" + nested + b"Ns.")


def test_a_text_is_not_encoded_again_and_again():
    """Each time as bytes of its own, many times what the file holds."""
    once = b"cnumpy\nndarray\n0" + b"c_codecs\nencode\nq\x00" + b"X" + struct.pack("<I", 1000) + b"x" * 1000 + b"q\x01"
    again = b"h\x00h\x01X\x06\x00\x00\x00latin1\x86R"
    with pytest.raises(ValueError, match="makes more bytes than it holds"):
        read_pickle(b"\x80\x02" + once + again * 10 + b".")


def test_lengths_of_axes_are_bounded():
    """Their product is a number that no computer would finish."""
    state = pickle.dumps((np.zeros(1, np.float32),), 2)
    with pytest.raises(ValueError, match="for its shape"):
        inert_pickle.SavedArray().fill(inert_pickle.SavedDtype("f4", "<"), (2**8_000_000,) * 64, b"")
    assert read_pickle(state)[0].tensor().shape == (1,)


def test_the_number_of_operations_is_bounded(monkeypatch):
    monkeypatch.setattr(inert_pickle, "MOST_OPERATIONS", 100)
    assert len(read_pickle(pickle.dumps([None] * 50, protocol=4))) == 50
    with pytest.raises(ValueError, match="more than 100 operations"):
        read_pickle(pickle.dumps([None] * 100, protocol=4))


def checkpoint():
    """Everything that is read, in one pickle."""
    table = collections.defaultdict(list, {"loss": [(1, np.float32(0.5))]})
    value = {
        "weights": [np.ones((3, 4), np.float32), np.asfortranarray(np.ones((3, 4)))],
        "history": table,
        "n": (1, "a"),
    }
    return [pickle.dumps(value, protocol=protocol) for protocol in (2, 4, 5)]


@pytest.mark.parametrize("pickled", checkpoint(), ids=["protocol 2", "protocol 4", "protocol 5"])
def test_every_early_end_is_noticed(pickled):
    for end in range(len(pickled)):
        with pytest.raises(ValueError, match="damaged"):
            read_pickle(pickled[:end])


@pytest.mark.parametrize("pickled", checkpoint(), ids=["protocol 2", "protocol 4", "protocol 5"])
def test_whatever_the_bytes_are_it_is_a_value_error_or_data(pickled):
    draw = random.Random(0)
    for _ in range(3000):
        damaged = bytearray(pickled)
        for _ in range(draw.choice([1, 1, 2, 5])):
            damaged[draw.randrange(len(damaged))] = draw.choice([draw.randrange(256), *b"Rb.()tc\x93\x81\x85\x86"])
        try:
            found = read_pickle(bytes(damaged))
        except ValueError:
            continue
        assert isinstance(found, dict | list | tuple | int | str | bytes | float | SavedArray | bool | None) or found


# --- gzip and .npy ---


def test_gzip_or_not():
    data = os.urandom(1000)
    assert read_maybe_gzip(data if data[:2] != b"\x1f\x8b" else b"x") in (data, b"x")
    packed = gzip.compress(data)
    assert read_maybe_gzip(packed) == data
    # Files may be put together, and filled up with zeros.
    assert read_maybe_gzip(packed + gzip.compress(b"more") + b"\0" * 10) == data + b"more"


def test_a_file_is_not_thousands_of_packed_ones():
    with pytest.raises(ValueError, match="consists of more than 1000 packed files"):
        read_maybe_gzip(gzip.compress(b"") * 1001)


def test_gzip_files_that_are_damaged_or_grow(monkeypatch):
    packed = gzip.compress(os.urandom(1000))
    for end in (5, 100, len(packed) - 1):
        with pytest.raises(ValueError, match="incomplete"):
            read_maybe_gzip(packed[:end])
    with pytest.raises(ValueError, match="damaged"):
        read_maybe_gzip(packed[:200] + bytes(100) + packed[300:])
    monkeypatch.setattr(inert_pickle, "SMALL_FILE", 1000)
    with pytest.raises(ValueError, match="more than 64 times its size"):
        read_maybe_gzip(gzip.compress(bytes(10**6)))


def npy(*arrays):
    stream = io.BytesIO()
    for array in arrays:
        np.save(stream, array)
    return stream.getvalue()


def test_npy_arrays_one_after_the_other():
    arrays = [np.arange(6, dtype=code).reshape(2, 3) for code in DTYPES if code != "b1"]
    arrays += [np.asfortranarray(arrays[1]), np.float32(3), np.zeros((0, 2), np.float32)]
    found = [array.tensor().numpy() for array in read_npy_arrays(npy(*arrays))]
    for tensor, expected in zip(found, arrays, strict=True):
        assert np.array_equal(tensor, expected) and tensor.dtype == expected.dtype
    assert read_npy_arrays(b"") == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.ones(3, np.float32))[:-1], "needs 12 bytes, and the file has 11"),
        (npy(np.ones(3, ">f4")), "dtype '>f4'"),
        (npy(np.ones(3, [("a", "f4")])), "is described as"),
        (npy(np.ones(3, np.float32)) + b"rest", "there is no array at byte 140"),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9) + b"open('x')", "has no description"),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 3) + b"[1]", "has no description"),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 6) + b"{[]:1}", "has no description"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31), "there is no array at byte 0"),
    ],
)
def test_npy_files_that_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        read_npy_arrays(data)
