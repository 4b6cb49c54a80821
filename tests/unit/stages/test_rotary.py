"""`Rotary` turns vectors as the models of transformers do, and back."""

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from kvpolicy.stages import Rotary

DIM, LONGEST = 16, 4096
SHAPE = {"hidden_size": 4 * DIM, "num_attention_heads": 4, "head_dim": DIM, "max_position_embeddings": LONGEST}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MODELS = {
    "default": (modeling_llama, modeling_llama.LlamaRotaryEmbedding, LlamaConfig(**SHAPE)),
    "yarn": (modeling_llama, modeling_llama.LlamaRotaryEmbedding, LlamaConfig(**SHAPE, rope_parameters=YARN)),
    "llama3": (modeling_llama, modeling_llama.LlamaRotaryEmbedding, LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "partial": (modeling_phi3, modeling_phi3.Phi3RotaryEmbedding, Phi3Config(**SHAPE, rope_parameters=PARTIAL)),
}


@pytest.fixture(params=MODELS)
def model(request):
    """Queries, keys and positions as a model turns them, how it does, and the `Rotary` that should do the same."""
    module, embedding, config = MODELS[request.param]
    embedding = embedding(config)
    random = torch.Generator().manual_seed(1)
    queries, keys = (torch.randn(2, heads, 7, DIM, generator=random) for heads in (4, 2))
    positions = torch.tensor([[0, 1, 2, 3, 900, 901, 4095], [5, 6, 100, 101, 102, 2000, 3999]])

    def turn(one, other):
        return module.apply_rotary_pos_emb(one, other, *embedding(one, positions))

    return queries, keys, positions[:, None], turn, Rotary(embedding.inv_freq, embedding.attention_scaling)


def test_it_turns_as_the_model_does(model):
    queries, keys, positions, turn, rotary = model
    for plain, turned in zip((queries, keys), turn(queries, keys), strict=True):
        assert_close(rotary.rotate(plain, positions.expand(plain.shape[:3])), turned, atol=1e-6, rtol=1e-6)
        assert_close(rotary.rotate(plain, positions), turned, atol=1e-6, rtol=1e-6)


def test_it_gives_back_what_the_model_turned(model):
    queries, keys, positions, turn, rotary = model
    for plain, turned in zip((queries, keys), turn(queries, keys), strict=True):
        assert_close(rotary.unrotate(turned, positions), plain, atol=1e-5, rtol=1e-5)


def test_bfloat16_costs_no_more_than_its_own_rounding(model):
    queries, keys, positions, turn, rotary = model
    turned, _ = turn(queries.bfloat16(), keys.bfloat16())
    found = rotary.unrotate(turned.float(), positions)
    assert_close(found, queries, atol=0.05, rtol=0.02)
    assert rotary.rotate(queries.bfloat16(), positions).dtype == torch.bfloat16


def test_yarn_stretches_what_it_turns():
    _, embedding, config = MODELS["yarn"]
    assert embedding(config).attention_scaling > 1.1  # else the test above would not see the factor


def test_distances_are_all_that_products_see():
    rotary = Rotary(10000.0 ** -torch.arange(0, 1, 2 / DIM, dtype=torch.float64))
    queries, keys = torch.randn(2, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    at, shift = torch.tensor([3, 1, 4, 1, 5]), 26535
    found = rotary.rotate(queries, at + shift + 8) @ rotary.rotate(keys, at + shift).T
    assert_close(found, rotary.rotate(queries, at + 8) @ rotary.rotate(keys, at).T)
    assert_close(rotary.rotate(keys, at).norm(dim=-1), keys.norm(dim=-1))


def test_position_0_and_what_is_beyond_the_rotation_stay():
    rotary = Rotary(torch.tensor([1.0, 0.1]))
    vectors = torch.arange(6.0)
    assert_close(rotary.rotate(vectors, torch.tensor(0)), vectors)
    assert torch.equal(rotary.rotate(vectors, torch.tensor(7))[4:], vectors[4:])
    quarter = Rotary(torch.tensor([torch.pi / 2]))
    assert_close(quarter.rotate(torch.tensor([1.0, 0.0]), torch.tensor(1)), torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
