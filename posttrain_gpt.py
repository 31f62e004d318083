"""Tune a model, whole or with LoRA; `python posttrain_gpt.py --help` explains every option."""

from mindspeed_llm.cli import run
from mindspeed_llm.training.posttrain import main

if __name__ == "__main__":
    run(main)
