"""The live network: which rank holds what, and the marks megatron-core counts gradients by."""

import pytest

from mindspeed_llm.models.config import ModelConfig
from tests.distributed.cases import SIZES, Case
from tests.distributed.pool import pool
from tests.distributed.reference import saved_model
from tests.distributed.test_layouts import SP, VPP

pytestmark = pytest.mark.distributed
LAYOUTS = [
    (Case(), [[range(4)]]),
    (Case(world=2, **SP), [[range(4)], [range(4)]]),
    (Case(world=2, tensor=2), [[range(4)], [range(4)]]),
    (Case(world=2, pipeline=2), [[range(2)], [range(2, 4)]]),
    (Case(world=2, **VPP), [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]),
]


def facts(case: Case, tied: bool = False) -> list:
    model = ModelConfig.from_hf(saved_model(tied))
    return pool(case.world).run("tests.models.worker:chunk_facts", case=case, model=model)


@pytest.mark.parametrize(("case", "expected"), LAYOUTS, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_every_chunk_knows_its_layers(case: Case, expected: list) -> None:
    found = [[range(c.first_layer, c.first_layer + c.layers) for c in chunks] for chunks in facts(case)]
    assert found == expected


@pytest.mark.parametrize("tied", [False, True])
def test_a_ranks_shapes_follow_from_the_sizes(tied: bool) -> None:
    z = SIZES
    for chunks in facts(Case(world=2, tensor=2), tied):
        (chunk,) = chunks
        rows = (z.vocab + 1) // 2  # padded to a multiple of TP
        expected = {
            "embedding.word_embeddings.weight": (rows, z.hidden),
            "decoder.final_layernorm.weight": (z.hidden,),
        }
        if not tied:
            expected["output_layer.weight"] = (rows, z.hidden)
        for layer in range(z.layers):
            name = f"decoder.layers.{layer}."
            expected |= {
                name + "input_layernorm.weight": (z.hidden,),
                name + "self_attention.linear_qkv.weight": (z.qkv // 2, z.hidden),
                name + "self_attention.q_layernorm.weight": (z.head,),
                name + "self_attention.k_layernorm.weight": (z.head,),
                name + "self_attention.linear_proj.weight": (z.hidden, z.query // 2),
                name + "pre_mlp_layernorm.weight": (z.hidden,),
                name + "mlp.linear_fc1.weight": (z.ffn, z.hidden),
                name + "mlp.linear_fc2.weight": (z.hidden, z.ffn // 2),
            }
        assert chunk.shapes == expected


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_matrices_are_marked_split_and_norms_partial_under_sequence_parallelism(sequence_parallel: bool) -> None:
    (chunk,) = facts(Case(world=2, tensor=2, sequence_parallel=sequence_parallel))[0]
    norms = {name for name in chunk.shapes if "norm" in name}
    assert chunk.split == set(chunk.shapes) - norms
    assert chunk.partial & norms == (norms if sequence_parallel else set())
    assert chunk.partial <= norms
