"""The declarations themselves: documented, consistent, and frozen against accidents."""

import dataclasses

import pytest

from mindspeed_llm.arguments.aliases import ALIASES, ALIASES_BY_SCRIPT
from mindspeed_llm.arguments.docs import DOCUMENT, document
from mindspeed_llm.arguments.flags import flags_of
from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import PROGRAMS
from mindspeed_llm.arguments.schema import Program, group, option
from mindspeed_llm.arguments.upstream import ACCEPTED, ACCEPTED_BY_SCRIPT, REFUSED

ALL_FLAGS = {flag.name for program in PROGRAMS.values() for flag in flags_of(program)}

# Seed guide and upstream's scripts for it: what a user of those has on the command line.
GUIDE_TUNE = """--use-flash-attn --use-fused-rotary-pos-emb --use-rotary-position-embeddings --use-fused-swiglu
--use-fused-rmsnorm --no-masked-softmax-fusion --use-distributed-optimizer --micro-batch-size 4 --global-batch-size 16
--lr 1.25e-5 --lr-decay-style cosine --min-lr 1.25e-7 --weight-decay 1e-1 --lr-warmup-fraction 0.01
--attention-dropout 0.0 --init-method-std 0.01 --hidden-dropout 0.0 --clip-grad 1.0 --adam-beta1 0.9
--adam-beta2 0.95 --initial-loss-scale 4096 --seed 42 --bf16 --train-iters 2000 --seq-length 4096 --no-shared-storage
--tensor-model-parallel-size 1 --pipeline-model-parallel-size 2 --use-mcore-models
--spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec --kv-channels 128 --qk-layernorm
--tokenizer-name-or-path t --max-position-embeddings 4096 --num-layers 36 --hidden-size 4096 --ffn-hidden-size 12288
--num-attention-heads 32 --tokenizer-type PretrainedFromHF --make-vocab-size-divisible-by 1
--padded-vocab-size 151936 --rotary-base 1000000 --untie-embeddings-and-output-weights --disable-bias-linear
--position-embedding-type rope --normalization RMSNorm --swiglu --attention-softmax-in-fp32 --norm-epsilon 1e-6
--no-gradient-accumulation-fusion --group-query-attention --num-query-groups 8 --data-path d --split 100,0,0
--log-interval 1 --save-interval 2000 --eval-interval 2000 --eval-iters 0 --no-load-optim --no-load-rng --finetune
--stage sft --is-instruction-dataset --tokenizer-not-use-fast --prompt-type qwen3 --no-pad-to-seq-lengths --lora-r 16
--lora-alpha 32 --lora-fusion --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 --load l --save s
--distributed-backend nccl --transformer-impl local --ckpt-format torch"""
GUIDE_CONVERT = """--use-mcore-models --model-type GPT --load-model-type hf --save-model-type mg
--target-tensor-parallel-size 1 --target-pipeline-parallel-size 2
--spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec --load-dir a --save-dir b
--tokenizer-model a/tokenizer.json --model-type-hf qwen3 --params-dtype bf16"""
GUIDE_MERGE = """--use-mcore-models --model-type GPT --load-model-type mg --save-model-type hf
--target-tensor-parallel-size 1 --target-pipeline-parallel-size 1
--spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec --load-dir a --lora-load l --save-dir b --lora-r 16
--lora-alpha 32 --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 --model-type-hf qwen3"""
GUIDE_DATA = """--input x.parquet --tokenizer-name-or-path t --output-prefix ./finetune_dataset/alpaca
--handler-name AlpacaStyleInstructionHandler --tokenizer-type PretrainedFromHF --workers 4 --log-interval 1000
--enable-thinking true --prompt-type qwen3"""
GUIDE_MODEL = """--use-mcore-models --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec --kv-channels 128
--qk-layernorm --tokenizer-name-or-path t --max-position-embeddings 32768 --num-layers 36 --hidden-size 4096
--ffn-hidden-size 12288 --num-attention-heads 32 --tokenizer-type PretrainedFromHF --seq-length 4096
--tensor-model-parallel-size 1 --pipeline-model-parallel-size 2 --micro-batch-size 1 --bf16 --load c
--no-load-optim --no-load-rng --exit-on-missing-checkpoint --norm-epsilon 1e-6 --seed 42 --lora-load l --lora-r 16
--lora-alpha 32 --lora-fusion --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2"""


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("posttrain_gpt.py", GUIDE_TUNE),
        ("convert_ckpt.py", GUIDE_CONVERT),
        ("convert_ckpt.py", GUIDE_MERGE),
        ("preprocess_data.py", GUIDE_DATA),
        ("inference.py", GUIDE_MODEL + " --prompt-type qwen3 --max-new-tokens 256 --task greedy"),
        ("evaluation.py", GUIDE_MODEL + " --task-data-path m --task mmlu --max-new-tokens 2 --no-chat-template"),
    ],
)
def test_the_commands_of_upstreams_lora_guide_are_understood(script: str, words: str) -> None:
    parse(PROGRAMS[script], words.split(), script)


@pytest.mark.parametrize("script", sorted(PROGRAMS))
def test_every_option_says_what_it_does_and_its_default_is_one_of_its_choices(script: str) -> None:
    for flag in flags_of(PROGRAMS[script]):
        assert flag.help.strip().endswith((".", "?")), flag.name
        assert len(flag.help) > 10, flag.name
        if flag.choices and flag.default is not None:
            assert set(flag.default if flag.is_list else [flag.default]) <= set(flag.choices), flag.name


def test_no_flag_is_both_read_and_refused_or_ignored() -> None:
    declared = {script: {flag.name for flag in flags_of(program)} for script, program in PROGRAMS.items()}
    for script, names in declared.items():
        own = set(ACCEPTED_BY_SCRIPT.get(script, {}))
        assert not names & own, script
        assert not (set(ACCEPTED) | own) & set(REFUSED), script
    # A program's own option comes before the lists that all programs share; one that all declare has no place there.
    assert not set.intersection(*declared.values()) & (set(ACCEPTED) | set(REFUSED))


def test_an_alias_stands_for_an_option_and_hides_none() -> None:
    for alias, target in ALIASES.items():
        assert target in ALL_FLAGS, alias
        assert alias not in ALL_FLAGS, alias
    for script, table in ALIASES_BY_SCRIPT.items():
        own = {flag.name for flag in flags_of(PROGRAMS[script])}
        assert set(table.values()) <= own and not set(table) & (own | set(ALIASES)), script


def test_every_flag_that_needs_nothing_or_is_refused_has_its_reason() -> None:
    for table in (ACCEPTED, *ACCEPTED_BY_SCRIPT.values()):
        assert all(len(entry.reason) > 15 for entry in table.values())
    assert all(len(reason) > 15 for reason in REFUSED.values())


def test_the_options_page_is_what_the_declarations_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run: python -m mindspeed_llm.arguments.docs"


def test_one_name_declared_in_two_groups_is_a_mistake_found_at_once() -> None:
    @dataclasses.dataclass
    class One:
        """One."""

        size: int = option(1, help="Size.")

    @dataclasses.dataclass
    class Twice(Program):
        """Twice."""

        first: One = group(One)
        second: One = group(One)

    with pytest.raises(TypeError, match="declares size twice"):
        flags_of(Twice)


def test_a_type_that_cannot_be_read_from_text_is_a_mistake_found_at_once() -> None:
    @dataclasses.dataclass
    class Odd(Program):
        """Odd."""

        table: dict = option(None, help="Table.")

    with pytest.raises(TypeError, match="cannot read"):
        flags_of(Odd)
