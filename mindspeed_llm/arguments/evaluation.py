"""What is measured, and on how much of it."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError


@dataclass
class EvaluationOptions:
    """Evaluation."""

    task: list[str] = option(["mmlu"], help="Benchmarks to run.")
    task_data_path: list[str] = option(
        [], help="Folder of each benchmark's files, in the order of --task; one folder serves all.", nargs="*"
    )
    evaluation_batch_size: int = option(1, help="Questions per forward pass.", unit="questions")
    max_eval_samples: int | None = option(None, help="Questions taken per subject; left out, all.", unit="questions")
    num_fewshot: int | None = option(
        None, help="Solved examples before each question; left out, 5 or as many as the dev file has.", unit="examples"
    )
    output_path: str | None = option(None, help="File for the scores as JSON; left out, they are only printed.")
    no_chat_template: bool = option(
        True, help="Ask in plain text, as the benchmark defines it; false puts questions into the chat template."
    )
    max_new_tokens: int | None = option(
        None, help="Longest answer of tasks that generate; likelihood tasks such as mmlu need none.", unit="tokens"
    )

    def check(self) -> None:
        """Raise UsageError for counts below their least value and folders that fit no task."""
        for name, least in (("evaluation_batch_size", 1), ("max_eval_samples", 1), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if len(self.task_data_path) > 1 and len(self.task_data_path) != len(self.task):
            raise UsageError(
                f"--task-data-path names {len(self.task_data_path)} folders for {len(self.task)} tasks; "
                "give one for all or one for each"
            )
