"""Answer questions or chat with a tuned model; `python inference.py --help` explains every option."""

from mindspeed_llm.cli import run
from mindspeed_llm.inference.main import main

if __name__ == "__main__":
    run(main)
