"""`inference.py`: parse, choose the device, load the model, answer."""

import sys

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import InferenceOptions
from mindspeed_llm.errors import UsageError

DEFAULT_QUESTION = "how are you?"  # what upstream asks when a task is named without a question


def tasks_of(options: InferenceOptions) -> list[str]:
    """What to do: the tasks named, else greedy for a given question, else a chat when a person is there.

    Raises:
        UsageError: nothing to answer and no terminal to chat in.
    """
    wanted = options.generation
    if wanted.task:
        return wanted.task
    if wanted.prompt is not None or wanted.input_file is not None:
        return ["greedy"]
    if sys.stdin.isatty():
        return ["chat"]
    raise UsageError("nothing to answer: give --prompt, --input-file or --task, or run in a terminal to chat")


def main(argv: list[str]) -> int:
    """Answer questions; -> exit status."""
    options = parse(InferenceOptions, argv, "inference.py")
    tasks = tasks_of(options)
    from mindspeed_llm import device
    from mindspeed_llm.device import quiet

    quiet.silence()
    chosen = device.select(options.device.device)
    # megatron-core sees the device only when imported after this choice
    from mindspeed_llm.inference.answers import Answerer, answer_file, print_answer
    from mindspeed_llm.inference.chat import chat
    from mindspeed_llm.inference.live import load_model, open_sources
    from mindspeed_llm.inference.prompts import Prompter
    from mindspeed_llm.models import parallel

    parallel.connect(chosen, options.device.distributed_timeout_minutes)
    try:
        sources = open_sources(options)
        prompter = Prompter(options, sources)
        answerer = Answerer(options, load_model(options, sources, chosen), prompter)
        wanted = options.generation
        for task in tasks:
            if task == "chat":
                import torch

                speaker = torch.distributed.get_rank() == 0
                chat(prompter, lambda ids, each: answerer("do_sample", [ids], each)[0], wanted.history_turns, speaker)
            elif wanted.input_file is not None:
                answer_file(answerer, task, wanted.input_file, wanted.output_file)
            else:
                print_answer(answerer, task, wanted.prompt or DEFAULT_QUESTION)
    finally:
        parallel.disconnect()
    return 0
