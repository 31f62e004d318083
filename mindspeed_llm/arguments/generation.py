"""What is generated, and how."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option
from mindspeed_llm.errors import UsageError

GENERATION_TASKS = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "chat")


@dataclass
class GenerationOptions:
    """Generation."""

    prompt: str | None = option(None, help="One question to answer.")
    input_file: str | None = option(
        None, help="File of questions: a text line each, or jsonl with the key prompt (or messages)."
    )
    output_file: str | None = option(
        None, help="File for the answers as jsonl, in the order of --input-file; left out, they are printed."
    )
    task: list[str] | None = option(
        None,
        help="Ways to answer. Left out: greedy with --prompt or --input-file, chat in a terminal.",
        choices=GENERATION_TASKS,
        nargs="*",
    )
    max_new_tokens: int = option(128, help="Longest answer.", unit="tokens")
    max_length: int | None = option(
        None, help="Longest prompt and answer together; left out, the model's own limit.", unit="tokens"
    )
    temperature: float = option(0.7, help="Divides the logits before sampling; lower is more certain.")
    top_k: int = option(50, help="Sample among this many likeliest tokens; 0 among all.", unit="tokens")
    top_p: float = option(0.95, help="Sample among the likeliest tokens that hold this probability together.")
    num_beams: int = option(2, help="Beams kept by the beam searches (upstream's number).", unit="beams")
    length_penalty: float = option(1.0, help="Power of the length by which a beam's log-likelihood is divided.")
    system: str | None = option(None, help="System message put before the conversation.")
    history_turns: int = option(3, help="Turns of a chat that are kept as context.", unit="turns")
    use_kv_cache: bool = option(
        True, help="Keep keys and values of past tokens; false recomputes them: same tokens, slower."
    )
    hf_chat_template: bool = option(False, help="Use the tokenizer's own chat template instead of --prompt-type.")
    add_eos_token: list[str] = option([], help="Further tokens that end an answer.", nargs="*")

    def check(self) -> None:
        """Raise UsageError for values outside their range and for two sources of questions."""
        if self.prompt is not None and self.input_file is not None:
            raise UsageError("--prompt and --input-file both give questions; give one")
        if self.output_file is not None and self.input_file is None and self.prompt is None:
            raise UsageError(f"--output-file {self.output_file} needs --input-file or --prompt")
        for name in ("max_new_tokens", "max_length", "num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.temperature <= 0:
            raise UsageError(f"--temperature {self.temperature}: must be above 0; --task greedy takes the likeliest")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        for name in ("top_k", "history_turns"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative")
