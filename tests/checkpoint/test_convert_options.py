"""Every converter command line of the guides is understood; flags are held against the model, files and each other."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_llm.arguments.convert import ConvertOptions
from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import PROGRAMS
from mindspeed_llm.checkpoint import open as open_sources
from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import TensorSource
from mindspeed_llm.checkpoint.formats.mcore import MegatronCheckpoint
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.merge import MergedSource
from mindspeed_llm.checkpoint.metadata import BaseRecord, LoraSettings
from mindspeed_llm.checkpoint.open import open_lora
from mindspeed_llm.checkpoint.tables import WeightTable
from mindspeed_llm.errors import UsageError
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.families import make_family
from tests.checkpoint.tiny import TARGETS, hf_config, make_hf, random_adapter, write_adapter
from tests.conftest import REPO

V1 = "--use-mcore-models --model-type GPT --load-model-type hf --save-model-type mg"
BACK = "--use-mcore-models --model-type GPT --load-model-type mg --save-model-type hf"
ONE = "--target-tensor-parallel-size 1 --target-pipeline-parallel-size 1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models by family, and one of them split."""
    root = tmp_path_factory.mktemp("models")
    for name in ("qwen2", "qwen3_moe", "deepseek_v3", "llama", "mistral", "internlm3", "glm4_moe"):
        make_family(name, root / name)
    make_hf(root / "qwen3")
    return root


def convert(words: str, folders: Path, save: Path) -> None:
    """One conversion of `--load-dir <family>`."""
    argv = [word.replace("@", f"{folders}/") for word in shlex.split(words)]
    assert main([*argv, "--save-dir", str(save)]) == 0


FORWARD = [
    # the workflow guide's first step, and what its second converter's script says
    f"{V1} --target-tensor-parallel-size 1 --target-pipeline-parallel-size 2 --spec"
    " mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec --load-dir @qwen3 --tokenizer-model @qwen3/tokenizer.json"
    " --model-type-hf qwen3 --params-dtype bf16",
    "--load-model-type hf --save-model-type mg --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2"
    " --load-dir @qwen3 --model-type-hf qwen3",
    # Qwen2.5, Mistral and InternLM3 under the name llama2
    f"{V1} --target-tensor-parallel-size 2 --target-pipeline-parallel-size 1 --add-qkv-bias --load-dir @qwen2"
    " --tokenizer-model None --model-type-hf llama2 --params-dtype bf16",
    f"{V1} {ONE} --load-dir @mistral --tokenizer-model None --model-type-hf llama2 --params-dtype bf16",
    f"{V1} {ONE} --load-dir @internlm3 --tokenizer-model None --model-type-hf llama2 --params-dtype bf16",
    f"{V1} {ONE} --load-dir @llama --tokenizer-model None --model-type-hf llama2 --w-pack True --post-norm",
    # experts
    f"{V1} --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --target-expert-parallel-size 2"
    " --moe-grouped-gemm --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec --load-dir @qwen3_moe"
    " --tokenizer-model None --model-type-hf qwen3-moe --params-dtype bf16",
    "--moe-grouped-gemm --target-tensor-parallel-size 2 --target-expert-parallel-size 4 --expert-tensor-parallel-size 1"
    " --load-dir @qwen3_moe --model-type-hf qwen3-moe",
    "--moe-grouped-gemm --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2"
    " --target-expert-parallel-size 2 --moe-tp-extend-ep --noop-layers 4,5 --num-layers 6"
    " --first-k-dense-replace 1 --mtp-num-layers 1"
    " --load-dir @deepseek_v3 --model-type-hf deepseek3 --save-layer-by-layer",
    "--target-pipeline-parallel-size 2 --schedules-method dualpipev --num-layers 4 --mtp-num-layers 0"
    " --load-dir @deepseek_v3 --model-type-hf deepseek3",
    "--target-pipeline-parallel-size 2 --num-layer-list 1,3 --load-dir @qwen3 --transformer-impl transformer_engine",
    "--target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --load-dir @glm4_moe"
    " --model-type-hf glm45-moe --first-k-dense-replace 1 --mtp-num-layers 1",
]  # fmt: skip


@pytest.mark.parametrize("words", FORWARD)
def test_upstreams_command_lines_split_a_model_that_comes_back_whole(words: str, folders: Path, tmp_path: Path) -> None:
    convert(words, folders, tmp_path / "mg")
    family = words.partition("--load-dir @")[2].split()[0]
    convert(
        f"{BACK} {ONE} --load-dir {tmp_path}/mg --model-type-hf {family} --hf-cfg-dir @{family}",
        folders,
        tmp_path / "hf",
    )
    left = content_hash(HFSource(tmp_path / "hf")) == content_hash(HFSource(folders / family))
    assert left == ("--mtp-num-layers 0" not in words)


def test_export_commands_of_other_tools_mean_the_same(folders: Path, tmp_path: Path) -> None:
    hf = folders / "qwen3"
    export = f"--model {hf} --tensor_model_parallel_size 2 --to_mcore true --torch_dtype bfloat16"
    assert main([*export.split(), "--save", str(tmp_path / "mg")]) == 0
    assert MegatronCheckpoint(tmp_path / "mg").layout == Layout.even(4, 2)
    assert main(f"--mcore_model {tmp_path}/mg --to_hf true --output_dir {tmp_path}/hf".split()) == 0
    primus = f"--framework megatron_bridge --load {tmp_path}/mg --convert_to_hf --hf_save_path {tmp_path}/primus"
    assert main([*primus.split(), "--tensor_model_parallel_size", "2"]) == 0
    assert (
        content_hash(HFSource(tmp_path / "hf"))
        == content_hash(HFSource(tmp_path / "primus"))
        == content_hash(HFSource(hf))
    )


@pytest.mark.parametrize("cast", ["", "--params-dtype bf16"])
def test_an_adapter_alone_takes_another_layout_and_type(cast: str, folders: Path, tmp_path: Path) -> None:
    source = HFSource(folders / "qwen3")
    factors = random_adapter(source.table)
    write_adapter(tmp_path / "lora", source.table, factors, Layout.even(4, 2, 2), LoraSettings(3, 7.0, TARGETS))
    words = (
        f"--lora-load {tmp_path}/lora --merge-lora false --save-model-type mg --target-tensor-parallel-size 1 {cast}"
    )
    assert main([*words.split(), "--load-dir", str(folders / "qwen3"), "--save-dir", str(tmp_path / "alone")]) == 0
    again = open_lora(tmp_path / "alone").tensors
    dtype = torch.bfloat16 if cast else torch.float32
    assert set(again.names()) == set(factors)
    assert all(torch.equal(again.read(name), factors[name].to(dtype)) for name in factors)


def test_a_base_is_hashed_once_whatever_asks_for_it(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, base = HFSource(folders / "qwen3"), str(folders / "qwen3")
    record = BaseRecord(base, content_hash(source))
    for name in ("one", "two"):
        settings = LoraSettings(3, 7.0, TARGETS)
        write_adapter(
            tmp_path / name, source.table, random_adapter(source.table), Layout.even(4), settings, base=record
        )
    hashed = []

    def counted(source: TensorSource, *args: object, **kwargs: object) -> str:
        hashed.append(source)
        return content_hash(source, *args, **kwargs)

    monkeypatch.setattr(open_sources, "content_hash", counted)
    merge = f"--load-dir {base} --lora-load {tmp_path}/one {tmp_path}/two --lora-weights 0.5 0.5"
    assert main([*merge.split(), "--save-model-type", "hf", "--save-dir", str(tmp_path / "out")]) == 0
    assert len(hashed) == 1


@pytest.mark.parametrize("spelling", ["--mcore_adapters", "--adapter_load"])
def test_an_adapter_alone_names_the_base_it_belongs_to(spelling: str, folders: Path, tmp_path: Path) -> None:
    source = HFSource(folders / "qwen3")
    factors, settings = random_adapter(source.table), LoraSettings(3, 7.0, TARGETS)
    record = BaseRecord(str(folders / "qwen3"), content_hash(source))
    write_adapter(tmp_path / "lora", source.table, factors, Layout.even(4, 2, 2), settings, base=record)
    merge = f"{spelling} {tmp_path}/lora --torch_dtype bfloat16"
    assert main([*f"{merge} --to_hf true --output_dir {tmp_path}/hf".split()]) == 0
    merged = content_hash(MergedSource(source, open_lora(tmp_path / "lora")))
    assert content_hash(HFSource(tmp_path / "hf")) == merged
    assert main([*f"{merge} --to_mcore true --save {tmp_path}/mg --tensor_model_parallel_size 2".split()]) == 0
    assert MegatronCheckpoint(tmp_path / "mg").metadata.content_hash == merged
    alone = f"{spelling} {tmp_path}/lora --merge_lora false --tensor_model_parallel_size 2 --to_hf true"
    assert main([*alone.split(), "--save", str(tmp_path / "peft")]) == 0
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    moved = BaseRecord(str(tmp_path / "gone"), None)
    write_adapter(tmp_path / "lost", source.table, factors, Layout.even(4, 1, 1), settings, base=moved)
    with pytest.raises(UsageError, match="--lora-load .*lost records .*gone, which does not exist"):
        main(f"{spelling} {tmp_path}/lost --to_hf --save {tmp_path}/none".split())
    with pytest.raises(UsageError, match="--load-dir must be given"):
        main(["--save-dir", str(tmp_path / "none")])
    with pytest.raises(UsageError, match="--to-hf and --to-mcore name different formats"):
        main(f"{spelling} {tmp_path}/lora --to_hf --to_mcore --save {tmp_path}/none".split())


def test_leaving_prediction_layers_behind_is_said_and_leaves_the_rest(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    convert("--load-dir @deepseek_v3 --mtp-num-layers 0", folders, tmp_path / "mg")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "--mtp-num-layers" in line]
    whole, rest = HFSource(folders / "deepseek_v3"), MegatronCheckpoint(tmp_path / "mg").base()
    left = [name for name in whole.names() if name.startswith("mtp.")]
    assert line == f"--mtp-num-layers 0: 1 prediction layers ({len(left)} tensors) are left out"
    assert rest.config.mtp_num_layers == 0 and set(rest.names()) == set(whole.names()) - set(left)
    convert(f"--load-dir {tmp_path}/mg", folders, tmp_path / "hf")
    assert set(HFSource(tmp_path / "hf").tensors) == {
        hf.name for name in rest.names() for hf in whole.table.entry(name).hf
    }


def test_flags_that_describe_the_sources_layout_are_held_against_it(folders: Path, tmp_path: Path) -> None:
    layout = "--target-pipeline-parallel-size 2 --noop-layers 1,3 --num-layers-per-virtual-pipeline-stage 1"
    layout = layout.replace("1,3 ", "1,3,5,7 ")
    convert(f"--load-dir @qwen3 {layout}", folders, tmp_path / "mg")
    back = f"{BACK} {ONE} --load-checkpoint-loosely --load-dir {tmp_path}/mg --num-layers-per-virtual-pipeline-stage 1"
    convert(f"{back} --noop-layers 1,3,5,7", folders, tmp_path / "hf")
    assert content_hash(HFSource(tmp_path / "hf")) == content_hash(HFSource(folders / "qwen3"))
    for wrong, message in (
        ("--noop-layers 1,3,5,6", r"--noop-layers says \[1, 3, 5, 6\], the source has \[1, 3, 5, 7\]"),
        ("--num-layer-list 1,3", r"--num-layer-list says \[1, 3\], the source has \[4, 4\]"),
        ("--schedules-method dualpipev", "--schedules-method says dualpipev, the source has None"),
        ("--moe-tp-extend-ep", "--moe-tp-extend-ep says True, the source has False"),
        ("--expert-tensor-parallel-size 2", "--expert-tensor-parallel-size says 2, the source has 1"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(f"{back} {wrong}", folders, tmp_path / "none")
    assert not (tmp_path / "none").exists()


WRONG = [
    *[(f"{flag} {value}", f"{flag} {value}: must be at least 1") for value in (0, -1) for flag in (
        "--target-tensor-parallel-size", "--target-pipeline-parallel-size", "--target-expert-parallel-size",
        "--expert-tensor-parallel-size", "--num-layers-per-virtual-pipeline-stage", "--make-vocab-size-divisible-by",
        "--num-layers", "--lora-r",
    )],
    ("--target-tensor-parallel-size two", "expects .*got 'two'"),
    ("--num-layers 5", "--num-layers says 5, the model says 4"),
    ("--num-layers 5 --noop-layers 0,1", "--num-layers says 5, the model says 4"),
    ("--first-k-dense-replace 1", "--first-k-dense-replace says 1, the model has 4 layers before"),
    ("--mtp-num-layers 1", "--mtp-num-layers says 1, .* holds 0 prediction layers; leave it out, or give 0"),
    ("--mtp-num-layers -1", "--mtp-num-layers says -1"),
    ("--add-qkv-bias", "--add-qkv-bias says True, the model says False"),
    ("--model-type-hf llama2", "--model-type-hf says llama2, .* is qwen3; leave it out"),
    ("--model-type-hf baichuan", "unknown model family 'baichuan'"),
    ("--spec mindspeed_llm.tasks.models.spec.llama_spec layer_spec", "--spec says"),
    ("--spec one", "--spec takes exactly 2 values"),
    ("--num-layer-list 1,3", r"--num-layer-list 1,3: needs 1 positive numbers"),
    ("--target-pipeline-parallel-size 2 --num-layer-list 1,4", "sum up to 4 layers"),
    ("--target-pipeline-parallel-size 2 --num-layer-list 4,0", "positive numbers"),
    ("--num-layer-list 1;3", "--num-layer-list '1;3': expected numbers separated by commas"),
    ("--target-pipeline-parallel-size 2 --num-layer-list 1,3 --noop-layers 1", "--num-layer-list excludes"),
    ("--noop-layers 9", "--noop-layers 9: needs different places below 5"),
    ("--noop-layers 1,1", "--noop-layers 1,1: needs different places below 6"),
    ("--noop-layers 0,1 --target-pipeline-parallel-size 4", "6 layers are not divisible by pipeline parallel size 4"),
    ("--target-pipeline-parallel-size 4 --schedules-method dualpipev", "not divisible"),
    ("--target-pipeline-parallel-size 2 --schedules-method dualpipev --num-layers-per-virtual-pipeline-stage 2", "V"),
    ("--schedules-method zigzag", "dualpipev"),
    ("--expert-tensor-parallel-size 2", "expert tensor parallel size 2 does not divide tensor parallel size 1"),
    ("--moe-tp-extend-ep --target-tensor-parallel-size 2 --expert-tensor-parallel-size 2", "--moe-tp-extend-ep"),
    ("--target-expert-parallel-size 2", "the model has no experts"),
    ("--ckpt-format zarr", "unknown value of --ckpt-format"),
    ("--ckpt-format torch_dist --target-tensor-parallel-size 2", "loads at every layout; leave --target-tensor"),
    ("--ckpt-format torch_dist --moe-grouped-gemm --noop-layers 1", "leave --noop-layers, --moe-grouped-gemm out"),
    ("--save-model-type hf", "hf to hf without --lora-load or --params-dtype changes nothing"),
    ("--save-model-type hf --params-dtype fp32 --target-tensor-parallel-size 2", "leave --target-tensor-paral"),
    ("--save-model-type hf --params-dtype fp32 --noop-layers 1", "leave --noop-layers out"),
    ("--save-model-type hf --params-dtype fp32 --ckpt-format torch_dist", "leave --ckpt-format out"),
    ("--load-model-type mg", "is an HF folder; give --load-model-type hf"),
    *[(f"--save-model-type hf --params-dtype fp32 --max-shard-size {size}", f"--max-shard-size {size}: not a size")
      for size in ("0", "0GB", "-5GB", "5XB", "GB", "1e9", "inf")],
    ("--params-dtype int8", "unknown value of --params-dtype"),
    ("--qlora-nf4", "--qlora-nf4"),
    ("--load-hf-from-config", "--hf-cfg-dir"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_flags_that_cannot_be_meant_are_usage_errors(words: str, message: str, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as error:
        convert(f"--load-dir @qwen3 {words}", folders, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "most"), [("30kB", 30_000), ("0.03MB", 30_000), ("29KiB", 29 << 10), ("30000", 30_000), ("30 kb", 30_000)]
)
def test_shards_are_no_larger_than_asked(size: str, most: int, folders: Path, tmp_path: Path) -> None:
    convert(f"--load-dir @qwen3 --save-model-type hf --params-dtype fp32 --max-shard-size '{size}'", folders, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        header = json.loads(shard.read_bytes()[8 : 8 + int.from_bytes(shard.read_bytes()[:8], "little")])
        assert max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__") <= most
    assert content_hash(HFSource(tmp_path)) != content_hash(HFSource(folders / "qwen3"))


NEXT = [
    ("qwen3", "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2", 4),
    ("qwen3_moe", "--target-tensor-parallel-size 2 --target-expert-parallel-size 2", 4),
    ("qwen3_moe", "--target-tensor-parallel-size 2 --target-expert-parallel-size 4 --expert-tensor-parallel-size 1", 4),
    ("qwen3_moe", "--target-tensor-parallel-size 4 --target-expert-parallel-size 2 --expert-tensor-parallel-size 1", 4),
    ("qwen3_moe", "--target-tensor-parallel-size 2 --target-expert-parallel-size 2 --moe-tp-extend-ep", 4),
    ("qwen3_moe", "--target-pipeline-parallel-size 2 --target-expert-parallel-size 2", 4),
    ("qwen3", "--ckpt-format torch_dist", 1),
]


@pytest.mark.parametrize(("family", "flags", "processes"), NEXT)
def test_the_next_command_starts_as_many_processes_as_the_layout_needs(
    family: str, flags: str, processes: int, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    convert(f"--load-dir @{family} {flags}", folders, tmp_path / "mg")
    launch, count_flag, count, program, *words = shlex.split(capsys.readouterr().out.split("next: ", 1)[1])
    assert (launch, count_flag, int(count)) == ("torchrun", "--nproc_per_node", processes)
    options = parse(PROGRAMS[program], words, program)
    sizes = options.parallel
    if family == "qwen3_moe":
        experts = sizes.expert_model_parallel_size * sizes.expert_tensor_parallel_size
        assert processes % (experts * sizes.pipeline_model_parallel_size) == 0
    assert processes % (sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size) == 0


def test_the_two_scripts_have_one_parser() -> None:
    words = ["--load-dir", "a", "--save-dir", "b", "--target-expert-model-parallel-size", "2", "--mtp_num_layers=1"]
    options = parse(ConvertOptions, words, "convert_ckpt_v2.py")
    assert (options.target_expert_parallel_size, options.mtp_num_layers) == (2, 1)


def plan(words: str, folders: Path, capsys: pytest.CaptureFixture, root: Path) -> tuple[list[list[str]], str]:
    """The rows and the last line of a dry run, which leaves no trace."""
    before = sorted(root.rglob("*"))
    convert(f"{words} --dry-run", folders, root / "new" / "out")
    assert sorted(root.rglob("*")) == before
    *rows, last = capsys.readouterr().out.splitlines()
    return [row.split("  ") for row in rows], last


@pytest.mark.parametrize("words", ["@qwen3", "@qwen3 --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2",
                                   "@qwen3_moe --target-expert-parallel-size 2 --moe-grouped-gemm"])  # fmt: skip
def test_a_dry_run_says_what_the_run_then_writes(
    words: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows, last = plan(f"--load-dir {words}", folders, capsys, tmp_path)
    convert(f"--load-dir {words}", folders, tmp_path / "mg")
    checkpoint = MegatronCheckpoint(tmp_path / "mg")
    found = {}
    for rank in checkpoint.files:
        for model, state in checkpoint.states(checkpoint.files[rank]):
            for key, tensor in state.items():
                if tensor is not None:
                    file = f"{checkpoint.layout.rank_folder(*rank)}/model_optim_rng.pt"
                    shape = "x".join(map(str, tensor.shape))
                    found[file, f"{model}/{key}"] = (f"{shape} {str(tensor.dtype)[6:]}", str(tensor.nbytes))
    assert {(row[0], row[1]): (row[2], row[3]) for row in rows} == found
    assert (
        last.startswith(f"dry run: {len(found)} tensors in {len(checkpoint.files)} files") and "MiB of memory" in last
    )


def test_a_dry_run_of_an_hf_result_lists_the_tensors_of_each_file(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    convert("--load-dir @qwen3_moe", folders, tmp_path / "mg")
    capsys.readouterr()
    rows, _ = plan(f"--load-dir {tmp_path}/mg --max-shard-size 50kB", folders, capsys, tmp_path)
    convert(f"--load-dir {tmp_path}/mg --max-shard-size 50kB", folders, tmp_path / "hf")
    found = {
        (tensor.path.name, name): ("x".join(map(str, tensor.shape)), str(tensor.nbytes))
        for name, tensor in HFSource(tmp_path / "hf").tensors.items()
    }
    assert {(row[0], row[1]): (row[2].split()[0], row[3]) for row in rows} == found


MEASURED = """
import sys
from mindspeed_llm.checkpoint import open as open_sources
from mindspeed_llm.checkpoint.convert import main
main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_a_dry_run_tells_the_memory_the_run_then_takes(tmp_path: Path) -> None:
    raw = {**hf_config(layers=4), "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 16000}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(raw))
    names = WeightTable(ModelConfig.from_hf(tmp_path / "hf")).hf_names
    tensors = {hf: torch.zeros(entry.stored_shape(part), dtype=torch.bfloat16) for hf, (entry, part) in names.items()}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) > 150e6
    words = ["--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "mg", "--target-tensor-parallel-size", 2]

    def last_lines(*more: str) -> list[str]:
        command = [sys.executable, "-c", MEASURED, *map(str, words), *more]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO).stdout.splitlines()

    told = int(re.search(r"about (\d+) MiB of memory", last_lines("--dry-run")[-2])[1])
    taken = int(last_lines()[-1]) / 1024
    assert taken <= told <= 2 * taken and taken < 600
