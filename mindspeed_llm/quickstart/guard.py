"""A watch on whether a process builds a transformers model, for every Python process of the quickstart.

`write_site` makes a folder with a `sitecustomize.py` that Python runs at start where the folder is on PYTHONPATH. It
calls `install`, which writes a line to the log named by the environment and puts a hook on
`transformers.PreTrainedModel.__init__`, which every model class of transformers runs. The hook writes another line and,
unless the environment allows it, raises. The last step, which is allowed, shows that the hook sees a model when there
is one.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

LOG = "QUICKSTART_GUARD_LOG"
ALLOW = "QUICKSTART_GUARD_ALLOW"
WATCHED = "transformers.modeling_utils"
SITE = """\
# Written by quickstart.sh: every Python process says that it is watched; see mindspeed_llm/quickstart/guard.py.
import sys

sys.path.insert(0, {repository!r})
from mindspeed_llm.quickstart import guard

guard.install()
sys.path.remove({repository!r})
guard.run_next_site({folder!r})
"""


class ModelBuilt(RuntimeError):
    """A transformers model class was instantiated where none may be."""


def write_site(folder: Path) -> Path:
    """Make the folder whose `sitecustomize.py` installs the watch; it goes first on PYTHONPATH."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    repository = str(Path(__file__).resolve().parents[2])
    (folder / "sitecustomize.py").write_text(SITE.format(repository=repository, folder=str(folder)), encoding="utf-8")
    return folder


def install() -> None:
    """Watch this process, where the environment names a log; else do nothing."""
    if LOG not in os.environ or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    note("watched")
    if WATCHED in sys.modules:
        watch(sys.modules[WATCHED])
    else:
        sys.meta_path.insert(0, _Finder())


def run_next_site(folder: str) -> None:
    """Run the `sitecustomize` that this one hides, as Python would have."""
    others = [place for place in sys.path if os.path.abspath(place or ".") != folder]
    found = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if found is not None and found.loader is not None:
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)


def note(what: str, detail: str = "") -> None:
    """Add a line about this process to the log; one write, so that processes do not mix."""
    line = json.dumps({"what": what, "pid": os.getpid(), "program": _program(), "detail": detail}) + "\n"
    descriptor = os.open(os.environ[LOG], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def watch(module: ModuleType) -> None:
    """Put the hook on the module's `PreTrainedModel`."""
    original = module.PreTrainedModel.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        note("built", type(self).__name__)
        if os.environ.get(ALLOW) != "1":
            raise ModelBuilt(f"{_program()} builds a {type(self).__name__} of transformers, which this step must not")
        original(self, *args, **kwargs)

    module.PreTrainedModel.__init__ = initialise


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log, oldest first; none when there is no log."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _program() -> str:
    """The script or module this process was started with."""
    words = getattr(sys, "orig_argv", sys.argv)[1:]
    for position, word in enumerate(words):
        if word in ("-m", "-c"):
            return f"-m {words[position + 1]}" if word == "-m" and position + 1 < len(words) else word
        if not word.startswith("-"):
            return os.path.basename(word)
    return "python"


class _Finder(MetaPathFinder):
    """Lets the import system find the watched module as usual and puts the hook on it afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The usual specification with a loader that watches; None for every other module."""
        if fullname != WATCHED:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if found is not None and found.loader is not None:
            found.loader = _Watching(found.loader)
        return found


class _Watching(Loader):
    """A loader that runs another one and then puts the hook on its module."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the inner loader."""
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the inner loader, then the hook."""
        self.inner.exec_module(module)
        watch(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
