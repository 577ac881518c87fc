"""The same weights in Hugging Face's LLaMA give the same logits, loss and gradients; conversion loses nothing."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megalrps.errors import InputError
from megalrps.model.config import ModelConfig
from megalrps.model.huggingface import from_huggingface, huggingface_name, to_huggingface
from megalrps.model.initialisation import initialise_
from megalrps.model.layers import LocalLayers
from megalrps.model.transformer import Transformer

torch.set_num_threads(1)

PLAIN = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, vocab_size=96)
SHAPES = {
    "plain": PLAIN,
    "grouped": replace(PLAIN, num_query_groups=2, num_layers=3),
    "one key-value head, tied": replace(PLAIN, num_query_groups=1, untie_embeddings_and_output_weights=False),
    "odd sizes": replace(
        PLAIN,
        hidden_size=45,
        num_attention_heads=9,
        num_query_groups=3,
        kv_channels=10,
        ffn_hidden_size=77,
        vocab_size=131,
        rotary_base=5e5,
        norm_epsilon=1e-3,
    ),
}


def ours(config, dtype=torch.float32):
    model = Transformer(config, layers=LocalLayers(dtype=dtype))
    initialise_(model, replace(config, init_method_std=0.2), seed=3)  # large weights make every term count
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


def theirs(model, attention):
    """transformers' model with our weights, converted by the code under test."""
    from transformers import LlamaConfig, LlamaForCausalLM

    exported = to_huggingface(model.state_dict(), model.config, max_position_embeddings=64)
    other = LlamaForCausalLM._from_config(LlamaConfig(**exported.config), attn_implementation=attention)
    other.to(next(model.parameters()).dtype)
    missing, unexpected = other.load_state_dict(exported.weights, strict=False)
    assert not unexpected
    assert missing == ([] if model.config.untie_embeddings_and_output_weights else ["lm_head.weight"])
    other.tie_weights()
    return other


def in_double(other):
    """``other`` with torch's RMSNorm: transformers' own computes in fp32 whatever the type."""

    def norm_like(module):
        norm = torch.nn.RMSNorm(module.weight.numel(), module.variance_epsilon, dtype=torch.float64)
        norm.weight = module.weight
        return norm

    for layer in other.model.layers:
        layer.input_layernorm = norm_like(layer.input_layernorm)
        layer.post_attention_layernorm = norm_like(layer.post_attention_layernorm)
    other.model.norm = norm_like(other.model.norm)
    return other


def batch(config):
    tokens = torch.randint(config.vocab_size, (2, 18), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_parity_in_double_precision(config):
    model = ours(config, torch.float64)
    other = in_double(theirs(model, "sdpa"))  # their eager attention rounds its softmax to fp32
    tokens, labels = batch(config)
    other_logits = other(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens), other_logits, rtol=1e-12, atol=1e-12)
    loss, other_loss = (
        model.loss(tokens, labels).total,
        F.cross_entropy(other_logits.flatten(0, 1), labels.flatten(), reduction="sum"),
    )
    torch.testing.assert_close(loss, other_loss, rtol=1e-13, atol=0)
    loss.backward()
    other_loss.backward()
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        expected = gradients[huggingface_name(name)].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_parity_in_single_precision(config):
    model = ours(config)
    other = theirs(model, "eager")
    tokens, labels = batch(config)
    with torch.no_grad():
        logits, other_logits = model(tokens), other(input_ids=tokens, use_cache=False).logits
        assert ((logits - other_logits).norm() / other_logits.norm()).item() < 2e-6
        loss = model.loss(tokens, labels)
    expected = F.cross_entropy(other_logits.flatten(0, 1), labels.flatten()).item()
    assert (loss.total / loss.tokens).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_there_and_back(config):
    model = ours(config)
    exported = to_huggingface(model.state_dict(), config, max_position_embeddings=64)
    weights, imported = from_huggingface(exported.weights, json.loads(json.dumps(exported.config)))
    back = Transformer(imported)
    back.load_state_dict(weights)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    assert (imported.norm_epsilon, imported.rotary_base) == (config.norm_epsilon, config.rotary_base)
    tokens, _ = batch(config)
    assert torch.equal(back(tokens), model(tokens))


def exported_plain():
    return to_huggingface(ours(PLAIN).state_dict(), PLAIN, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "qwen2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
    ],
)
def test_what_our_model_does_not_do_is_refused(key, value):
    exported = exported_plain()
    with pytest.raises(InputError, match=r"config\.json"):
        from_huggingface(exported.weights, exported.config | {key: value})


def test_weights_that_do_not_fit_are_refused():
    exported = exported_plain()
    name = "model.layers.1.mlp.up_proj.weight"
    without = {other: weight for other, weight in exported.weights.items() if other != name}
    with pytest.raises(InputError, match=f"no weight {name}"):
        from_huggingface(without, exported.config)
    with pytest.raises(InputError, match="implies"):
        from_huggingface(without | {name: torch.zeros(3, 3)}, exported.config)
    with pytest.raises(InputError, match=r"q_proj\.bias"):
        from_huggingface(exported.weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, exported.config)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    from_huggingface(exported.weights | old, exported.config)


def test_a_configuration_of_transformers_4_is_read():
    exported = exported_plain()
    old = {key: value for key, value in exported.config.items() if key not in ("rope_parameters", "head_dim")}
    _, config = from_huggingface(exported.weights, old | {"rope_theta": 1234.0, "rope_scaling": None})
    assert config.rotary_base == 1234.0
    assert config.head_size == 8


def test_a_shape_that_transformers_refuses_is_not_exported():
    config = replace(PLAIN, num_attention_heads=6, num_query_groups=3, kv_channels=10)
    with pytest.raises(InputError, match="--hidden-size 32"):
        to_huggingface({}, config, max_position_embeddings=64)
