"""`inference.py`: parse, choose the device, load the model, answer."""

import os
import sys

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import InferenceOptions
from mindspeed_llm.errors import UsageError

DEFAULT_QUESTION = "how are you?"  # what upstream asks when a task is named without a question


def tasks_of(options: InferenceOptions) -> list[str]:
    """What to do: the tasks named, else greedy for a given question, else a chat when a person is there.

    Raises:
        UsageError: nothing to answer and no terminal to chat in, or one file for the answers of several tasks.
    """
    wanted = options.generation
    if wanted.task and len(wanted.task) > 1 and wanted.output_file is not None:
        raise UsageError(f"--output-file {wanted.output_file} holds the answers of one --task, not of {wanted.task}")
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
    from mindspeed_llm.inference.answers import Answerer, answer_file, print_answer, read_questions
    from mindspeed_llm.inference.chat import chat
    from mindspeed_llm.inference.live import load_model, open_sources
    from mindspeed_llm.inference.prompts import Prompter
    from mindspeed_llm.models import parallel

    parallel.connect(chosen, options.device.distributed_timeout_minutes)
    try:
        sources = open_sources(options)
        prompter = Prompter(options, sources)
        wanted = options.generation
        if wanted.input_file is not None:
            read_questions(wanted.input_file)  # a bad row is told before the model is loaded
        answerer = Answerer(options, load_model(options, sources, chosen), prompter)
        for task in tasks:
            if task == "chat":
                chat(
                    prompter, answerer.reply, answerer.limits, wanted.history_turns, int(os.environ.get("RANK", 0)) == 0
                )
            elif wanted.input_file is not None:
                answer_file(answerer, task, wanted.input_file, wanted.output_file)
            else:
                print_answer(answerer, task, wanted.prompt or DEFAULT_QUESTION, wanted.output_file)
    finally:
        parallel.disconnect()
    return 0
