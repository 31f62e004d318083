"""WHERE does it run: the one folder that knows CPUs, CUDA GPUs and Ascend NPUs apart.

`select` is called once per process, before megatron-core is imported; everything else receives the `Device`.
"""

import os
from importlib import import_module
from importlib.util import find_spec

from mindspeed_llm.device.base import Device
from mindspeed_llm.errors import InputError, lookup

ENVIRONMENT_VARIABLE = "MINDSPEED_LLM_DEVICE"
MODULES = {"cpu": "mindspeed_llm.device.cpu", "cuda": "mindspeed_llm.device.cuda", "npu": "mindspeed_llm.device.npu"}

_selected: dict[str, Device] = {}


def detect() -> str:
    """The best device this machine has: "npu", else "cuda", else "cpu"."""
    if find_spec("torch_npu") is not None and import_module(MODULES["npu"]).available():
        return "npu"
    return "cuda" if import_module(MODULES["cuda"]).available() else "cpu"


def select(name: str | None = None) -> Device:
    """Choose the process's device and prepare megatron-core for it; repeated calls return the same `Device`.

    Args:
        name: "auto", "cpu", "cuda" or "npu"; None means the environment variable MINDSPEED_LLM_DEVICE, else "auto".

    Raises:
        UsageError: no such device name.
        InputError: the device is not there, or another one was chosen before in this process.
    """
    asked = name or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    lookup("device", asked, {**MODULES, "auto": ""})
    chosen = detect() if asked == "auto" else asked
    if _selected and chosen not in _selected:
        raise InputError(f"this process already runs on {next(iter(_selected))!r}; it cannot change to {chosen!r}")
    if chosen not in _selected:
        module = import_module(MODULES[chosen])
        if not module.available():
            raise InputError(f"--device {chosen}: {module.MISSING}; use --device cpu to run without an accelerator")
        _selected[chosen] = module.create()
    return _selected[chosen]
