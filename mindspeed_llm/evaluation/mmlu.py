"""MMLU from local CSV files, with lm-eval's prompt.

<folder>/test/<subject>_test.csv   no header: question, A, B, C, D, answer letter
<folder>/dev/<subject>_dev.csv     the solved examples shown before each question
"""

import csv
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mindspeed_llm.errors import InputError

LETTERS = ("A", "B", "C", "D")
MOST_EXAMPLES = 5


def test_folder(path: str) -> Path:
    """The folder with the `*_test.csv` files: the path itself, its `test`, or its `data/test`.

    Raises:
        InputError: none of them holds such files.
    """
    root = Path(path).expanduser()
    for folder in (root, root / "test", root / "data" / "test"):
        if any(folder.glob("*_test.csv")):
            return folder
    there = "" if root.is_dir() else " (no such folder)"
    raise InputError(f"--task-data-path {path}{there}: no <subject>_test.csv in it, its test/ or its data/test/")


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Questions of one file as lm-eval's documents: question, choices, answer (index), subject.

    Raises:
        InputError: not CSV in UTF-8, a row without six fields or with another answer than A to D; file and row are
            named.
    """
    subject = path.stem.rpartition("_")[0]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not CSV in UTF-8 ({error}); save it as such") from error
    documents = []
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5].strip() not in LETTERS:
            raise InputError(f"{path}: row {number}: expected question, A, B, C, D, answer letter; got {row!r:.100}")
        documents.append(
            {
                "question": row[0],
                "choices": row[1:5],
                "answer": LETTERS.index(row[5].strip()),
                "subject": subject.replace("_", " "),
            }
        )
    if not documents:
        raise InputError(f"{path} holds no questions")
    return documents


def load_tasks(path: str, few_shots: int | None) -> list[dict[str, Any]]:
    """lm-eval task configurations, one per subject, that read the local files.

    Args:
        few_shots: solved examples before each question; None for min(5, rows of the dev file).

    Raises:
        InputError: files missing or malformed, or fewer solved examples than asked for.
    """
    folder = test_folder(path)
    template = yaml.safe_load((files("lm_eval") / "tasks/mmlu/default/_default_template_yaml").read_text("utf-8"))
    template.pop("dataset_path")
    tasks = []
    for test_file in sorted(folder.glob("*_test.csv")):
        subject = test_file.stem.removesuffix("_test")
        dev_file = folder.parent / "dev" / f"{subject}_dev.csv"
        examples = read_csv(dev_file) if dev_file.is_file() else []
        shots = min(MOST_EXAMPLES, len(examples)) if few_shots is None else few_shots
        if shots > len(examples):
            raise InputError(f"--num-fewshot {shots}: {dev_file} has {len(examples)} solved examples")
        documents = read_csv(test_file)
        tasks.append(
            {
                **template,
                "task": f"mmlu_{subject}",
                "task_alias": subject,
                "description": f"The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n",
                "num_fewshot": shots,
                "fewshot_split": "dev" if shots else None,
                "custom_dataset": _reader(documents, examples),
            }
        )
    return tasks


def _reader(test: list[dict[str, Any]], dev: list[dict[str, Any]]) -> Any:
    """What lm-eval calls for its data: the splits as data sets."""

    def read(**kwargs: Any) -> dict[str, Any]:
        import datasets

        splits = {"test": datasets.Dataset.from_list(test)}
        if dev:
            splits["dev"] = datasets.Dataset.from_list(dev)
        return splits

    return read
