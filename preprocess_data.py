"""Make training files from rows of instructions; `python preprocess_data.py --help` explains every option."""

from mindspeed_llm.cli import run
from mindspeed_llm.data.preprocess import main

if __name__ == "__main__":
    run(main)
