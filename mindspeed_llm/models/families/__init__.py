"""The registry of model families: one line each; a new family is one file and one line here."""

from mindspeed_llm.errors import InputError, lookup
from mindspeed_llm.models.families.base import Family
from mindspeed_llm.models.families.deepseek_v2 import DEEPSEEK_V2
from mindspeed_llm.models.families.deepseek_v3 import DEEPSEEK_V3
from mindspeed_llm.models.families.gemma2 import GEMMA2
from mindspeed_llm.models.families.gemma3 import GEMMA3
from mindspeed_llm.models.families.glm4 import GLM4
from mindspeed_llm.models.families.glm4_moe import GLM4_MOE
from mindspeed_llm.models.families.gpt_oss import GPT_OSS
from mindspeed_llm.models.families.internlm2 import INTERNLM2
from mindspeed_llm.models.families.internlm3 import INTERNLM3
from mindspeed_llm.models.families.llama import LLAMA
from mindspeed_llm.models.families.mistral import MISTRAL
from mindspeed_llm.models.families.mixtral import MIXTRAL
from mindspeed_llm.models.families.phi3 import PHI3
from mindspeed_llm.models.families.qwen2 import QWEN2
from mindspeed_llm.models.families.qwen2_moe import QWEN2_MOE
from mindspeed_llm.models.families.qwen3 import QWEN3
from mindspeed_llm.models.families.qwen3_moe import QWEN3_MOE
from mindspeed_llm.models.families.seed_oss import SEED_OSS

FAMILIES: tuple[Family, ...] = (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GEMMA2,
    GEMMA3,
    GLM4,
    GLM4_MOE,
    GPT_OSS,
    INTERNLM2,
    INTERNLM3,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    PHI3,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    SEED_OSS,
)


def family(name: str) -> Family:
    """The family of this name or alias; a `UsageError` naming the known and the nearest ones otherwise."""
    table = {known: one for one in FAMILIES for known in (one.name, *one.aliases)}
    return lookup("model family", name, table)


def family_of_architecture(architectures: list[str], where: str) -> Family:
    """The family whose HF `architectures` these are.

    Args:
        architectures: the entry of config.json.
        where: the file it was read from, for the error.

    Raises:
        InputError: no family here has that architecture.
    """
    for one in FAMILIES:
        if set(architectures) & set(one.architectures):
            return one
    known = sorted(architecture for one in FAMILIES for architecture in one.architectures)
    raise InputError(f"{where}: architectures {architectures} are not supported (known: {', '.join(known)})")
