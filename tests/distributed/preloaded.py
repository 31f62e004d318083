"""What every process of a pool needs, imported on CPUs by one thread; this module is imported to be forked."""

import gc
import os

os.environ |= {"MINDSPEED_LLM_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}  # read when torch and numpy are imported

import torch

from mindspeed_llm import device

torch.set_num_threads(1)
device.select("cpu")  # before megatron-core is imported

import peft  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

import mindspeed_llm.checkpoint.convert
import mindspeed_llm.inference.main
import mindspeed_llm.training.posttrain  # noqa: F401
from mindspeed_llm.training import export, setup  # noqa: F401

gc.collect()
gc.freeze()  # modules stay: no later search for cycles need go through them
