"""Convert a model between HF and Megatron checkpoints, merging LoRA; `python convert_ckpt.py --help` explains all."""

from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.cli import run

if __name__ == "__main__":
    run(main)
