"""Rows to conversations: one class per data format, selected by `--handler-name`.

A handler never guesses: a row that is not what its format asks for comes back as `BadRow` with the reason, and the
caller counts and lists it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mindspeed_llm.data.handlers_alpaca import (
    AlpacaStyleInstructionHandler,
    AlpacaStylePairwiseHandler,
    PPOAlpacaStyleInstructionHandler,
    R1AlpacaStyleInstructionHandler,
)
from mindspeed_llm.data.handlers_common import USUAL, BadRow, Handler, Reading, Unanswered
from mindspeed_llm.data.handlers_openai import OpenAIInstructionHandler
from mindspeed_llm.data.handlers_plain import (
    BelleMultiTurnInstructionHandler,
    GeneralInstructionHandler,
    LeetcodePythonInstructionHandler,
    MOSSInstructionHandler,
    MOSSMultiTurnHandler,
    PlainHandler,
)
from mindspeed_llm.data.handlers_pretrain import (
    AlpacaPretrainHandler,
    GeneralPretrainHandler,
    SharegptPretrainHandler,
    StackOverflowPythonPretrainHandler,
)
from mindspeed_llm.data.handlers_sharegpt import (
    HunyuanInstructionHandler,
    R1SharegptStyleInstructionHandler,
    SharegptStyleInstructionHandler,
    SharegptStylePairwiseHandler,
)
from mindspeed_llm.errors import lookup

__all__ = ["DEFAULT_HANDLER", "HANDLERS", "BadRow", "Handler", "Reading", "Unanswered", "get_handler", "needs_template"]

DEFAULT_HANDLER = "GeneralPretrainHandler"
HANDLERS: Mapping[str, Callable[[Mapping[str, Any], Reading], Handler]] = {
    cls.__name__: cls
    for cls in (
        GeneralPretrainHandler,
        AlpacaPretrainHandler,
        SharegptPretrainHandler,
        StackOverflowPythonPretrainHandler,
        AlpacaStyleInstructionHandler,
        SharegptStyleInstructionHandler,
        OpenAIInstructionHandler,
        AlpacaStylePairwiseHandler,
        SharegptStylePairwiseHandler,
        PPOAlpacaStyleInstructionHandler,
        R1AlpacaStyleInstructionHandler,
        R1SharegptStyleInstructionHandler,
        HunyuanInstructionHandler,
        GeneralInstructionHandler,
        BelleMultiTurnInstructionHandler,
        LeetcodePythonInstructionHandler,
        MOSSMultiTurnHandler,
        MOSSInstructionHandler,
    )
}


def get_handler(name: str, map_keys: Mapping[str, Any], reading: Reading = USUAL) -> Handler:
    """The handler called `name`, reading the columns `map_keys` names.

    Raises:
        UsageError: no handler of that name, or keys it does not have.
    """
    return lookup("handler (--handler-name)", name, HANDLERS)(map_keys, reading)


def needs_template(handler: Handler) -> bool:
    """Whether a handler's samples are laid out by a prompt template."""
    return handler.KIND != "text" and not isinstance(handler, PlainHandler | HunyuanInstructionHandler)
