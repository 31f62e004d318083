"""FP8 and MXFP4 hub weights: the reference is transformers' own dequantisation, bit for bit."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats import quantised
from mindspeed_llm.checkpoint.formats.hf import HFSource, copy_companions, write_hf
from mindspeed_llm.checkpoint.formats.hf_folder import read_folder
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor, Readable
from mindspeed_llm.checkpoint.formats.quantised import Fp8Tensor, Mxfp4Tensor, dequantised
from mindspeed_llm.checkpoint.formats.safetensors_file import read_safetensors
from mindspeed_llm.errors import InputError
from tests.checkpoint.tiny import make_hf

BLOCK = (16, 8)
FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "fmt": "e4m3", "activation_scheme": "dynamic"}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit: NaN is NaN, -0 is not 0."""
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.int16), other.view(torch.int16))


def fp8_pair(shape: tuple[int, ...], seed: int = 0, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """Float8 values of all kinds (no NaN) and scales of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    values[(values & 0x7F) == 0x7F] = 0x3A
    grid = tuple(-(-size // one) for size, one in zip(shape[-2:], block, strict=True))
    scales = torch.exp(torch.randn((*shape[:-2], *grid), generator=generator) * 3)
    return values.view(torch.float8_e4m3fn), scales


def transformers_fp8(values: Tensor, scales: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """What transformers makes of it; it takes whole blocks only, so the last ones are filled up before."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = values.shape[-2:]
    whole = [scales.shape[-2] * block[0], scales.shape[-1] * block[1]]
    filled = torch.zeros((*values.shape[:-2], *whole))
    filled[..., :rows, :columns] = values.float()
    done = Fp8Dequantize(None)._dequantize_one(filled.to(values.dtype), scales, output_dtype=torch.bfloat16)
    return done[..., :rows, :columns].contiguous()


def stored(folder: Path, **tensors: Tensor) -> dict[str, LazyTensor]:
    """Tensors written to a file and opened."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return read_folder(folder)


def mxfp4_pair(experts: int, rows: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random bytes: every value, and exponents from the smallest to the largest."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(0, 256, (experts, rows, groups), generator=generator, dtype=torch.uint8)


def check_boxes(tensor: Readable, whole: Tensor) -> None:
    """Every kind of box equals the same box of the whole tensor."""
    rows, columns = whole.shape[:2]
    cuts = lambda size: [None, [(0, size)], [(1, size - 1)], [(size // 2, size // 2 + 1)], [(size - 3, size), (1, 3)]]  # noqa: E731
    for across, along in itertools.product(cuts(rows), cuts(columns)):
        row_places = torch.cat([torch.arange(*one) for one in across or [(0, rows)]])
        column_places = torch.cat([torch.arange(*one) for one in along or [(0, columns)]])
        assert same_bits(tensor.read(across, along), whole[row_places][:, column_places].contiguous()), (across, along)


@pytest.mark.parametrize("shape", [(32, 24), (35, 24), (32, 21), (33, 17), (5, 3), (48, 1)])
@pytest.mark.parametrize("slab", [1 << 22, 40])
def test_fp8_blocks_are_dequantised_as_transformers_does_it(
    shape: tuple[int, int], slab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "SLAB", slab)
    values, scales = fp8_pair(shape)
    expected = transformers_fp8(values, scales)
    found, note = dequantised(stored(tmp_path, w=values, w_scale_inv=scales), FP8, "here")
    assert list(found) == ["w"] and found["w"].shape == shape and found["w"].dtype == torch.bfloat16
    assert note == "here: 1 FP8 tensors are dequantised to bfloat16"
    assert same_bits(found["w"].read(), expected)
    if min(shape) > 4:
        check_boxes(found["w"], expected)


def test_released_fp8_shapes_whose_last_block_is_cut_equal_the_function_transformers_trains_with(
    tmp_path: Path,
) -> None:
    """576 rows in blocks of 128, as in DeepSeek-V3: its loader refuses them, its backward pass does not."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    values, scales = fp8_pair((576, 300), block=(128, 128))
    settings = {**FP8, "weight_block_size": [128, 128]}
    found, _ = dequantised(stored(tmp_path, w=values, w_scale_inv=scales), settings, "here")
    expected = _dequantize_fp8_weight(values, scales, [128, 128], torch.float32).to(torch.bfloat16)
    assert same_bits(found["w"].read(), expected)


def test_fp8_scales_per_tensor_as_exponents_and_stacked_over_experts_are_understood(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    one = Fp8Dequantize(None)._dequantize_one
    values, scales = fp8_pair((32, 24))
    single = torch.tensor(0.37)
    exponents = torch.randint(110, 140, scales.shape, dtype=torch.uint8)
    cases = {"single": single, "exponents": exponents, "e8m0": exponents.view(torch.float8_e8m0fnu)}
    for name, scale in cases.items():
        found, _ = dequantised(stored(tmp_path / name, w=values, w_scale_inv=scale), FP8, "here")
        assert same_bits(found["w"].read(), one(values, scale, output_dtype=torch.bfloat16)), name
    values, scales = fp8_pair((3, 33, 24))
    found, _ = dequantised(stored(tmp_path / "stacked", w=values, w_scale_inv=scales), FP8, "here")
    expected = transformers_fp8(values, scales)
    assert same_bits(found["w"].read(), expected)
    assert same_bits(found["w"].read([(1, 3)], [(4, 9)]), expected[1:3, 4:9].contiguous())
    check_boxes(found["w"].expert(2), expected[2])
    check_boxes(found["w"].expert(2, True), expected[2].t())


@pytest.mark.parametrize("slab", [1 << 22, 70])
def test_mxfp4_is_dequantised_and_laid_out_as_transformers_does_it(
    slab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    monkeypatch.setattr(quantised, "SLAB", slab)
    blocks, scales = mxfp4_pair(3, 10, 2)
    expected = convert_moe_packed_tensors(blocks, scales)
    found, note = dequantised(stored(tmp_path, w_blocks=blocks, w_scales=scales), {"quant_method": "mxfp4"}, "here")
    tensor = found["w"]
    assert list(found) == ["w"] and tensor.shape == tuple(expected.shape) == (3, 64, 10)
    assert note == "here: 1 MXFP4 tensors are dequantised to bfloat16"
    assert same_bits(tensor.read(), expected)
    assert same_bits(tensor.read([(1, 3)], [(30, 35)]), expected[1:3, 30:35].contiguous())
    for number in range(3):
        check_boxes(tensor.expert(number), expected[number])
        check_boxes(tensor.expert(number, transposed=True), expected[number].t().contiguous())


def test_a_box_reads_its_own_blocks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, scales = mxfp4_pair(4, 50, 6)
    values, fp8_scales = fp8_pair((64, 80))
    tensors = stored(tmp_path, m_blocks=blocks, m_scales=scales, f=values, f_scale_inv=fp8_scales)
    found, _ = dequantised(tensors, FP8, "here")
    read: list[int] = []
    plain = LazyTensor.read
    monkeypatch.setattr(LazyTensor, "read", lambda *box: read.append(plain(*box).nbytes) or plain(*box))
    assert found["m"].expert(2, True).read([(3, 5)], [(40, 50)]).shape == (2, 10)
    assert sum(read) == 2 * (16 + 1)
    read.clear()
    assert found["f"].read([(3, 5)], [(7, 9)]).shape == (2, 2)
    assert sum(read) == 2 * 2 + fp8_scales.nbytes


def quantise_folder(folder: Path, block: tuple[int, int] = BLOCK) -> dict[str, Tensor]:
    """Turn the projections of a tiny HF folder into FP8; -> the bfloat16 weights they stand for."""
    plain = load_file(folder / "model.safetensors")
    quantised_tensors = {}
    for number, (name, values) in enumerate(plain.items()):
        if "proj" in name:
            quantised_tensors[name], scales = fp8_pair(tuple(values.shape), number, block)
            quantised_tensors[name + "_scale_inv"] = scales
            plain[name] = transformers_fp8(quantised_tensors[name], scales, block)
        else:
            quantised_tensors[name] = values
    save_file(quantised_tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    settings = {**FP8, "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": settings}))
    return plain


def test_an_fp8_folder_is_the_model_of_its_bfloat16_weights_and_is_exported_without_its_quantisation(
    tmp_path: Path,
) -> None:
    plain = quantise_folder(make_hf(tmp_path / "hf"))
    source = HFSource(tmp_path / "hf")
    assert source.config.dtype == "bfloat16"
    assert len(source.notes) == 1 and "28 FP8 tensors are dequantised to bfloat16" in source.notes[0]
    save_file(plain, make_hf(tmp_path / "plain") / "model.safetensors")
    assert content_hash(source) == content_hash(HFSource(tmp_path / "plain"))
    (tmp_path / "out").mkdir()
    write_hf(source, tmp_path / "out")
    copy_companions(tmp_path / "hf", tmp_path / "out", source.config)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == plain.keys()
    assert all(same_bits(exported[name], values) for name, values in plain.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert HFSource(tmp_path / "out").notes == []


def test_transformers_loads_the_same_weights_from_an_fp8_folder(tmp_path: Path) -> None:
    """Blocks that divide every shape, since transformers takes no others."""
    from transformers import AutoModelForCausalLM

    quantise_folder(make_hf(tmp_path / "hf"), (4, 4))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    source = HFSource(tmp_path / "hf")
    theirs = dict(model.named_parameters())
    assert theirs.keys() == source.tensors.keys()
    for name, parameter in theirs.items():
        assert same_bits(source.tensors[name].read(), parameter.detach()), name


def test_transformers_loads_the_same_experts_from_an_mxfp4_gpt_oss_folder(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        pair = mxfp4_pair(experts, rows, columns // 32, len(name))
        tensors[name + "_blocks"], tensors[name + "_scales"] = pair[0], pair[1].clamp(100, 130)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": settings}))
    loaded = GptOssForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    found, note = dequantised(read_folder(tmp_path), settings, "here")
    assert "4 MXFP4 tensors" in note
    theirs = dict(loaded.named_parameters())
    assert theirs.keys() == found.keys()
    for name, parameter in theirs.items():
        assert same_bits(found[name].read(), parameter.detach()), name
    (tmp_path / "plain").mkdir()
    plain = {name: parameter.detach().clone() for name, parameter in theirs.items()}
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "plain" / "config.json").write_text(json.dumps(raw))
    assert content_hash(HFSource(tmp_path)) == content_hash(HFSource(tmp_path / "plain"))


def test_what_cannot_be_dequantised_is_refused_with_names(tmp_path: Path) -> None:
    values, scales = fp8_pair((32, 24))
    blocks, exponents = mxfp4_pair(2, 4, 1)
    cases = [
        ({"w": values}, FP8, "w is stored without w_scale_inv"),
        ({"w_scale_inv": scales}, FP8, "w_scale_inv is stored without w;"),
        ({"w_blocks": blocks}, None, "w_blocks is stored without w_scales"),
        ({"w_blocks": blocks, "w_scales": exponents[:1]}, None, r"scales \[1, 4, 1\]; expected"),
        ({"w": values, "w_scale_inv": scales[:, :2].clone()[:1].repeat(3, 1)}, FP8, r"no blocks of \[16, 8\]"),
        ({"w": values.float()}, {"quant_method": "gptq"}, "quantised by 'gptq', which cannot be read"),
    ]
    for number, (tensors, settings, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            dequantised(stored(tmp_path / str(number), **tensors), settings, "here")


def test_static_activation_scales_are_left_out_and_said(tmp_path: Path) -> None:
    values, scales = fp8_pair((32, 24))
    tensors = {"m.weight": values, "m.weight_scale_inv": scales, "m.activation_scale": torch.ones(1)}
    found, note = dequantised(stored(tmp_path, **tensors), FP8, "here")
    assert list(found) == ["m.weight"] and note.endswith("1 activation scales are left out")


def test_quantised_tensors_know_their_type_and_reject_boxes_outside(tmp_path: Path) -> None:
    values, scales = fp8_pair((32, 24))
    blocks, exponents = mxfp4_pair(2, 4, 1)
    save_file({"w": values, "s": scales, "b": blocks, "e": exponents}, tmp_path / "x.safetensors")
    tensors = read_safetensors(tmp_path / "x.safetensors")
    for tensor in (Fp8Tensor(tensors["w"], tensors["s"], BLOCK), Mxfp4Tensor(tensors["b"], tensors["e"])):
        with pytest.raises(IndexError):
            tensor.read([(0, tensor.shape[0] + 1)])
