"""Rewrites README.md's map of source files from the first line of each file's own description.

`python scripts/readme_map.py` writes it; a test fails, naming the lines, when it is not what the files say.
"""

import ast
import itertools
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- map: written by scripts/readme_map.py -->", "<!-- end of map -->"
PATTERNS = ("*.py", "*.sh", "scripts/*", "benchmarks/*.py", "examples/mcore/*.sh", "mindspeed_llm/**/*.py")


def description(path: Path) -> str:
    """First line of a Python file's docstring or of a shell script's opening comment; "" for an empty file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    comments = (line[2:] for line in text.splitlines() if line.startswith("# ") and "shellcheck" not in line)
    return next(comments, "")


def sources() -> list[Path]:
    """Every source file the map names, relative to the repository; empty `__init__.py` files are left out."""
    found = {path for pattern in PATTERNS for path in REPO.glob(pattern) if path.suffix in (".py", ".sh")}
    return sorted(p.relative_to(REPO) for p in found if p.name != "__init__.py" or p.read_text().strip())


def map_lines() -> list[str]:
    """The map: a heading per folder, a line per file."""
    lines: list[str] = []
    ordered = sorted(sources(), key=lambda p: (str(p.parent), p.name))
    for folder, paths in itertools.groupby(ordered, lambda p: p.parent):
        lines += ["", f"`{folder}/`" if str(folder) != "." else "top level", ""]
        for path in paths:
            lines.append(f"- [`{path.name}`]({path.as_posix()}): {description(REPO / path)}")
    return [*lines, ""]


def main() -> None:
    """Replace what stands between the two marks in README.md."""
    readme = REPO / "README.md"
    head, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{chr(10).join(map_lines())}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
