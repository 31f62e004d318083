"""Convert a model between Hugging Face and Megatron checkpoints, or merge a LoRA adapter into it; `python convert_ckpt.py --help` explains every option."""

from mindspeed_llm.cli import run
from mindspeed_llm.checkpoint.convert import main

if __name__ == "__main__":
    run(main)
