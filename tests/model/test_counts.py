"""Closed forms against the built model, torch's operation counter, and what autograd really keeps."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from megalrps.kernels.attention import attention_reference
from megalrps.model.config import ModelConfig, with_vocabulary
from megalrps.model.counts import (
    activation_bytes_per_token,
    flops_per_token,
    non_embedding_parameter_count,
    parameter_count,
)
from megalrps.model.initialisation import initialise_
from megalrps.model.layers import LocalLayers
from megalrps.model.presets import PRESETS
from megalrps.model.transformer import Transformer

torch.set_num_threads(1)

META = torch.device("meta")
ODD = ModelConfig(
    num_layers=3,
    hidden_size=40,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=10,
    ffn_hidden_size=52,
    vocab_size=71,
)
TIED = replace(ODD, untie_embeddings_and_output_weights=False)


@pytest.mark.parametrize("config", [*(with_vocabulary(c, 2048) for c in PRESETS.values()), ODD, TIED])
def test_parameter_counts_equal_the_built_model(config):
    sizes = {name: p.numel() for name, p in Transformer(config, layers=LocalLayers(META)).named_parameters()}
    assert parameter_count(config) == sum(sizes.values())
    tables = {"embedding.weight", "head.weight"}
    assert non_embedding_parameter_count(config) == sum(n for name, n in sizes.items() if name not in tables)


@pytest.mark.parametrize(
    ("name", "vocabulary", "millions"),
    [
        ("llama-tiny", 2048, 0.63),
        ("llama-1m", 2048, 1.05),
        ("llama-3m", 2048, 3.05),
        ("llama-20m", 32000, 19.548416),
        ("llama-203m", 32000, 203.6),
        ("llama-1.2b", 32000, 1193.6),
        ("llama-3.1b", 32000, 3098.1),
    ],
)
def test_preset_sizes(name, vocabulary, millions):
    digits = len(str(millions).split(".")[1])
    assert round(parameter_count(with_vocabulary(PRESETS[name], vocabulary)) / 1e6, digits) == millions


@pytest.mark.parametrize(
    ("name", "square", "causal"),
    [("llama-203m", "1.380", "1.215"), ("llama-1.2b", "7.825", "7.297"), ("llama-3.1b", "20.42", "19.26")],
)
def test_preset_operations_per_token_at_2048(name, square, causal):
    for convention, expected in (("full-square", square), ("causal", causal)):
        billions = flops_per_token(PRESETS[name], 2048, convention) / 1e9
        assert f"{billions:.{len(expected.split('.')[1])}f}" == expected


@dataclass(frozen=True)
class CountableLayers(LocalLayers):
    """Attention as plain matrix products over the full square, which the counter sees."""

    def attention(self, query_BSND, key_BSKD, value_BSKD, documents=None):
        assert documents is None
        return attention_reference(query_BSND, key_BSKD, value_BSKD)


@pytest.mark.parametrize("config", [ODD, TIED])
def test_operations_equal_torchs_counter(config):
    model = Transformer(config, layers=CountableLayers(META))
    tokens = torch.zeros(2, 16, dtype=torch.int64, device=META)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).total.backward()
    assert counter.get_total_flops() == 32 * flops_per_token(config, 16)


def saved_bytes(config, autocast, batch=2, length=32):
    """Bytes of the distinct storages, parameters aside, that the forward pass keeps."""
    model = Transformer(config)
    initialise_(model, config, 0)
    skip = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(config.vocab_size, (batch, length))
    with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(tokens, tokens)
    del loss
    return sum(size for pointer, (size, _) in storages.items() if pointer not in skip)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [ODD, PRESETS["llama-20m"]])
def test_activation_bytes_equal_what_autograd_keeps(config, autocast):
    config = replace(config, vocab_size=512)
    measured = saved_bytes(config, autocast)
    assert activation_bytes_per_token(config, autocast=autocast) * 64 == pytest.approx(measured, rel=0.03)
