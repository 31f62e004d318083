"""What every process of a pool needs, imported on CPUs by one thread; importing this module is what seeds do."""

import gc
import importlib
import os

MODULES = (
    "peft",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "mindspeed_llm.checkpoint.convert",
    "mindspeed_llm.inference.main",
    "mindspeed_llm.training.posttrain",
    "mindspeed_llm.training.loop",
)


def preload() -> None:
    """Import `MODULES`, megatron-core with them, once the device is chosen."""
    os.environ |= {"MINDSPEED_LLM_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}  # read when torch and numpy are imported
    gc.disable()  # the search for cycles among so many new objects would take a quarter of the time
    import torch

    from mindspeed_llm import device

    torch.set_num_threads(1)
    device.select("cpu")
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.enable()
    gc.freeze()  # modules stay: no later search for cycles need go through them


preload()
