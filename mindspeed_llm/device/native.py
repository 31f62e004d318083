"""`native_kernels.c`, `native_attention.c`: compiled once per machine by its own C compiler, called on CPU tensors.

Without a compiler everything runs in plain torch. `MINDSPEED_LLM_NATIVE=0` asks for that.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "MINDSPEED_LLM_NATIVE"
SOURCES = tuple(Path(__file__).with_name(name) for name in ("native_kernels.c", "native_attention.c"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("native_tiles.h", "native_vectors.h"))
TYPES = {torch.float32: (), torch.bfloat16: ("-DBF16",)}
# Products and sums are not contracted, so that a rotation in float32 has the bits of torch's operations.
FLAGS = ("-O3", "-fno-math-errno", "-ffp-contract=off", "-fno-trapping-math", "-fopenmp", "-fPIC", "-std=gnu11")
X86 = ("-march=native", "-mprefer-vector-width=512")
TUNING = {"x86_64": X86, "AMD64": X86}
ELSEWHERE = ("-mcpu=native",)
SECONDS = 60  # after which a compiler is given up
ALONE = 1 << 15  # elements below which a second thread costs more than it brings

# p: a tensor or None, i: an integer, f: a float; the number of threads comes last everywhere.
SIGNATURES = {
    "rms_norm": "ppppiif",
    "rms_norm_backward": "pppppii",
    "swiglu": "ppii",
    "swiglu_backward": "ppppii",
    "rope": "pppiiiiiiiiif",
    "row_dots": "pppiiiiiiiiii",
    "softmax_backward": "ppppppiiiiif",
    "row_peaks": "ppiii",
    "row_exponentials": "pppiii",
}
BLOCK_SIGNATURES = {"attention": "pppppppiiiiiiif", "attention_backward": "pppppppppppiiiiiiif"}
"""Of what is only there where `blocked` says so."""
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}

log = logging.getLogger(__name__)


def serves(*tensors: Tensor) -> bool:
    """Whether kernels are there for these tensors: on a CPU, of one type that has them."""
    first = tensors[0]
    if first.dtype not in TYPES or any(one.device.type != "cpu" or one.dtype != first.dtype for one in tensors):
        return False
    return _library(first.dtype) is not None


def blocked(*tensors: Tensor) -> bool:
    """Whether the kernels of `BLOCK_SIGNATURES` are there for these tensors.

    In float32 they need vectors of 512 bits, in bfloat16 matrix tiles (Intel AMX).
    """
    return serves(*tensors) and _library(tensors[0].dtype).has_blocks


def run(name: str, dtype: torch.dtype, work: int, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel.

    Args:
        name: of the function.
        dtype: storage type of its T.
        work: elements it touches, by which the number of threads is chosen.
        arguments: as in the C function, without `threads`.
    """
    library = _library(dtype)
    plain = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
    getattr(library, name)(*plain, torch.get_num_threads() if work > ALONE else 1)


@lru_cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for one type; None where they cannot be had."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return None
    try:
        library = ctypes.CDLL(str(_built(TYPES[dtype])))
    except FileNotFoundError as error:
        log.debug("CPU kernels are not compiled (%s); torch's operations take their place", error)
        return None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home folder
        log.warning("CPU kernels are not compiled (%s); torch's operations, which are slower, take their place", error)
        return None
    library.has_blocks = bool(library.blocks())
    there = {**SIGNATURES, **BLOCK_SIGNATURES} if library.has_blocks else SIGNATURES
    for name, kinds in there.items():
        function: Callable = getattr(library, name)
        function.argtypes, function.restype = [KINDS[kind] for kind in kinds] + [ctypes.c_int], None
    return library


def _built(defines: tuple[str, ...]) -> Path:
    """The compiled library, from the cache or made now and put there whole.

    Raises:
        FileNotFoundError: no compiler.
        OSError, RuntimeError: no folder to write to.
        CalledProcessError, TimeoutExpired: the compiler fails.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    flags = (*FLAGS, *TUNING.get(platform.machine(), ELSEWHERE), *defines)
    told = "\n".join(
        (*(one.read_text(encoding="utf-8") for one in (*SOURCES, *HEADERS)), compiler, *flags, _processor())
    )
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindspeed_llm"
    made = folder / f"kernels-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:  # beside it: ranks compile at the same time, the last wins
        linked, compiled = Path(aside) / "kernels.so", [str(Path(aside) / f"{one.stem}.o") for one in SOURCES]
        for source, made_of_it in zip(SOURCES, compiled, strict=True):
            command = [compiler, *flags, "-c", str(source), "-o", made_of_it]
            try:
                _do(command)
            except subprocess.CalledProcessError:  # a compiler that knows the processor's tiles by name only
                _do([*command, "-DNO_BLOCKS"])
        # Not linked with OpenMP: its functions are found in the runtime torch has loaded, so that there is one pool of
        # threads and not two.
        _do([compiler, "-shared", *compiled, "-o", str(linked)])
        os.replace(linked, made)
    return made


def _do(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)


def _processor() -> str:
    """What `native` means to a compiler here: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
