"""`pytorch_model*.bin`: a torch file that holds one flat dictionary of tensors. Nothing in it is executed."""

from pathlib import Path

from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, open_to_read
from mindspeed_llm.checkpoint.formats.torch_file import read_torch_file
from mindspeed_llm.errors import InputError

ZIP = b"PK\x03\x04"


def read_bin(path: str | Path) -> dict[str, LazyTensor]:
    """The tensors by name, views and shared storages included; only the pickle is read.

    Raises:
        InputError: missing, truncated, in the format torch wrote before 1.6, or not a dictionary of tensors.
    """
    path = Path(path)
    refuse_legacy(path)
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    strange = sorted(str(name) for name, value in content.items() if not isinstance(value, LazyTensor))
    if strange:
        raise InputError(
            f"{path}: {len(strange)} entries are no tensors ({', '.join(strange[:3])}); save its state dict alone"
        )
    return {str(name): tensor for name, tensor in content.items()}


def refuse_legacy(path: Path) -> None:
    """`InputError` for a file that does not begin like a zip archive, saying how to save it again."""
    with open_to_read(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        begin = file.read(len(ZIP))
    if begin != ZIP:
        raise InputError(
            f"{path}: not a zip archive: truncated, or a pickle as torch wrote it before 1.6, which is not opened;"
            f' save it again by python -c "import torch; f={str(path)!r};'
            ' torch.save(torch.load(f, weights_only=True), f)"'
        )
