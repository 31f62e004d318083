"""Questions to token ids and answers back to text, by the template the model was tuned with."""

from collections.abc import Sequence
from typing import Any

from mindspeed_llm.checkpoint.recorded import recorded_template, tokenizer_folder
from mindspeed_llm.data.encoders import CHAT_TEMPLATE, Encoder, make_encoder
from mindspeed_llm.data.templates import Message
from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.inference.live import Sources

THOUGHT_MARKS = ("<think>", "</think>")


class Prompter:
    """Builds prompts one of three ways: our template, the tokenizer's own chat template, or plain text.

    Attributes:
        template: name of the template, "hf" for the tokenizer's own, None for plain text.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, options: Any, sources: Sources) -> None:
        """Args:
            options: InferenceOptions.

        Raises:
            UsageError: flags that contradict the checkpoint or each other. InputError: no tokenizer.
        """
        named, generation = options.tokenizer, options.generation
        folder = tokenizer_folder(named, sources.base)
        if folder is None:
            raise InputError(f"{sources.base_path} has no tokenizer beside it; give --tokenizer-name-or-path")
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.system = generation.system
        self.template, self.thinking = recorded_template(named, sources.base, sources.adapter)
        self.encoder: Encoder | None = None
        if generation.hf_chat_template:
            if named.prompt_type:
                raise UsageError(
                    f"--hf-chat-template and --prompt-type {named.prompt_type} exclude each other; give one"
                )
            self.template = CHAT_TEMPLATE
        if self.template:
            self.encoder = make_encoder(self.template, named.prompt_type_path, self.tokenizer, self.thinking)
        self.stop_ids = frozenset(self._stop_ids(generation.add_eos_token, sources))

    @property
    def keeps_turns(self) -> bool:
        """Whether a history of messages can be told from plain text."""
        return self.template is not None

    def _stop_ids(self, extra: Sequence[str], sources: Sources) -> list[int]:
        ids = self.encoder.stop_ids() if self.encoder else [self.tokenizer.eos_id]
        config = sources.base.config.hf_config.get("eos_token_id")
        ids += config if isinstance(config, list) else [config]
        for token in extra:
            if self.tokenizer.token_to_id(token) is None:
                raise UsageError(
                    f"--add-eos-token {token!r} is not in the tokenizer's table; give a single known token"
                )
            ids.append(self.tokenizer.token_to_id(token))
        return [i for i in ids if i is not None]

    def encode(self, messages: Sequence[Message], system: str | None = None) -> list[int]:
        """Prompt ids that the model continues to answer the last message."""
        system = system or self.system
        if self.encoder is not None:
            return self.encoder.encode_prompt(messages, system)
        texts = ([system] if system else []) + [m["content"] for m in messages]
        return self.tokenizer.encode("\n".join(texts))

    def text(self, ids: Sequence[int]) -> str:
        """An answer's text, thought marks included."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def split_thought(text: str) -> tuple[str, str]:
    """An answer's (thought, rest): "<think>\\na\\n</think>\\n\\nb" -> ("a", "b")."""
    opening, closing = THOUGHT_MARKS
    if closing not in text:
        return "", text.replace(opening, "").strip("\n") if opening in text else text
    thought, _, rest = text.partition(closing)
    return thought.replace(opening, "").strip(), rest.lstrip("\n")


def shown(text: str) -> str:
    """An answer as it is displayed: without thought marks."""
    for mark in THOUGHT_MARKS:
        text = text.replace(mark, "")
    return text.strip("\n")
