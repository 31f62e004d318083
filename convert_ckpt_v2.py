"""The second converter's command line, which is that of `convert_ckpt.py`: both spell the same options."""

from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.cli import run

if __name__ == "__main__":
    run(main)
