"""What a preprocessing run is to do, decided from its options before anything is written."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mindspeed_llm.arguments.parser import to_dict
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data import llama_factory
from mindspeed_llm.data.encode import Limits
from mindspeed_llm.data.encoders import Encoder
from mindspeed_llm.data.finish import Packing
from mindspeed_llm.data.handlers import DEFAULT_HANDLER, Handler, Reading, get_handler, needs_template
from mindspeed_llm.data.report import FORMAT
from mindspeed_llm.data.rows import file_hash, find_files
from mindspeed_llm.data.self_cognition import FORM, HANDLER, MAP_KEYS, is_self_cognition, self_cognition_rows
from mindspeed_llm.data.shaping import Shape
from mindspeed_llm.data.sources import Mixture, Source, detect_form, open_source, parse_spec
from mindspeed_llm.data.tokenize_rows import Job, output_fields, tools
from mindspeed_llm.errors import InputError, UsageError

CHAT_FIELDS = ("input_ids", "attention_mask", "labels")
# options that have no influence on what the files hold
NO_INFLUENCE = (
    "output_prefix", "workers", "log_interval", "overwrite", "num_shards", "shard_index", "preview", "inspect",
    "merge_group_keys", "input", "dataset", "tokenizer_name_or_path", "prompt_type_path", "on_bad_row",
)  # fmt: skip


@dataclass
class Plan:
    """A run.

    Attributes:
        job: what worker processes need.
        handler, encoder: the job's, in this process.
        mixture: the rows.
        prefix: path and first part of the name of the files to be written.
        fields: of what is written, one pair of files each.
        warnings: what a user should know before the first row is read.
    """

    options: PreprocessOptions
    job: Job
    handler: Handler
    encoder: Encoder
    mixture: Mixture
    prefix: Path
    fields: list[str]
    warnings: list[str]

    @property
    def source_name(self) -> str:
        """The input as the user wrote it."""
        return self.options.input or " ".join(self.options.sources.dataset)

    @property
    def stem(self) -> str:
        """What stands between prefix and field: files of conversations say `_packed`, packed or not."""
        return "" if self.handler.KIND == "text" else "_packed"

    @cached_property
    def inputs(self) -> list[dict[str, Any]]:
        """The files that are read, with size and sha256."""
        return [{"file": str(f), "bytes": f.stat().st_size, "sha256": file_hash(f)} for f in self.mixture.files]

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the report says about how the rows became tokens."""
        tokenizer, template = self.encoder.tokenizer, self.encoder.template
        options = self.options
        return {
            "format": FORMAT,
            "sources": self.options.sources.dataset or [str(self.options.input)],
            "input": self.inputs,
            "handler": self.job.handler,
            "template": {
                "name": template.name,
                "sha256": template.content_hash,
                "uses_thinking": template.uses_thinking,
            },
            "enable_thinking": self.encoder.thinking,
            "tokenizer": {
                "path": str(tokenizer.path),
                "sha256": tokenizer.content_hash,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": self.encoder.eos_id,
                "pad_id": self.encoder.pad_id,
            },
            "seq_length": options.seq_length,
            "pack": options.pack,
            "neat_pack": options.neat_pack,
            "fields": self.fields,
            "stem": self.stem,
            "options": to_dict(options),
        }

    @cached_property
    def key(self) -> str:
        """sha256 over everything that decides which tokens the run makes: the same for the same files, wherever."""
        return self.key_for(self.inputs)

    def key_for(self, inputs: Sequence[Mapping[str, Any]]) -> str:
        """The key if the files that are read had the contents `inputs` tells; no file of rows is opened.

        Sources are told by the places of their files among all, and by how many rows were asked for.
        """
        tokenizer, template = self.encoder.tokenizer, self.encoder.template
        said = to_dict(self.options)
        options = {**said, **said["sources"], "sources": None}
        place = {file: number for number, file in enumerate(self.mixture.files)}
        relevant = {name: value for name, value in options.items() if name not in NO_INFLUENCE}
        return hashlib.sha256(
            json.dumps(
                {
                    "format": FORMAT,
                    "files": [[Path(entry["file"]).name, entry["sha256"]] for entry in inputs],
                    "sources": [
                        [[place[file] for file in one.files], len(one.memory), one.wanted, one.form]
                        for one in self.mixture.sources
                    ]
                    if self.options.sources.dataset or any(source.form for source in self.mixture.sources)
                    else [],
                    "tokenizer": tokenizer.content_hash,
                    "template": template.content_hash,
                    "options": relevant,
                },
                sort_keys=True,
                default=str,
            ).encode()
        ).hexdigest()


def make_plan(options: PreprocessOptions) -> Plan:
    """Look at the options, the tokenizer and the names of the input files.

    Raises:
        UsageError: unknown handler, template or key, or options that do not fit the handler.
        InputError: no input, or no tokenizer.
    """
    if (options.output_prefix or "").endswith(("/", os.sep)):
        raise UsageError(f"--output-prefix {options.output_prefix} ends with the folder; add a name, e.g. alpaca")
    mixture, forms = _mixture(options)
    handler_name, map_keys = options.handler_name, _map_keys(options)
    if handler_name == llama_factory.HANDLER or handler_name is None and options.sources.dataset:
        handler_name, map_keys = forms[0][1], json.loads(forms[0][2])
    job = _job(options, handler_name or DEFAULT_HANDLER, map_keys, forms)
    handler, encoder = tools(job)
    fields = output_fields(handler)
    if options.pack and tuple(fields) != CHAT_FIELDS:
        raise UsageError(f"--pack joins rows of conversations; {job.handler} makes {', '.join(fields)}")
    return Plan(
        options, job, handler, encoder, mixture, Path(options.output_prefix or "preview").expanduser(), fields,
        _warnings(options, mixture, encoder, handler),
    )  # fmt: skip


def packing_of(options: PreprocessOptions, pad_id: int) -> Packing | None:
    """How rows are joined; None when they are not."""
    if not options.pack or options.seq_length is None:
        return None
    upstream = options.compat == "upstream"
    return Packing(options.seq_length, options.neat_pack, pad_id, options.seed, upstream, options.n_subs)


def _mixture(options: PreprocessOptions) -> tuple[Mixture, list[tuple[str, str, str]]]:
    """The sources, and (name, handler, map keys) of those that do not go by the run's handler."""
    if options.handler_name == llama_factory.HANDLER:
        if options.sources.dataset:
            raise UsageError(
                f"--handler-name {llama_factory.HANDLER} reads entries of dataset_info.json that --input names; "
                "--dataset names files and folders: give --input"
            )
        return _named_sources(options)
    if not options.sources.dataset:
        files, unused = find_files(options.input or "")
        return Mixture([Source(str(options.input), files, unused)]), []
    found, forms = [], []
    for number, word in enumerate(options.sources.dataset):
        source = open_source(word, (options.seed, number))
        if not source.files and is_self_cognition(parse_spec(word).path):
            source.memory = self_cognition_rows(options.sources.model_name, options.sources.model_author)
            source.form = FORM
            form = (FORM, HANDLER, MAP_KEYS)
        elif options.handler_name is None:
            handler, keys = detect_form(source)
            source.form = f"{handler} {keys}"
            form = (source.form, handler, keys)
        else:
            form = None
        if form and form not in forms:
            forms.append(form)
        found.append(source)
    return _mixed(options, found, forms)


def _named_sources(options: PreprocessOptions) -> tuple[Mixture, list[tuple[str, str, str]]]:
    """The entries of dataset_info.json that --input names, and their forms."""
    found = []
    data = llama_factory.named_data(options.sources.dataset_dir, options.input or "")
    for number, entry in enumerate(data):
        form = llama_factory.form_name(entry)
        most, seed = options.sources.max_samples, (options.seed, number)
        found.append(Source(entry.name, entry.files, entry.unused, entry.count, most, seed, form=form))
    return _mixed(options, found, llama_factory.forms_of(data))


def _mixed(
    options: PreprocessOptions, found: list[Source], forms: list[tuple[str, str, str]]
) -> tuple[Mixture, list[tuple[str, str, str]]]:
    """The mixture of the sources, all of which make the same files."""
    kinds = {get_handler(handler, json.loads(keys)).KIND for _, handler, keys in forms}
    if len(kinds) > 1:
        raise UsageError(
            "the sources mix running text, conversations or preferences; preprocess them apart and blend in training"
        )
    sources = options.sources
    return Mixture(found, sources.weights(), sources.mix_strategy, options.seed), forms


def _map_keys(options: PreprocessOptions) -> dict[str, Any]:
    try:
        map_keys = json.loads(options.map_keys or "{}")
    except ValueError as error:
        raise UsageError(f"--map-keys is not valid JSON ({error}): {options.map_keys}") from error
    if not isinstance(map_keys, dict):
        raise UsageError(f"--map-keys must be a JSON object of key and column, got {options.map_keys}")
    return map_keys


def _job(
    options: PreprocessOptions, handler: str, map_keys: Mapping[str, Any], forms: list[tuple[str, str, str]]
) -> Job:
    if options.tokenizer_name_or_path is None:
        raise UsageError("--tokenizer-name-or-path is required")
    return Job(
        tokenizer=options.tokenizer_name_or_path,
        template=options.prompt_type,
        template_file=options.prompt_type_path,
        enable_thinking=options.enable_thinking,
        handler=handler,
        map_keys=json.dumps(map_keys, sort_keys=True),
        # --max-length and its strategy decide about long rows where they are given
        limits=Limits(
            None if options.max_length else options.seq_length, options.append_eod, options.pack, options.neat_pack
        ),
        system=options.system,
        shape=Shape(options.max_length, options.truncation_strategy, options.mask_history, options.train_on_prompt),
        forms=tuple(forms),
        compat=options.compat,
        allow_control_tokens=options.allow_control_tokens,
        reading=Reading(options.compat is not None, tuple(options.json_keys), tuple(options.dataset_additional_keys)),
        pad_to_multiple_of=options.pad_to_multiple_of,
    )


def _without_effect(options: PreprocessOptions, handler: Handler) -> list[str]:
    """The options that were given and change nothing for this handler, each with the reason."""
    texts = options.json_keys != ["text"] and output_fields(handler) != options.json_keys
    reasons = {
        "--n-subs": options.n_subs > 1 and options.compat is None and "only upstream's packing goes part by part",
        "--json-keys": texts and f"{type(handler).__name__} reads other columns",
        "--dataset-additional-keys": options.dataset_additional_keys and handler.KIND != "answer"
        and "only the R1 handlers write such fields",
        "--pad-to-multiple-of": options.pad_to_multiple_of > 1 and handler.KIND != "text"
        and "only running text is filled up",
        "--mask-history": options.mask_history and handler.KIND != "chat" and "the rows are no conversations",
        "--train-on-prompt": options.train_on_prompt and handler.KIND != "chat" and "the rows are no conversations",
    }  # fmt: skip
    return [f"{flag} has no effect: {why}" for flag, why in reasons.items() if why]


def _warnings(options: PreprocessOptions, mixture: Mixture, encoder: Encoder, handler: Handler) -> list[str]:
    found = _without_effect(options, handler)
    for source in mixture.sources:
        if source.unused:
            names = ", ".join(f.name for f in source.unused[:5]) + (" ..." if len(source.unused) > 5 else "")
            what = "the input folder" if options.input else source.name
            found.append(f"{len(source.unused)} files of {what} have another format or part and are not read: {names}")
    if unknown := encoder.unknown_tokens():
        found.append(
            f"template {options.prompt_type} writes {', '.join(unknown)}, no token of this tokenizer: it becomes text; "
            "choose the template made for this model"
        )
    if options.append_eod and encoder.answers_end_with_eos():
        found.append(f"template {options.prompt_type} already ends answers with end-of-text; --append-eod adds another")
    trains = handler.KIND in ("chat", "preference") and needs_template(handler)
    if trains and not options.append_eod and not encoder.ends_answers():
        found.append(
            f"template {options.prompt_type} puts no token of this tokenizer after an answer, so that the model is not "
            "taught to stop; --append-eod adds end-of-text to every row"
        )
    return found


def refuse_existing(targets: list[Path], overwrite: bool) -> None:
    """Raise InputError when a file that is to be written exists and may not be replaced."""
    existing = [str(target) for target in targets if target.exists()]
    if existing and not overwrite:
        raise InputError(f"{existing[0]} exists; give --overwrite to replace it, or another --output-prefix")
