"""What every test shares: where the recorded references lie, and a loud skip where they do not."""

from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


def shared_dir() -> Path:
    """The folder of recorded references beside the checkout; skips the test, saying so, where it is absent."""
    path = REPO.parent / "shared"
    if not (path / "golden").is_dir():
        pytest.skip(f"needs the recorded references in {path}, which a plain clone does not have")
    return path


@pytest.fixture
def golden() -> Path:
    """The folder of golden cases, tokenizers and tiny HF checkpoints."""
    return shared_dir() / "golden"
