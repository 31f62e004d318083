"""How text becomes tokens and a conversation becomes text."""

from dataclasses import dataclass

from mindspeed_llm.arguments.schema import option

TOKENIZER_TYPES = ("PretrainedFromHF",)
THINKING_MODES = ("true", "false", "none")


@dataclass
class TokenizerOptions:
    """Tokenizer and prompt template."""

    tokenizer_name_or_path: str | None = option(
        None, help="Folder of the HF tokenizer; left out, the model folder's own or the recorded one is used."
    )
    tokenizer_type: str = option("PretrainedFromHF", help="Kind of tokenizer.", choices=TOKENIZER_TYPES)
    prompt_type: str | None = option(
        None, help="Name of the prompt template; left out, the one recorded in the data or the checkpoint is used."
    )
    prompt_type_path: str | None = option(
        None, help="File of prompt templates; left out, configs/finetune/templates.json of this repository."
    )
    enable_thinking: str | None = option(
        None,
        help="Thinking mode of the template (true: always thinks, false: never, none: as each row does); left out, "
        "as recorded in the data or the checkpoint, else none.",
        choices=THINKING_MODES,
    )
