"""Preprocessing inside training: the same rows and tokens as offline, made once and kept under what they follow from.

One process makes the files in `<cache>/<key>/`, where the key is a hash over the input files, the options, the
tokenizer and the template; the others wait for them to appear. A second run with the same inputs finds them there.
"""

from dataclasses import replace
from pathlib import Path

from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.index_cache import wait_for
from mindspeed_llm.data.plan import make_plan
from mindspeed_llm.data.preprocess import preprocess
from mindspeed_llm.data.publish import settle
from mindspeed_llm.data.report import read_report, report_path
from mindspeed_llm.errors import UsageError

NAME = "data"  # first part of the files' names in the folder of a key


def prepared_prefix(options: PreprocessOptions, cache: str | Path, builds: bool, patience: float = 24 * 3600.0) -> Path:
    """The output prefix of the files that `options` make, made now where they are not in the cache yet.

    Args:
        options: of preprocessing; the output prefix is chosen here.
        cache: folder for all such files.
        builds: this process makes what is missing: rank 0 where the nodes share the folder, the first process of every
            node where they do not.
        patience: how long the others wait, in seconds.

    Raises:
        UsageError: options that name an output, parts or a merge.
        InputError: the rows cannot be read, or the process that builds has not finished in time.
    """
    if options.output_prefix or options.num_shards > 1 or options.merge_group_keys:
        raise UsageError("--output-prefix, --num-shards and --merge-group-keys are of preprocess_data.py alone")
    root = Path(cache).expanduser()
    key = make_plan(replace(options, output_prefix=str(root / NAME))).key
    prefix = root / key[:32] / NAME
    if builds:
        settle(prefix)
        report = read_report(prefix)
        if report is None or report.get("key") != key:
            preprocess(replace(options, output_prefix=str(prefix), overwrite=True))
    wait_for(report_path(prefix), patience)
    return prefix
