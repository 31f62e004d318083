"""Give the modules of one package their own view of `torch`, so that code written for one accelerator runs elsewhere.

megatron-core names its device in three ways: attributes of `torch.cuda`, the word "cuda" in calls such as
`torch.zeros(1, device="cuda")`, and type names such as "torch.cuda.FloatTensor". `install` registers an import hook
that answers all three for the modules of one package only: every other module keeps the real `torch`.

- `import torch` inside such a module yields a proxy whose `cuda` attribute is the stand-in namespace given by the
  device; everything else is the real torch.
- string constants equal to a key of the device's `words` are replaced in the compiled code.
- after a module has run, the patches registered for it are applied (`patches.py`).

No file is changed, and nothing happens before `install` is called.
"""

import builtins
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mindspeed_llm.errors import InputError


class ModuleView(types.ModuleType):
    """A module seen through replacements: attributes in `replaced` first, the real module's otherwise."""

    def __init__(self, real: types.ModuleType, replaced: Mapping[str, Any]) -> None:
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(replaced)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _importer(views: Mapping[str, types.ModuleType]) -> Callable[..., Any]:
    """An `__import__` that hands out `views` (keyed by dotted module name) instead of the real modules."""

    def import_with_views(
        name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] | None = (), level: int = 0
    ) -> Any:
        module = builtins.__import__(name, globals, locals, fromlist, level)
        if level:
            return module
        shown = name if fromlist else name.partition(".")[0]
        return views.get(shown, module)

    return import_with_views


def _replace_words(code: types.CodeType, words: Mapping[str, str]) -> types.CodeType:
    """The same code object with every string constant that is a key of `words` replaced, nested code included."""

    def replace(constant: Any) -> Any:
        if isinstance(constant, str):
            return words.get(constant, constant)
        if isinstance(constant, tuple):
            return tuple(replace(c) for c in constant)
        if isinstance(constant, types.CodeType):
            return _replace_words(constant, words)
        return constant

    return code.replace(co_consts=tuple(replace(c) for c in code.co_consts))


class _Loader(importlib.abc.Loader):
    """Runs one module of the package with its own builtins, then applies the patches registered for it."""

    def __init__(self, inner: Any, finder: "_Finder") -> None:
        self.inner = inner
        self.finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        code = self.inner.get_code(module.__name__)
        if code is None:
            raise InputError(f"{module.__name__} has no Python source that can be adapted to this device")
        module.__dict__["__builtins__"] = self.finder.builtins
        exec(_replace_words(code, self.finder.words), module.__dict__)
        for apply in self.finder.after.get(module.__name__, ()):
            apply(module)

    def __getattr__(self, name: str) -> Any:  # resources and data files of the package: as the inner loader has them
        return getattr(self.inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules of one package as usual, and wraps their loader."""

    def __init__(
        self,
        package: str,
        views: Mapping[str, types.ModuleType],
        words: Mapping[str, str],
        after: Mapping[str, Sequence[Callable[[types.ModuleType], None]]],
    ) -> None:
        self.package = package
        self.words = words
        self.after = after
        self.builtins = dict(vars(builtins), __import__=_importer(views))

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.package and not name.startswith(self.package + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and hasattr(spec.loader, "get_code"):
            spec.loader = _Loader(spec.loader, self)
        return spec


def install(
    package: str,
    replaced: Mapping[str, Any],
    words: Mapping[str, str],
    after: Mapping[str, Sequence[Callable[[types.ModuleType], None]]],
) -> None:
    """Adapt every module of `package` that is imported from now on; calling it again for the package does nothing.

    Args:
        package: dotted name, e.g. "megatron.core".
        replaced: attribute of torch -> stand-in, e.g. {"cuda": namespace}.
        words: string constant -> replacement.
        after: module name -> functions called with the module once it has run.

    Raises:
        InputError: the package was imported before, so it already holds the real torch.
    """
    if any(isinstance(f, _Finder) and f.package == package for f in sys.meta_path):
        return
    if package in sys.modules:
        raise InputError(f"{package} was imported before the device was chosen; call device.select() first")
    views: dict[str, types.ModuleType] = {"torch": ModuleView(torch, replaced)}
    views.update({f"torch.{name}": stand_in for name, stand_in in replaced.items()})
    sys.meta_path.insert(0, _Finder(package, views, words, after))
