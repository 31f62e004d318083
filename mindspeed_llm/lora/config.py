"""LoRA settings: what is adapted, how strongly; recorded in every checkpoint so that nobody retypes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from mindspeed_llm.arguments.lora import LoraOptions
from mindspeed_llm.checkpoint.adapters.parts import adapted_parts, described_targets, named_parts
from mindspeed_llm.checkpoint.adapters.settings import (
    ROUTER,
    TOKENS,
    check_whole,
    chosen_parts,
    default_and_pattern,
    is_named,
    module_entries,
    short_targets,
)
from mindspeed_llm.checkpoint.adapters.settings import hf_module as hf_module_of
from mindspeed_llm.checkpoint.metadata import LoraSettings, short_name
from mindspeed_llm.checkpoint.tables import EMBEDDING, Entry, WeightTable, expert_number
from mindspeed_llm.errors import UsageError, unknown
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.families.base import Kind

DEFAULT_RANK = 16
DEFAULT_ALPHA = 32
LINEAR = (Kind.COLUMN, Kind.ROW, Kind.QKV, Kind.GATED, Kind.REPLICATED)
Value = TypeVar("Value", int, float)
WHOLE_ONLY = ("lm_head", "output_layer")
"""Names of the output layer, which gets no adapter here."""
NEEDS_TARGETS = {
    "lora_r": None,
    "lora_alpha": None,
    "lora_dropout": None,
    "lora_exclude_modules": None,
    "lora_layers": None,
    "lora_rank_pattern": None,
    "lora_alpha_pattern": None,
    "use_rslora": False,
    "use_dora": False,
    "lora_init": "default",
    "lora_dtype": "auto",
    "loraplus_lr_ratio": None,
    "lora_modules_to_save": None,
}
"""Options that say something about an adapter, and their values when they are not given."""


def adaptable(table: WeightTable) -> dict[str, Entry]:
    """What training can adapt, by logical name: the token embeddings, and in decoder layers linear ones and routers.

    Prediction layers are not trained.
    """
    return {
        module: entry
        for module, entry in module_entries(table).items()
        if entry.name == EMBEDDING
        or (entry.layer is not None and entry.layer < table.config.num_layers and is_layer(module, entry))
    }


def is_layer(module: str, entry: Entry) -> bool:
    """Whether a module of a decoder layer is a linear layer or a router."""
    return short_name(module) == ROUTER or (entry.kind in LINEAR and "linear_" in module)


def settings_from_options(options: LoraOptions, table: WeightTable) -> LoraSettings | None:
    """Settings of a new adapter from the command line; None when no targets are given, which means no LoRA.

    Raises:
        UsageError: other LoRA options without targets, targets that the model does not have or that cannot be adapted,
            patterns that fit nothing, and DoRA of experts.
    """
    modules = adaptable(table)
    if not options.lora_target_modules:
        given = given_flags(options)
        if given:
            known = " ".join(sorted({short_name(module) for module in modules}))
            raise UsageError(f"{' and '.join(given)} given without --lora-target-modules; known: {known} all-linear")
        return None
    chosen = chosen_targets(options, modules)
    targets = list(chosen)
    r = DEFAULT_RANK if options.lora_r is None else options.lora_r
    alpha = DEFAULT_ALPHA if options.lora_alpha is None else options.lora_alpha
    ranks = by_pattern(options.lora_rank_pattern, targets, modules, r, "--lora-rank-pattern", positive_integer)
    alphas = by_pattern(options.lora_alpha_pattern, targets, modules, alpha, "--lora-alpha-pattern", positive_number)
    check_forms(options, targets)
    return LoraSettings(
        r,
        alpha,
        short_targets(targets, modules),
        options.lora_dropout or 0.0,
        default_and_pattern(ranks, r)[1],
        default_and_pattern(alphas, alpha)[1],
        options.use_rslora,
        options.use_dora,
        options.lora_init,
        options.lora_dtype,
        modules_to_save(options.lora_modules_to_save or (), targets, table),
        named_parts(chosen, modules),
    )


def check_forms(options: LoraOptions, targets: Sequence[str]) -> None:
    """`UsageError` for a form of adapter that a target cannot have."""
    if options.use_dora and (expert := next((one for one in targets if expert_number(one) is not None), None)):
        raise UsageError(f"--use-dora: {expert} is an expert's, and peft has no DoRA of experts; exclude local_experts")
    forms = {"--use-dora": options.use_dora, "--lora-init pissa": options.lora_init == "pissa"}
    given = next((flag for flag, is_given in forms.items() if is_given), None)
    for name, group in ((ROUTER, "all-router"), (TOKENS, "all-embedding")):
        if given and any(short_name(target) == name for target in targets):
            raise UsageError(
                f"{given} is for linear layers, as in peft, and {name} is none; give --lora-exclude-modules {group}"
            )


def given_flags(options: LoraOptions) -> list[str]:
    """The flags of `NEEDS_TARGETS` that were given."""
    return [f"--{name.replace('_', '-')}" for name, left in NEEDS_TARGETS.items() if getattr(options, name) != left]


def chosen_targets(options: LoraOptions, modules: Mapping[str, Entry]) -> dict[str, set[int]]:
    """The logical modules that --lora-target-modules, --lora-exclude-modules and --lora-layers leave, in their order.

    -> the numbers of their HF parts by module.

    Raises:
        UsageError: a name or a layer that is not there, a part of an expert, or nothing is left.
    """
    names = own_names(options.lora_target_modules or (), modules)
    if whole := next((name for name in names if name in WHOLE_ONLY), None):
        raise UsageError(
            f"--lora-target-modules {whole}: the output layer gets no adapter here; train it whole with"
            f" --lora-modules-to-save {whole}"
        )
    chosen = chosen_parts(names, modules, "--lora-target-modules")
    if options.lora_exclude_modules:
        excluded = chosen_parts(own_names(options.lora_exclude_modules, modules), modules, "--lora-exclude-modules")
        left = {module: parts - excluded.get(module, set()) for module, parts in chosen.items()}
        chosen = {module: parts for module, parts in left.items() if parts}
    if options.lora_layers is not None:
        last = max(entry.layer for entry in modules.values() if entry.layer is not None)
        if wrong := [layer for layer in sorted(options.lora_layers) if not 0 <= layer <= last]:
            raise UsageError(f"--lora-layers {wrong[0]}: the model has the layers 0 to {last}")
        kept = (None, *options.lora_layers)
        chosen = {module: parts for module, parts in chosen.items() if modules[module].layer in kept}
    if not chosen:
        raise UsageError(
            f"--lora-target-modules {' '.join(options.lora_target_modules or ())}: --lora-exclude-modules and"
            " --lora-layers leave no layer to adapt; name others"
        )
    experts = {module: parts for module, parts in chosen.items() if modules[module].expert is not None}
    check_whole(experts, modules, "--lora-target-modules", "peft adapts experts' as one")
    return {module: chosen[module] for module in modules if module in chosen}


def own_names(names: Sequence[str], modules: Mapping[str, Entry]) -> list[str]:
    """Target names with a model's own names of its layers.

    Under latent attention `linear_qkv` is upstream's name of the two projections of the hidden state.
    """
    short = {short_name(module) for module in modules}
    if "linear_kv_down_proj" not in short or "linear_qkv" in short:
        return list(names)
    down = ("linear_q_down_proj" if "linear_q_down_proj" in short else "linear_q_proj", "linear_kv_down_proj")
    own = (down if name == "linear_qkv" else (name,) for name in names)
    return list(dict.fromkeys(name for some in own for name in some))


def by_pattern(
    patterns: Sequence[str] | None,
    targets: Sequence[str],
    modules: Mapping[str, Entry],
    default: Value,
    flag: str,
    read: Callable[[str, str], Value],
) -> dict[str, Value]:
    """Each target's rank or alpha: that of the first of `NAME=VALUE` that fits it, else `default`.

    Raises:
        UsageError: no such form, or a name that fits no target.
    """
    found: dict[str, Value] = {}
    for pattern in patterns or ():
        name, sign, value = pattern.rpartition("=")
        if not sign or not name:
            raise UsageError(f"{flag} {pattern}: expected NAME=NUMBER, as linear_qkv=8")
        number = read(value, f"{flag} {pattern}")
        fitting = [
            target
            for target in targets
            if any(is_named(name, target, hf_module_of(hf.name), flag) for hf in modules[target].hf)
        ]
        if not fitting:
            raise unknown(f"{flag} name", name, sorted({short_name(target) for target in targets}))
        for target in fitting:
            found.setdefault(target, number)
    return {target: found.get(target, default) for target in targets}


def positive_integer(text: str, said: str) -> int:
    """A rank; `UsageError` naming where it was `said`."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"{said}: {text!r} is no rank; give a whole number of at least 1")
    return int(text)


def positive_number(text: str, said: str) -> float:
    """An alpha; `UsageError` naming where it was `said`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{said}: {text!r} is no alpha; give a number above 0")
    return value


def modules_to_save(names: Sequence[str], targets: Sequence[str], table: WeightTable) -> tuple[str, ...]:
    """The modules that --lora-modules-to-save names, as `LoraSettings` spells them.

    Raises:
        UsageError: a name that is not there, that is adapted too, or the output layer of a model that ties it to the
            embedding.
    """
    modules = {
        name.removesuffix(".weight"): entry
        for name, entry in table.entries.items()
        if name.endswith(".weight") and (entry.layer is None or entry.layer < table.config.num_layers)
    }
    tied = table.config.tie_word_embeddings
    if tied and (head := next((one for one in names if one in ("lm_head", "output_layer")), None)):
        raise UsageError(
            f"--lora-modules-to-save {head}: this model's output layer is its embedding; name embed_tokens"
        )
    chosen = chosen_parts(names, modules, "--lora-modules-to-save")
    check_whole(chosen, modules, "--lora-modules-to-save", "are trained as one")
    if twice := [module for module in chosen if module in targets]:
        raise UsageError(f"--lora-modules-to-save and --lora-target-modules both name {twice[0]}; choose one")
    return short_targets(chosen, modules)


def continued(settings: LoraSettings, options: LoraOptions) -> LoraSettings:
    """Settings of a saved adapter that is trained on: its own, but for a dropout and a type that the options give."""
    if options.lora_dropout is not None:
        settings = replace(settings, dropout=options.lora_dropout)
    return settings if options.lora_dtype == "auto" else replace(settings, dtype=options.lora_dtype)


def check_given(settings: LoraSettings, options: LoraOptions, table: WeightTable, where: object) -> None:
    """`UsageError` when the options ask for another adapter than the saved one; those left out ask for nothing.

    Rank and alpha are checked where the adapter is opened.

    Args:
        settings: of the saved adapter.
        where: its folder.
    """
    said = {
        "--use-rslora": (options.use_rslora, settings.use_rslora),
        "--use-dora": (options.use_dora, settings.use_dora),
        "--lora-init": (options.lora_init, settings.init),
    }
    wrong = [f"{flag} {given}" for flag, (given, own) in said.items() if given not in (False, "default", own)]
    patterns = options.lora_rank_pattern or options.lora_alpha_pattern
    if options.lora_target_modules:
        modules = adaptable(table)
        own = {
            name: set(adapted_parts(settings, name, entry)) for name, entry in modules.items() if settings.adapts(name)
        }
        narrowed = options.lora_exclude_modules or options.lora_layers is not None
        targets = "--lora-target-modules with its exclusions" if narrowed else "--lora-target-modules"
        if chosen_targets(options, modules) != own:
            wrong.append(targets)
    if options.lora_target_modules and (patterns or options.lora_modules_to_save):
        wanted = settings_from_options(options, table)
        named = {
            "--lora-rank-pattern": patterns and dict(wanted.rank_pattern) != dict(settings.rank_pattern),
            "--lora-alpha-pattern": patterns and dict(wanted.alpha_pattern) != dict(settings.alpha_pattern),
            "--lora-modules-to-save": wanted.modules_to_save != settings.modules_to_save,
        }
        wrong += [flag for flag, differs in named.items() if differs]
    if wrong:
        raise UsageError(f"{' and '.join(wrong)} contradicts the saved adapter in {where}; leave it out")


def check_reference(prefers: bool, settings: LoraSettings | None) -> None:
    """Refuse preferences without an adapter: with it off, the base is what they are compared with; `UsageError`."""
    if not prefers:
        return
    if settings is None:
        raise UsageError(
            "--stage dpo compares with the base model, which full tuning changes; tune an adapter with "
            "--lora-target-modules"
        )
    if whole := settings.modules_to_save:
        raise UsageError(
            f"--stage dpo compares with the base model, and {' '.join(whole)} would be trained whole; leave "
            "--lora-modules-to-save out"
        )


def described(settings: LoraSettings, fused: bool, base_dtype: str) -> str:
    """One line for people on what is trained, and in which form.

    Args:
        fused: --lora-fusion is given.
        base_dtype: type of the base, "bfloat16".
    """
    modular = "DoRA" if settings.use_dora else ""
    if settings.dtype not in ("auto", base_dtype):
        modular = modular or f"{settings.dtype} factors on a {base_dtype} base"
    words = [
        f"LoRA r {settings.r} alpha {settings.alpha} on {' '.join(described_targets(settings))}",
        "other ranks or alphas by name" if settings.rank_pattern or settings.alpha_pattern else "",
        "rsLoRA" if settings.use_rslora else "",
        "DoRA" if settings.use_dora else "",
        "PiSSA" if settings.init == "pissa" else "",
        f"trained whole: {' '.join(settings.modules_to_save)}" if settings.modules_to_save else "",
    ]
    form = f" (--lora-fusion: {modular} runs in the modular form)" if modular else " (fused)"
    return ", ".join(word for word in words if word) + (form if fused else "")


def unlike_layers(settings: LoraSettings, model: ModelConfig) -> list[int]:
    """Layers whose experts are not all adapted alike; processes that hold such experts run them one after another."""
    found = []
    for layer in range(model.num_layers if model.num_experts else 0):
        for part in ("linear_fc1", "linear_fc2"):
            names = [f"decoder.layers.{layer}.mlp.experts.local_experts.{e}.{part}" for e in range(model.num_experts)]
            kinds = {settings.adapts(one) and (settings.rank(one), settings.scaling(one)) for one in names}
            if len(kinds) > 1 and model.has("moe", layer):
                found.append(layer)
    return sorted(set(found))
