"""A pickle reader that executes nothing.

Pickle is a small stack language whose `GLOBAL` and `REDUCE` opcodes import and call anything. This machine runs the
same opcodes (protocols 0 to 5, decoded by `pickletools`), but a global is only ever a `Global`: a record of two
strings. Calls are looked up in a table the caller gives; whatever is not in it becomes an `Inert` record that carries
its name, arguments and state. So enums and settings of foreign packages do no harm and do not need those packages.
"""

import argparse
import collections
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mindspeed_llm.errors import InputError


class Global(NamedTuple):
    """A name a pickle refers to; never imported."""

    module: str
    name: str


@dataclass
class Inert:
    """What stands for an object of a class that is not known here: its name and the data it came with."""

    kind: Global
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        """For people: `<megatron.core.enums.ModelType (1,)>`."""
        return f"<{self.kind.module}.{self.kind.name} {self.arguments}>"


class Mark:
    """The stack's mark object."""


MARK = Mark()
Constructor = Callable[..., Any]

CONTAINERS: dict[Global, Constructor] = {
    Global("collections", "OrderedDict"): lambda *items: collections.OrderedDict(*items),
    # A default factory would be a callable from the file; the contents are what matters.
    Global("collections", "defaultdict"): lambda *factory: {},
    Global("argparse", "Namespace"): lambda: argparse.Namespace(),
    Global("types", "SimpleNamespace"): lambda: argparse.Namespace(),
    Global("_codecs", "encode"): lambda text, encoding="latin1": text.encode(plain_encoding(encoding)),
}
for _module in ("builtins", "__builtin__"):
    for _type in (set, frozenset, list, dict, tuple, bytearray, bytes, complex, slice, int, float, str, bool):
        CONTAINERS[Global(_module, _type.__name__)] = _type


def plain_encoding(encoding: str) -> str:
    """Only the encodings pickle itself writes: others may be codecs with effects."""
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise ValueError(f"unexpected encoding {encoding!r}")
    return encoding


PUSH_ARGUMENT = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set,
}  # fmt: skip


class PickleMachine:
    """One run over one pickle."""

    def __init__(
        self,
        constructors: Mapping[Global, Constructor],
        persistent: Callable[[Any], Any],
        values: Mapping[Global, Any],
        build: Mapping[type, Callable[[Any, Any], Any]],
    ) -> None:
        """Prepare a run.

        Args:
            constructors: calls that are allowed besides the containers.
            persistent: what a persistent id stands for.
            values: globals that are plain values (dtypes).
            build: how a state is given to an object of a type; the function returns the object.
        """
        self.constructors = {**CONTAINERS, **constructors}
        self.persistent = persistent
        self.values = values
        self.build_rules = build
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes, where: str) -> Any:
        """The object the pickle describes.

        Raises:
            InputError: the pickle is broken or uses an opcode that is refused; `where` names the file.
        """
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument)
        except InputError:
            raise
        except Exception as error:  # a broken file may fail anywhere; nothing in it has been executed
            raise InputError(f"{where}: broken pickle ({type(error).__name__}: {error})") from error
        raise InputError(f"{where}: broken pickle (it does not end)")

    def step(self, name: str, argument: Any) -> None:
        """Run one opcode."""
        if name in PUSH_ARGUMENT:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif name not in ("PROTO", "FRAME"):
            method = getattr(self, f"op_{name.lower()}", None)
            if method is None:
                raise ValueError(f"opcode {name} is not accepted")
            method(argument)

    def pop_mark(self) -> list[Any]:
        """Everything above the topmost mark, which is removed."""
        position = len(self.stack) - 1
        while self.stack[position] is not MARK:
            position -= 1
            if position < 0:
                raise ValueError("no mark on the stack")
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def op_mark(self, _: Any) -> None:
        """MARK."""
        self.stack.append(MARK)

    def op_pop(self, _: Any) -> None:
        """POP."""
        self.stack.pop()

    def op_pop_mark(self, _: Any) -> None:
        """POP_MARK."""
        self.pop_mark()

    def op_dup(self, _: Any) -> None:
        """DUP."""
        self.stack.append(self.stack[-1])

    def op_tuple(self, _: Any) -> None:
        """TUPLE."""
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def op_list(self, _: Any) -> None:
        """LIST."""
        items = self.pop_mark()
        self.stack.append(items)

    def op_dict(self, _: Any) -> None:
        """DICT."""
        items = self.pop_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def op_frozenset(self, _: Any) -> None:
        """FROZENSET."""
        items = self.pop_mark()
        self.stack.append(frozenset(items))

    def op_tuple1(self, _: Any) -> None:
        """TUPLE1."""
        self.take_tuple(1)

    def op_tuple2(self, _: Any) -> None:
        """TUPLE2."""
        self.take_tuple(2)

    def op_tuple3(self, _: Any) -> None:
        """TUPLE3."""
        self.take_tuple(3)

    def take_tuple(self, count: int) -> None:
        """Replace the topmost `count` items by their tuple."""
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def op_append(self, _: Any) -> None:
        """APPEND."""
        item = self.stack.pop()
        self.extend([item])

    def op_appends(self, _: Any) -> None:
        """APPENDS."""
        self.extend(self.pop_mark())

    def extend(self, items: list[Any]) -> None:
        """Add to the list (or inert record) on top of the stack."""
        target = self.stack[-1]
        (target.items if isinstance(target, Inert) else list_of(target)).extend(items)

    def op_additems(self, _: Any) -> None:
        """ADDITEMS."""
        items = self.pop_mark()
        target = self.stack[-1]
        if not isinstance(target, set):
            raise ValueError("ADDITEMS on something that is not a set")
        target.update(items)

    def op_setitem(self, _: Any) -> None:
        """SETITEM."""
        value = self.stack.pop()
        key = self.stack.pop()
        self.update([key, value])

    def op_setitems(self, _: Any) -> None:
        """SETITEMS."""
        self.update(self.pop_mark())

    def update(self, items: list[Any]) -> None:
        """Add pairs to the dict (or inert record) on top of the stack."""
        target = self.stack[-1]
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(target, Inert):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise ValueError(f"SETITEMS on a {type(target).__name__}")

    def op_global(self, argument: str) -> None:
        """GLOBAL: `argument` is "module name"."""
        module, _, name = argument.partition(" ")
        self.push_global(module, name)

    def op_stack_global(self, _: Any) -> None:
        """STACK_GLOBAL."""
        name = self.stack.pop()
        module = self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("STACK_GLOBAL needs two strings")
        self.push_global(module, name)

    def push_global(self, module: str, name: str) -> None:
        """A plain value if it is one, else the name itself."""
        known = Global(module, name)
        self.stack.append(self.values.get(known, known))

    def op_reduce(self, _: Any) -> None:
        """REDUCE."""
        arguments = self.stack.pop()
        self.stack.append(self.call(self.stack.pop(), arguments))

    op_newobj = op_reduce

    def op_newobj_ex(self, _: Any) -> None:
        """NEWOBJ_EX: keyword arguments are kept in an inert record's state."""
        keywords = self.stack.pop()
        arguments = self.stack.pop()
        made = self.call(self.stack.pop(), arguments)
        if isinstance(made, Inert):
            made.state = keywords
        self.stack.append(made)

    def op_inst(self, argument: str) -> None:
        """INST."""
        module, _, name = argument.partition(" ")
        arguments = tuple(self.pop_mark())
        self.stack.append(self.call(Global(module, name), arguments))

    def op_obj(self, _: Any) -> None:
        """OBJ."""
        kind, *arguments = self.pop_mark()
        self.stack.append(self.call(kind, tuple(arguments)))

    def call(self, kind: Any, arguments: Any) -> Any:
        """An allowed constructor's result, or an inert record."""
        if not isinstance(kind, Global) or not isinstance(arguments, tuple):
            raise ValueError(f"a call of something that is no name ({type(kind).__name__})")
        constructor = self.constructors.get(kind)
        return Inert(kind, arguments) if constructor is None else constructor(*arguments)

    def op_build(self, _: Any) -> None:
        """BUILD: give an object its state."""
        state = self.stack.pop()
        target = self.stack.pop()
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, argparse.Namespace):
            vars(target).update({str(key): value for key, value in dict(state).items()})
        elif type(target) in self.build_rules:
            target = self.rebuilt(target, self.build_rules[type(target)](target, state))
        elif not isinstance(target, collections.OrderedDict):  # attributes of a state dict (`_metadata`) are not needed
            raise ValueError(f"BUILD on a {type(target).__name__}")
        self.stack.append(target)

    def rebuilt(self, old: Any, new: Any) -> Any:
        """`new`, which the memo then also holds wherever it held `old`."""
        for key, value in self.memo.items():
            if value is old:
                self.memo[key] = new
        return new

    def op_binpersid(self, _: Any) -> None:
        """BINPERSID."""
        self.stack.append(self.persistent(self.stack.pop()))

    def op_persid(self, argument: str) -> None:
        """PERSID."""
        self.stack.append(self.persistent(argument))


def list_of(target: Any) -> list[Any]:
    """`target` if it is a list; appending to anything else would call its methods."""
    if type(target) is not list:
        raise ValueError(f"APPEND to a {type(target).__name__}")
    return target
