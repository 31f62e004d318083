"""`posttrain_gpt.py`: parse, choose the device, build the run, train, say what comes next."""

import shlex
from typing import Any

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import PosttrainOptions


def main(argv: list[str]) -> int:
    """Tune a model; -> exit status."""
    options = parse(PosttrainOptions, argv, "posttrain_gpt.py")
    if options.planning.plan:
        from mindspeed_llm.training.planned import print_plan

        return print_plan(options)
    from mindspeed_llm import device
    from mindspeed_llm.device import quiet

    quiet.silence()
    chosen = device.select(options.device.device)
    # megatron-core sees the device only when imported after this choice
    from mindspeed_llm.models import parallel
    from mindspeed_llm.training import loop
    from mindspeed_llm.training.report import say
    from mindspeed_llm.training.setup import prepare
    from mindspeed_llm.training.versions import with_version
    from mindspeed_llm.training.watch import open_report

    parallel.connect(chosen, options.device.distributed_timeout_minutes)
    try:
        options = with_version(options)
        run = prepare(options, chosen)
        lines = loop.announcement(run)
        for line in lines if run.first_rank else ():
            say(line)
        if options.planning.dry_run:
            from mindspeed_llm.training.dry_run import dry_run

            dry_run(run)
            return 0
        complete = loop.train(run, open_report(run, lines))
        if run.first_rank:
            say(next_command(run) if complete else resume_command(options, argv))
    finally:
        parallel.disconnect()
    return 0


def next_command(run: Any) -> str:
    """The command that tries what was trained."""
    options = run.options
    words = ["python", "inference.py"]
    saved = options.checkpoint.save
    if run.start.settings is None:
        words += ["--load", saved]
    else:
        words += ["--load", run.start.base_path, "--lora-load", saved]
    if options.tokenizer.tokenizer_name_or_path:
        words += ["--tokenizer-name-or-path", options.tokenizer.tokenizer_name_or_path]
    return "next: " + shlex.join(words)


def resume_command(options: PosttrainOptions, argv: list[str]) -> str:
    """The command that continues a stopped run."""
    kept = [word for word in argv if word.replace("_", "-") != "--overwrite"]
    words = kept if options.checkpoint.auto_resume else [*kept, "--auto-resume"]
    return "stopped; continue with the same launcher and: posttrain_gpt.py " + shlex.join(words)
