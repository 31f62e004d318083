"""Importing the package, all of it, changes nothing in the process and needs no accelerator."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, os, signal, sys, threading, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed
import megatron.core, megatron.core.models.gpt, peft, transformers  # foreign packages may do at import what they like

def state():
    return {
        "finders": [type(one).__name__ for one in sys.meta_path],
        "cuda": [id(torch.cuda), id(torch.cuda.current_device), id(torch.Tensor.cuda), id(torch.zeros)],
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)],
        "environment": sorted(k for k in os.environ if "MINDSPEED" in k or k.startswith(("CUDA", "MASTER", "OMP"))),
        "threads": torch.get_num_threads(),
        "running": sorted(t.name for t in threading.enumerate()),
        "dtype": str(torch.get_default_dtype()),
        "random": torch.get_rng_state().sum().item(),
        "group": torch.distributed.is_initialized(),
        "accelerator": torch.cuda.is_initialized(),
        "cwd": os.getcwd(),
        "files": sorted(os.listdir()),
        "argv": sys.argv,
    }

before = state()
import importlib, pkgutil
import mindspeed_llm
names = [m.name for m in pkgutil.walk_packages(mindspeed_llm.__path__, "mindspeed_llm.")]
for name in names:
    importlib.import_module(name)
from mindspeed_llm import device
print(json.dumps([before, state(), device._selected, names]))
"""


def test_importing_every_module_has_no_effect(tmp_path: Path) -> None:
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(repository)!r})\n{PROGRAM}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    before, after, selected, names = json.loads(done.stdout)  # nothing else was printed
    assert len(names) > 50 and not before["accelerator"] and not before["group"]
    assert after == before
    assert selected == {}
