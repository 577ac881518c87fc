"""Initial values depend on seed, name and global shape alone."""

from dataclasses import replace

import pytest
import torch

from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initial_value, initialise_, initialise_buffers_
from megalrps.model.layers import LocalLayers
from megalrps.model.parameters import parameter_specs
from megalrps.model.transformer import Transformer
from megalrps.parallel.buffers import FlatBuffers

torch.set_num_threads(1)

CONFIG = ModelConfig(
    num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96, vocab_size=256
)
TIED = replace(CONFIG, untie_embeddings_and_output_weights=False)


def values(config, seed=7, dtype=None, **stage):
    model = Transformer(config, layers=LocalLayers(dtype=dtype), **stage)
    initialise_(model, config, seed)
    return dict(model.named_parameters())


def test_order_of_construction_and_the_global_generator_do_not_matter():
    expected = values(CONFIG)
    torch.randn(100)
    backwards = values(CONFIG, layer_range=[3, 1, 0, 2])
    assert backwards.keys() == expected.keys()
    assert all(torch.equal(backwards[name], expected[name]) for name in expected)
    state = torch.get_rng_state()
    values(CONFIG)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_a_stage_starts_from_the_whole_models_values(config):
    expected = values(config)
    last = values(config, layer_range=range(2, 4), has_embedding=False)
    assert all(torch.equal(last[name], expected[name]) for name in last)
    assert ("embedding.weight" in last) == (config is TIED)


def test_a_tied_model_has_the_untied_ones_other_values():
    tied, untied = values(TIED), values(CONFIG)
    assert untied.keys() - tied.keys() == {"head.weight"}
    assert all(torch.equal(tied[name], untied[name]) for name in tied)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_masters_start_from_the_same_values(compute):
    model = Transformer(CONFIG)
    buffers = FlatBuffers(model, compute_dtype=compute, bucket_size=1000)
    initialise_buffers_(buffers, CONFIG, 7)
    masters = dict(buffers.named_masters())
    for name, expected in values(CONFIG).items():
        assert torch.equal(masters[name], expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[name].to(parameter.dtype))


def test_seed_and_name_decide():
    first, second = values(CONFIG), values(CONFIG, seed=8)
    drawn = [name for name in first if "norm" not in name]
    assert not any(torch.equal(first[name], second[name]) for name in drawn)
    assert not torch.equal(first["layers.0.attention.key.weight"], first["layers.0.attention.value.weight"])
    assert not torch.equal(first["layers.0.feed_forward.up.weight"], first["layers.1.feed_forward.up.weight"])


def test_other_types_hold_the_rounded_fp32_values():
    single, double, half = values(CONFIG), values(CONFIG, dtype=torch.float64), values(CONFIG, dtype=torch.bfloat16)
    for name in single:
        assert torch.equal(double[name], single[name].double())
        assert torch.equal(half[name], single[name].bfloat16())


def test_distributions():
    for name, value in values(CONFIG).items():
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value))
            continue
        is_output = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        expected = 0.02 / (8**0.5) if is_output else 0.02
        assert value.std().item() == pytest.approx(expected, rel=0.1), name
        assert abs(value.mean().item()) < 5 * expected / value.numel() ** 0.5, name


def test_golden_values():
    """The start of every run with this seed, for ever (up to the last bits, which the CPU's vector width may move)."""
    specs = parameter_specs(CONFIG)
    embedding = initial_value(specs["embedding.weight"], CONFIG, 1234)
    down = initial_value(specs["layers.3.feed_forward.down.weight"], CONFIG, 1234)
    torch.testing.assert_close(embedding[0, :4], torch.tensor(GOLDEN_EMBEDDING), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(down[-1, -4:], torch.tensor(GOLDEN_DOWN), rtol=1e-4, atol=1e-7)


GOLDEN_EMBEDDING = [0.04077403, 0.02516650, -0.03278171, 0.02952085]
GOLDEN_DOWN = [-0.00167440, 0.00558559, -0.00453169, -0.00793746]
