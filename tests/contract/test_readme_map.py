"""README.md names every source file with what the file says of itself."""

import importlib.util

from tests.conftest import REPO

spec = importlib.util.spec_from_file_location("readme_map", REPO / "scripts" / "readme_map.py")
readme_map = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme_map)

REMEDY = "run: python scripts/readme_map.py"


def test_the_map_in_the_readme_is_what_the_files_say() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    written = text.split(readme_map.BEGIN)[1].split(readme_map.END)[0].strip().splitlines()
    wanted = "\n".join(readme_map.map_lines()).strip().splitlines()
    missing = [line for line in wanted if line not in written]
    stale = [line for line in written if line not in wanted]
    assert not missing and not stale, f"{REMEDY}\nmissing: {missing}\nno longer true: {stale}"
    assert written == wanted, REMEDY


def test_every_source_file_describes_itself_in_one_line() -> None:
    silent = [str(path) for path in readme_map.sources() if not readme_map.description(REPO / path)]
    assert not silent


def test_the_chinese_readme_names_every_folder_of_the_package_and_the_same_commands() -> None:
    english, chinese = ((REPO / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    for folder in sorted((REPO / "mindspeed_llm").iterdir()):
        if folder.is_dir() and (folder / "__init__.py").exists() and folder.name not in ("tasks", "quickstart"):
            assert f"mindspeed_llm/{folder.name}/" in chinese, folder.name
    commands = [line for line in english.splitlines() if line.startswith("bash ") or " bash examples/" in line[:60]]
    for line in commands:
        command = line.split("#")[0].split("bash ")[-1].strip()
        if not line.startswith("|"):
            assert command in chinese, command
