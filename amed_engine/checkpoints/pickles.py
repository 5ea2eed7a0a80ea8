"""The one reader of pickles: a small machine that builds plain data and has no way to call anything.

Published AMED predictors and EDM networks are pickles that carry Python source and ask for it to be run. A pickle is a
program for a stack machine; this is that machine without its dangerous half. A name of a class or function stays a name
(`Ref`), an object becomes a `Record` of its class's name and state, source code is dropped unread, and the few functions
that published files call are replaced by ones of ours that only arrange data. Everything else is refused by name.
"""

from __future__ import annotations

import io
import mmap
import os
import pickletools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from amed_engine.checkpoints.plain_data import (
    MAX_NAME,
    Record,
    Ref,
    Refused,
    check_depth,
    check_key,
    check_literal,
    show,
)
from amed_engine.errors import FileFormatError, UnsafeFileError

MAX_OPERATIONS = 2_000_000  # a network of 300 million parameters has some 200,000
MAX_STACK = 50_000  # picklers put at most 2,000 things on it for each level of nesting
MARK = object()

Allowed = dict[str, Callable[..., Any]]  # full name -> what to do where the pickle calls it


class Policy(NamedTuple):
    """Which names a pickle may hold (`inert`), which it may call, what its persistent ids mean (None: refused), and whether a
    dictionary may have attributes, which are dropped."""

    inert: re.Pattern[str]
    calls: Allowed
    persistent: Callable[[Any], Any] | None = None
    attributes: bool = False


def run_file(path: str | os.PathLike, policy: Policy) -> Any:
    """The data in a pickle file. Raises UnsafeFileError for anything else than plain data, and for a damaged file."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return run(data, policy, str(path))
    except (ValueError, OSError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise UnsafeFileError(f"{path} cannot be read: {error}") from error


def run(stream: io.BytesIO | mmap.mmap, policy: Policy, where: str) -> Any:
    """The data of the pickle at the stream's position, which is moved behind it."""
    machine = _Machine(policy)
    position = 0
    try:
        for position, (operation, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if position > MAX_OPERATIONS or len(machine.stack) > MAX_STACK:
                raise Refused(f"more than {MAX_OPERATIONS} operations or {MAX_STACK} values on its stack")
            machine.step(operation.name, argument)
        check_depth(machine.top)
        (value,) = machine.stack
        return value
    except Refused as error:
        raise UnsafeFileError(f"{where} is refused: {error}; only plain data is read from a pickle") from error
    except Exception as error:  # whatever the standard library or a wrong operand makes of a damaged stream
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UnsafeFileError(f"{where} is no whole pickle, at operation {position}: {reason}") from error


class _Machine:
    def __init__(self, policy: Policy):
        self.policy, self.stack, self.memo = policy, [], {}

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(check_literal(argument))
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        elif name not in _IGNORED:
            raise Refused(f"it has the operation {name}")

    def protocol(self, version: int) -> None:
        if version > 5:
            raise Refused(f"it is of protocol {version}")

    def to_mark(self) -> list:
        """Everything above the last mark, taken off with it."""
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise Refused("it closes what it never opened")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    @property
    def top(self) -> Any:
        if self.stack[-1] is MARK:
            raise Refused("it takes a mark for a value")
        return self.stack[-1]

    def take(self, count: int) -> list:
        values = self.stack[-count:]
        if len(values) < count or any(value is MARK for value in values):
            raise Refused("it takes more than its stack holds")
        del self.stack[-count:]
        return values

    def put(self, index: int | None) -> None:
        index = len(self.memo) if index is None else int(index)
        if not 0 <= index <= len(self.memo):
            raise Refused(f"it claims place {index} of a memo of {len(self.memo)}")
        self.memo[index] = self.top

    def get(self, index: int) -> None:
        if int(index) not in self.memo:
            raise Refused(f"it asks for place {index} of a memo of {len(self.memo)}")
        self.stack.append(self.memo[int(index)])

    def name(self, module: Any, name: Any) -> None:
        ref = Ref(module, name)
        if not (isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= MAX_NAME):
            raise Refused(f"it names a global by something else than text of {MAX_NAME} characters")
        if str(ref) not in self.policy.calls and not self.policy.inert.fullmatch(str(ref)):
            raise Refused(f"it names {str(ref)[:200]!r}")
        self.stack.append(ref)

    def call(self) -> None:
        function, arguments = self.take(2)
        if not isinstance(function, Ref) or str(function) not in self.policy.calls:
            raise Refused(f"it calls {show(function)}")
        if not isinstance(arguments, tuple):
            raise Refused(f"it calls {function} with {show(arguments)}")
        self.stack.append(self.policy.calls[str(function)](*arguments))

    def new(self) -> None:
        cls, arguments = self.take(2)
        if not isinstance(cls, Ref) or arguments != ():
            raise Refused(f"it makes a {show(cls)} with arguments")
        maker = self.policy.calls.get(str(cls))
        self.stack.append(Record(str(cls)) if maker is None else maker())

    def build(self) -> None:
        (state,), target = self.take(1), self.top
        if isinstance(target, Record) and target.state is None:
            target.state = state
        elif not (isinstance(target, dict) and (not state or self.policy.attributes)):  # an EasyDict has none
            raise Refused(f"it gives a state to {show(target)}")

    def items(self, pairs: list) -> None:
        target = self._container(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[check_key(key)] = value

    def append(self, values: Iterable) -> None:
        self._container(list).extend(values)

    def add(self, values: Iterable) -> None:
        self._container(set).update(map(check_key, values))

    def persistent(self, ident: Any) -> None:
        if self.policy.persistent is None:
            raise Refused(f"it has the persistent id {show(ident)}")
        self.stack.append(self.policy.persistent(ident))

    def _container(self, kind: type) -> Any:
        # Exact types: a dict of ours never has methods of a file's making.
        if type(self.stack[-1]) is not kind:
            raise Refused(f"it puts items into {show(self.stack[-1])}")
        return self.stack[-1]


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: MARK,
}
_IGNORED = {"FRAME", "STOP"}
_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": _Machine.protocol,
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.to_mark(),
    "DUP": lambda m, _: m.stack.append(m.top),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.to_mark())),
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.take(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.take(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.take(3))),
    "LIST": lambda m, _: m.stack.append(m.to_mark()),
    "DICT": lambda m, _: (lambda pairs: (m.stack.append({}), m.items(pairs)))(m.to_mark()),
    "APPEND": lambda m, _: m.append(m.take(1)),
    "APPENDS": lambda m, _: m.append(m.to_mark()),
    "SETITEM": lambda m, _: m.items(m.take(2)),
    "SETITEMS": lambda m, _: m.items(m.to_mark()),
    "ADDITEMS": lambda m, _: m.add(m.to_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": lambda m, argument: m.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(*m.take(2)),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.new(),
    "BUILD": lambda m, _: m.build(),
    "PERSID": _Machine.persistent,
    "BINPERSID": lambda m, _: m.persistent(m.take(1)[0]),
}
