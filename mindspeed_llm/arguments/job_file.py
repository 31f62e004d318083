"""A whole job as YAML: `--config job.yaml`.

Keys are option names (dashes or underscores), flat or under sections of any name; `null` leaves the default.
"""

from pathlib import Path
from typing import Any

from mindspeed_llm.errors import UsageError


def read_job(path: str) -> list[tuple[str, list[Any], str]]:
    """(name, values, where) of every option set in the file, in its order; `where` names key and file for errors.

    Raises UsageError when the file is missing, is not YAML, or sets one option twice.
    """
    import yaml  # here, because most commands are run without a job file and start faster

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: expected option names and values, found a {type(content).__name__}")
    entries: dict[str, tuple[str, list[Any], str]] = {}
    _collect(content, "", path, entries)
    return list(entries.values())


def _collect(content: dict[Any, Any], section: str, path: str, entries: dict[str, tuple[str, list[Any], str]]) -> None:
    for key, value in content.items():
        if isinstance(value, dict):
            _collect(value, f"{section}{key}.", path, entries)
            continue
        if value is None:
            continue
        name = str(key).replace("-", "_")
        where = f"{section}{key} in {path}"
        if name in entries:
            raise UsageError(f"{where} was already set as {entries[name][2]}; keep one of them")
        entries[name] = (name, list(value) if isinstance(value, list) else [value], where)
