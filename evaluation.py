"""Score a tuned model on benchmarks; `python evaluation.py --help` explains every option."""

from mindspeed_llm.cli import run
from mindspeed_llm.evaluation.main import main

if __name__ == "__main__":
    run(main)
