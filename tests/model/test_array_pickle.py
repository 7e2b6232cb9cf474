from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model
from model.array_pickle import MAX_OPERATIONS, load_arrays

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "float32": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "float16": np.arange(5, dtype=np.float16),
    "int64": np.array([[-1, 2**60]]),
    "bool": np.array([True, False]),
    "big-endian": np.arange(3, dtype=">f4"),
    "Fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(10, dtype=np.int32)[::3],
    "no axis": np.array(7.5, dtype=np.float32),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


class _Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def _op(name: str, *arguments: bytes) -> bytes:
    return bytes(getattr(pickle, name)) + b"".join(arguments)


def _text(text: str) -> bytes:
    return _op("BINUNICODE", struct.pack("<I", len(text)), text.encode())


# As Python 2.7 with NumPy 1.16 wrote `{'w': numpy.array([1, 2], '<f4'), u'é': [1.5, None, True], 'n': 2**40}`
# in protocol 2, op by op: text is bytes there, and a whole number beyond 32 bits is text.
PYTHON_2 = b"".join(
    [
        b"\x80\x02}q\x01(U\x01wq\x02",
        b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05",
        b"(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02f4K\x00K\x01\x87Rq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff",
        b"K\x00tb\x89U\x08" + np.array([1, 2], "<f4").tobytes() + b"tb",
        b"X\x02\x00\x00\x00\xc3\xa9](G?\xf8\x00\x00\x00\x00\x00\x00N\x88e",
        b"U\x01nI1099511627776\nu.",
    ]
)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", list(ARRAYS))
def test_arrays_come_back(name: str, protocol: int) -> None:
    array = ARRAYS[name]
    loaded = load_arrays(pickle.dumps({"x": array, "again": array}, protocol))
    assert isinstance(loaded, dict)
    assert loaded["x"].dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(loaded["x"], array, strict=name != "big-endian")
    assert loaded["again"] is loaded["x"]
    assert loaded["x"].flags.writeable
    assert loaded["x"].flags.c_contiguous


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_containers_come_back(protocol: int) -> None:
    values = {
        "model": OrderedDict([("a", 1), ("b", np.float32(0.5))]),
        "nested": [(), (1,), ("x", None, -2.5), [b"\xff\x00", b""], {3: True}, {"é", "e"}, set()],
        "numbers": [0, -1, 2**31, -(2**63), 2**200, np.int64(-4), np.bool_(True)],
    }
    loaded = load_arrays(pickle.dumps(values, protocol))
    assert loaded == values


def test_what_python_2_wrote_is_read() -> None:
    loaded = load_arrays(PYTHON_2)
    assert isinstance(loaded, dict)
    np.testing.assert_array_equal(loaded.pop("w"), np.array([1, 2], np.float32), strict=True)
    assert loaded == {"é": [1.5, None, True], "n": 2**40}
    theirs = pickle.loads(PYTHON_2, encoding="latin1")
    np.testing.assert_array_equal(theirs["w"], [1, 2])  # that is: the bytes above are a pickle


def test_names_of_numpy_2_are_read() -> None:
    contents = pickle.dumps(ARRAYS["float32"], 2)
    for old, new in ((b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")):
        np.testing.assert_array_equal(load_arrays(contents.replace(old, new)), ARRAYS["float32"])


def test_attributes_of_an_ordered_dict_are_left_aside() -> None:
    tensors = OrderedDict(w=np.zeros(2, np.float32))
    tensors._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert list(load_arrays(pickle.dumps(tensors, 2))) == ["w"]  # type: ignore[call-overload]


def _malicious(canary: Path) -> dict[str, tuple[object, str]]:
    """Objects whose unpickling leaves a file, and the name that must be refused."""
    command = f"touch {canary}"
    made = _Calls(os.mkdir, str(canary))
    return {
        "system": (_Calls(os.system, command), "posix.system"),
        "eval": (_Calls(builtins.eval, f"__import__('os').mkdir({str(canary)!r})"), "eval"),
        "within": ({"model": {"a": [np.zeros(2), (made,)]}}, "mkdir"),
        "numpy.load": (_Calls(np.load, str(canary), "r", True), "load"),
        "numpy.fromfile": (_Calls(np.fromfile, str(canary)), "fromfile"),
        "numpy.memmap": (_Calls(np.memmap, str(canary), "u1", "w+", 0, 4), "memmap"),
        "key": ({_Calls(os.system, command): 1}, "posix.system"),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["system", "eval", "within", "numpy.load", "numpy.fromfile", "numpy.memmap", "key"])
def test_calls_are_refused_and_do_not_happen(kind: str, protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    attack, name = _malicious(canary)[kind]
    contents = pickle.dumps(attack, protocol)
    with pytest.raises(ValueError, match=rf"asks for '[\w.]*{name}'.*nothing was run.*as a dict by name"):
        load_arrays(contents)
    assert not canary.exists()
    if kind not in ("numpy.load", "numpy.fromfile"):  # these only read
        pickle.loads(contents)
        assert canary.exists()  # that is: pickle itself would have run it


def test_chains_of_attributes_are_refused(tmp_path: Path) -> None:
    """Protocol 4 follows dots: `numpy` and `f2py.os.system` would be a call of NumPy's."""
    canary = tmp_path / "ran"
    arguments = _text(f"touch {canary}") + _op("TUPLE1") + _op("REDUCE") + _op("STOP")
    for module, name in (("os", "system"), ("numpy", "f2py.os.system"), ("numpy.core", "multiarray.os.system")):
        by_stack = b"\x80\x04" + _text(module) + _text(name) + _op("STACK_GLOBAL") + arguments
        by_line = b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments
        for contents in (by_stack, by_line):
            with pytest.raises(ValueError, match=rf"asks for '{module}\.{name}'"):
                load_arrays(contents)
    getattr_chain = b"\x80\x02cbuiltins\ngetattr\nc__builtin__\neval\n" + _text("x") + _op("TUPLE2") + b"R."
    with pytest.raises(ValueError, match=r"asks for 'builtins\.getattr'"):
        load_arrays(getattr_chain)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"\x80\x02cnumpy\nndarray\n(K\x04tR.", "calls what is no function"),
        (b"\x80\x02cnumpy\nndarray\n.", "bare numpy.ndarray"),
        (b"\x80\x02c_codecs\nencode\n.", "bare _codecs.encode"),
        (b"\x80\x02c_codecs\nencode\n}U\x0c__setstate__K\x01sb.", "gives a state to a _Global"),
        (b"\x80\x02(cposix\nsystem\nK\x01l.", "asks for 'posix.system'"),
        (b"\x80\x02(S'true'\niposix\nsystem\n.", "opcode STRING"),
        (b"\x80\x02(iposix\nsystem\n.", "opcode INST .posix system."),
        (b"\x80\x02c__builtin__\nset\n)\x81.", "opcode NEWOBJ"),
        (b"\x80\x02Pname\n.", "opcode PERSID"),
        (b"\x80\x02U\x01aQ.", "opcode BINPERSID"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02j\xff\xff\xff\xff.", "has no value"),
        (b"\x80\x02s.", "value is missing"),
        (b"\x80\x02t.", "mark is missing"),
        (b"\x80\x02}(K\x01u.", "key without a value"),
        (b"\x80\x02}]K\x01s.", "list as a key"),
        (b"\x80\x02\x8a\x09" + b"\xff" * 8 + b"\x00" + b"\x85\x90.", "mark is missing"),
        (b"\x80\x02}G?\xf0\x00\x00\x00\x00\x00\x00Ns.", "float as a key"),
        (b"\x80\x02}\x8a\x09" + b"\xff" * 8 + b"\x00Ns.", "int as a key"),
        (b"\x80\x02)K\x01a.", "adds to a tuple"),
        (b"\x80\x02ccollections\nOrderedDict\n](K\x01e\x85R.", "no pair"),
        (b"\x80\x02ccollections\nOrderedDict\n]R.", "calls what is no function"),
        (b"\x80\x02K\x01", "exhausted before seeing STOP"),
        (b"", "exhausted"),
        (b"<html>404</html>", "unknown"),
    ],
)
def test_pickles_that_are_wrong_say_how(contents: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_arrays(contents)


def test_arrays_of_objects_and_text_are_refused() -> None:
    for array, message in (
        (np.array([{}, None], dtype=object), "dtype 'O8'"),
        (np.array(["a", "bc"]), "dtype 'U2'"),
        (np.zeros(2, dtype=[("x", "f4")]), "dtype 'V4'"),
        (np.zeros(2, dtype=np.complex64), "dtype 'c8'"),
    ):
        for protocol in (2, 4, 5):
            with pytest.raises(ValueError, match=message):
                load_arrays(pickle.dumps(array, protocol))


def _array_of(shape: bytes, data: bytes, code: bytes = b"f4") -> bytes:
    """A pickle of one array whose shape and data need not fit."""
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87Rq\x00(K\x01"
        + shape
        + b"cnumpy\ndtype\nU\x02"
        + code
        + b"K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + data
        + b"tb."
    )


def _long(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (_long(2**38) + b"\x85", "has 4 bytes"),
        (_long(2**70) + b"\x85", "count"),
        (_long(-1) + b"\x85", "count"),
        (b"K\x01K\x02\x86", "has 4 bytes"),
        (b"(" + b"K\x01" * 40 + b"t", "no dtype or shape"),
        (b"(K\x00" + _long(2**39) * 3 + b"t", "has 4 bytes"),
        (b"N", "no dtype or shape"),
    ],
)
def test_claimed_sizes_must_be_the_files(shape: bytes, message: str) -> None:
    assert load_arrays(_array_of(b"K\x01\x85", b"U\x04" + bytes(4))) == np.zeros(1)
    with pytest.raises(ValueError, match=message):
        load_arrays(_array_of(shape, b"U\x04" + bytes(4)))


def test_an_empty_array_cannot_be_long_beyond_numpy() -> None:
    with pytest.raises(ValueError, match="array cannot be"):
        load_arrays(_array_of(b"(K\x00" + _long(2**39) * 3 + b"t", b"U\x00"))


def _hostile() -> dict[str, tuple[bytes, str]]:
    """Small files that would have a plain unpickler take gigabytes or for ever, and what is said of them."""
    text = _text("\x00" * 100_000) + b"q\x00" + _text("latin1") + b"q\x01c_codecs\nencode\nq\x02"
    numbers = b"](" + b"K\x01" * 20_000 + b"eq\x00"
    doubled = b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60))
    many = struct.pack("<Q", 2**62)
    memory = "more memory than its length explains"
    return {
        "bytes beyond the end": (b"\x80\x04\x8e" + many + b"x.", "only 2 remain"),
        "text beyond the end": (b"\x80\x04\x8d" + many + b"x.", "only 2 remain"),
        "frame beyond the end": (b"\x80\x04\x95" + many + b"\x8e" + many + b".", "only 1 remain"),
        "text made bytes again and again": (b"\x80\x02" + text + b"h\x02h\x00h\x01\x86R" * 5_000 + b".", memory),
        "list made a set again and again": (
            b"\x80\x02" + numbers + b"c__builtin__\nset\nq\x01" + b"h\x01h\x00\x85R" * 5_000 + b".",
            memory,
        ),
        "list taken for many pairs": (
            b"\x80\x02" + numbers + b"ccollections\nOrderedDict\n](" + b"h\x00" * 10_000 + b"e\x85R.",
            "no pair",
        ),
        "long text as a key": (b"\x80\x02}" + _text("x" * 2**16) + b"Ns.", "str as a key"),
        "pairs of pairs as a key": (b"\x80\x02K\x01q\x00" + doubled + b"}h\x00Ns.", "tuple as a key"),
        "marks": (b"\x80\x02" + b"(" * (MAX_OPERATIONS + 1) + b".", f"more than {MAX_OPERATIONS} operations"),
    }


@pytest.mark.parametrize("kind", list(_hostile()))
def test_memory_and_time_are_bounded(kind: str) -> None:
    contents, message = _hostile()[kind]
    with _bounds(), pytest.raises(ValueError, match=message):
        load_arrays(contents)


def test_a_memo_far_away_takes_no_memory() -> None:
    with _bounds():
        assert load_arrays(b"\x80\x02Nr\xff\xff\xff\xff.") is None


@contextmanager
def _bounds() -> Iterator[None]:
    """Far above what is taken, far below what an attack wants."""
    tracemalloc.start()
    start = time.thread_time()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.thread_time() - start < 30
    assert peak < 200e6


def test_shared_structure_is_walked_once() -> None:
    """2**60 paths lead to the last pair."""
    value: object = (1, 1)
    for _ in range(60):
        value = (value, value)
    loaded = load_arrays(pickle.dumps(value))
    for _ in range(60):
        assert isinstance(loaded, tuple)
        loaded = loaded[1]
    assert loaded == (1, 1)
    endless: list[object] = []
    endless.append(endless)
    again = load_arrays(pickle.dumps(endless))
    assert isinstance(again, list)
    assert again[0] is again


WHOLE = pickle.dumps({"model": {"w": ARRAYS["float32"], "b": np.float32(2)}, "__author__": "x", "n": [1, (2,)]}, 2)


def test_a_file_cut_anywhere_is_refused() -> None:
    for whole in (WHOLE, PYTHON_2, pickle.dumps(ARRAYS["float32"], 4), pickle.dumps(ARRAYS["float32"], 5)):
        load_arrays(whole)
        for length in range(len(whole)):
            with pytest.raises(ValueError, match="pickle"):
                load_arrays(whole[:length])


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_altered_bytes_give_a_value_error_or_plain_values(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from([WHOLE, PYTHON_2, pickle.dumps([ARRAYS["int64"], {"a"}], 5)])))
    places = st.integers(0, len(whole) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        whole[place] = value
    try:
        loaded = load_arrays(bytes(whole))
    except ValueError:
        return
    assert _is_plain(loaded)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, bytes, int, float, bool, np.ndarray, np.generic))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([bytes([code]) for code in b"(})]taeshgqRbN\x85\x86\x87K\x01U\x8f\x90\x93\x94"]), max_size=40
    )
)
def test_any_order_of_opcodes_gives_a_value_error_or_a_value(codes: list[bytes]) -> None:
    try:
        load_arrays(b"\x80\x04" + b"".join(codes) + b".")
    except ValueError:
        return


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_torch_with_a_call_is_refused_too(zipped: bool, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    file = io.BytesIO()
    attack = {"model": {"w": torch.zeros(1)}, "hook": _Calls(os.system, f"touch {canary}")}
    torch.save(attack, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"could run code.*state_dict\(\) alone"):
        model.describe(file.getvalue())
    assert not canary.exists()
