"""Reading pickles of NumPy arrays and plain containers without running anything: bytes enter, the object leaves.

Nothing that a pickle names is imported or called. The opcodes of protocols 2 to 5 (see `pickletools`) move values about
a stack of our own; the few names that rebuild an array are worked out here and every other name is refused. Time and
memory are bounded by the length of the file.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

MAX_OPERATIONS = 200_000
"""Opcodes of one pickle; a file of weights has some thousands."""

_ENTRY_BYTES = 64
_SLACK_BYTES = 1 << 20
_LONGEST_KEY = 2**16
_LARGEST_KEY = 2**32  # whole numbers hash to themselves: larger ones can be chosen to collide
_DTYPES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})

_ADVICE = "could run code; nothing was run; save the network's arrays alone, as a dict by name"


def load_arrays(contents: bytes) -> object:
    """What a pickle holds: NumPy arrays and numbers, text, bytes, truth values, None, and containers of these.

    Keys of a dict and members of a set are text, bytes, small whole numbers or None; an OrderedDict is read as a dict.
    Text that Python 2 wrote is taken as Latin-1.

    Raises:
        ValueError: the pickle holds anything else, or is cut short or damaged.
    """
    machine = _Machine(contents)
    for number, (name, argument) in enumerate(_operations(contents)):
        if number >= MAX_OPERATIONS:
            _damaged(f"it has more than {MAX_OPERATIONS} operations")
        if name == "STOP":
            break
        if name in _AS_READ:
            machine.stack.append(argument)
        elif name in _MOVES:
            _MOVES[name](machine, argument)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(
                f"the pickle has the opcode {name} ({str(argument)[:80]}), which no array needs and which {_ADVICE}"
            )
    return _finished(machine.pop())


class _Global:
    """A name that was admitted in place of a value."""

    def __init__(self, name: str) -> None:
        if name not in _CALLS and name != _ARRAY:
            raise ValueError(
                f"the pickle asks for {name[:80]!a}, which is neither an array nor a plain container and {_ADVICE}"
            )
        self.name = name


class _DType:
    """Kind and size of an array's numbers, and their byte order once it is given."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "="


class _Unbuilt:
    """An array that was announced and whose shape and numbers are still to come."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        """Of the memo, where it stands for the array."""


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, contents: bytes) -> None:
        self.stack: list[object] = []
        self.outer: list[list[object]] = []
        """The stacks below each mark."""
        self.memo: dict[int, object] = {}
        self.unspent = 2 * len(contents) + _SLACK_BYTES
        """Bytes that may still be made: what a file shares must not be multiplied in memory."""

    def spend(self, num_bytes: int) -> None:
        self.unspent -= num_bytes
        if self.unspent < 0:
            _damaged("it asks for more memory than its length explains")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self, count: int = 1) -> Any:
        """The last value, or a tuple of the last two or three."""
        if len(self.stack) < count:
            _damaged("a value is missing")
        taken = tuple(self.stack.pop() for _ in range(count))[::-1]
        return taken if count > 1 else taken[0]

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[object]:
        if not self.outer:
            _damaged("a mark is missing")
        taken, self.stack = self.stack, self.outer.pop()
        return taken

    def put(self, key: object) -> None:
        value = self.pop()
        self.push(value)
        self.memo[_count(key)] = value
        if isinstance(value, _Unbuilt):
            value.keys.append(_count(key))

    def get(self, key: object) -> None:
        if _count(key) not in self.memo:
            _damaged(f"it has no value {key}")
        self.push(self.memo[_count(key)])

    def extend(self, values: list[object]) -> None:
        """Add values to the list, dict or set on the stack."""
        target = self.pop()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, dict):
            target.update(_dict(values))
        elif isinstance(target, set):
            target.update(map(_key, values))
        else:
            _damaged(f"it adds to a {type(target).__name__}")
        self.push(target)

    def reduce(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, _Global) or function.name not in _CALLS or not isinstance(arguments, tuple):
            _damaged("it calls what is no function")
        self.push(_CALLS[function.name](self, arguments))

    def build(self) -> None:
        """Give the value below the top its state."""
        target, state = self.pop(2)
        if isinstance(target, _Unbuilt):
            _, shape, dtype, is_fortran, data = _several(state, 5)
            array = self.array(data, dtype, shape, "F" if _count(is_fortran) else "C")
            self.memo.update((key, array) for key in target.keys if self.memo[key] is target)
            target = array
        elif isinstance(target, _DType):
            order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
            if not isinstance(order, str) or order not in ("<", ">", "|", "="):
                _damaged("a dtype has no byte order")
            target.order = order
        elif not isinstance(target, dict):  # whose state are attributes that torch gives an OrderedDict
            _damaged(f"it gives a state to a {type(target).__name__}")
        self.push(target)

    def array(self, data: object, dtype: object, shape: object, order: object) -> NDArray[Any]:
        """A copy of the data as an array in this machine's byte order."""
        if isinstance(data, list):
            raise ValueError("the pickle has an array of objects; save arrays of numbers alone")
        if not isinstance(dtype, _DType) or not isinstance(shape, tuple) or len(shape) > 32:
            _damaged("an array has no dtype or shape")
        raw, lengths = _latin1(data), tuple(map(_count, shape))
        stored = np.dtype(dtype.code).newbyteorder(dtype.order)  # type: ignore[arg-type]
        if len(raw) != math.prod(lengths) * stored.itemsize:
            _damaged(f"an array {lengths} of {dtype.code} has {len(raw)} bytes")
        self.spend(len(raw))
        try:
            in_file: NDArray[Any] = np.ndarray(lengths, stored, raw, order="F" if order == "F" else "C")
        except ValueError as error:  # empty, yet along another axis too long for NumPy
            _damaged(f"an array cannot be {lengths}: {error}")
        return in_file.astype(dtype.code, order="C")

    def new_buffer(self, arguments: object) -> NDArray[Any]:
        return self.array(*_several(arguments, 4))

    def new_number(self, arguments: object) -> object:
        dtype, data = _several(arguments, 2)
        return self.array(data, dtype, (), "C")[()]

    def new_dtype(self, arguments: object) -> _DType:
        code = _several(arguments, 3)[0]
        if not isinstance(code, str) or code not in _DTYPES:
            raise ValueError(f"the pickle has an array of dtype {str(code)[:40]!a}; save arrays of numbers alone")
        return _DType(code)

    def new_bytes(self, arguments: object) -> bytes:
        """Those that a protocol without bytes writes as text."""
        text, encoding = _several(arguments or ("", "latin1"), 2)
        if encoding not in ("latin1", "latin-1"):
            _damaged("bytes are not given as Latin-1")
        encoded = _latin1(text)
        self.spend(len(encoded))
        return encoded

    def new_dict(self, arguments: object) -> dict[object, object]:
        pairs = self.members(arguments)
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            _damaged("an item of a dict is no pair")
        return _dict([value for pair in pairs for value in pair])  # type: ignore[attr-defined]

    def members(self, arguments: object) -> list[object]:
        """Of the list that a container is made from."""
        (members,) = _several(arguments or ([],), 1)
        if not isinstance(members, list):
            _damaged("a container is not made from a list")
        self.spend(_ENTRY_BYTES * len(members))
        return members


def _operations(contents: bytes) -> Iterator[tuple[str, object]]:
    operations = pickletools.genops(BytesIO(contents))
    while True:
        try:
            opcode, argument, _ = next(operations)
        except (ValueError, Warning) as error:  # a warning, where they are errors, of a backslash in a name
            _damaged(str(error))
        yield opcode.name, argument


def _finished(value: object) -> object:
    """The value, if it and all within it are plain."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, (_Global, _DType, _Unbuilt)):
            _damaged(f"it holds a bare {getattr(item, 'name', 'dtype or array')}")
        if isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return value


def _damaged(fault: str) -> NoReturn:
    raise ValueError(f"the pickle is cut short or damaged: {fault}; copy the file again")


def _several(values: object, count: int) -> tuple[Any, ...]:
    if not isinstance(values, tuple) or len(values) != count:
        _damaged(f"{count} values are wanted and others given")
    return values


def _count(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**40:
        _damaged("a count is none")
    return value


def _latin1(data: object) -> bytes:
    if isinstance(data, (bytes, bytearray)):
        return bytes(data)
    if not isinstance(data, str):
        _damaged("an array has no bytes")
    try:
        return data.encode("latin-1")
    except UnicodeEncodeError as error:
        _damaged(f"bytes are not Latin-1: {error.reason}")


def _key(value: object) -> object:
    """The value, if it is hashed and compared in a time that a file cannot stretch."""
    is_short = isinstance(value, (str, bytes)) and len(value) < _LONGEST_KEY
    if value is None or is_short or (isinstance(value, int) and abs(value) < _LARGEST_KEY):
        return value
    raise ValueError(
        f"the pickle has a {type(value).__name__} as a key or in a set; use short text or small whole numbers there"
    )


def _dict(values: list[object]) -> dict[object, object]:
    if len(values) % 2:
        _damaged("a dict has a key without a value")
    return {_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _name(names: tuple[object, object]) -> _Global:
    return _Global(".".join(str(name) for name in names))


_AS_READ = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    | {"BINSTRING", "SHORT_BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BYTEARRAY8", "NONE"}
)
"""Opcodes whose argument is the value."""

_MOVES: dict[str, Callable[[_Machine, object], None]] = {
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push((machine.pop(),)),
    "TUPLE2": lambda machine, _: machine.push(machine.pop(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.pop(3)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "MARK": lambda machine, _: machine.mark(),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "SETITEM": lambda machine, _: machine.extend(list(machine.pop(2))),
    **dict.fromkeys(("APPENDS", "SETITEMS", "ADDITEMS"), lambda machine, _: machine.extend(machine.since_mark())),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, key: machine.put(key)),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, key: machine.get(key)),
    "GLOBAL": lambda machine, names: machine.push(_Global(str(names).replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda machine, _: machine.push(_name(machine.pop(2))),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}

_ARRAY = "numpy.ndarray"
"""Stands among the arguments of `_reconstruct` and is never called."""

_CALLS: dict[str, Callable[[_Machine, object], object]] = {
    "numpy.dtype": _Machine.new_dtype,
    "_codecs.encode": _Machine.new_bytes,
    "collections.OrderedDict": _Machine.new_dict,
    **{
        f"{package}.{function}": call
        for package in ("numpy.core", "numpy._core")  # NumPy 1 and 2
        for function, call in {
            "multiarray._reconstruct": lambda machine, arguments: _Unbuilt(),
            "multiarray.scalar": _Machine.new_number,
            "numeric._frombuffer": _Machine.new_buffer,
        }.items()
    },
    **dict.fromkeys(("__builtin__.bytes", "builtins.bytes"), _Machine.new_bytes),  # Python 2 and 3
    **dict.fromkeys(
        ("__builtin__.set", "builtins.set"), lambda machine, arguments: set(map(_key, machine.members(arguments)))
    ),
}
"""What may be called."""
