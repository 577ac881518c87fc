"""The transformer: its parameters, its stages, its loss, its precision."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_
from megalrps.model.layers import LocalLayers
from megalrps.model.parameters import parameter_specs
from megalrps.model.transformer import Transformer

torch.set_num_threads(1)

CONFIG = ModelConfig(
    num_layers=3, hidden_size=24, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=20, vocab_size=37
)
TIED = replace(CONFIG, untie_embeddings_and_output_weights=False)


def built(config, dtype=torch.float64, **stage):
    model = Transformer(config, layers=LocalLayers(dtype=dtype), **stage)
    initialise_(model, config, seed=1)
    return model


def batch(config, length=9):
    tokens = torch.randint(config.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("config", [CONFIG, TIED, replace(CONFIG, kv_channels=10)])
def test_parameters_are_those_of_the_specification(config):
    model = Transformer(config, layers=LocalLayers(device=torch.device("meta")))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(shapes.items()) == [(spec.name, spec.shape) for spec in parameter_specs(config).values()]
    assert model.state_dict().keys() == shapes.keys(), "nothing but parameters is state"


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_stages_one_after_another_are_the_model(config):
    whole = built(config)
    stages = [
        built(config, layer_range=range(1), has_head=False),
        built(config, layer_range=range(1, 3), has_embedding=False, has_head=False),
        built(config, layer_range=[], has_embedding=False),
    ]
    names = [{name for name, _ in stage.named_parameters()} for stage in stages]
    assert set.union(*names) == set(parameter_specs(config))
    assert ("embedding.weight" in names[2]) == (config is TIED)
    tokens, labels = batch(config)
    hidden = stages[1](stages[0](tokens))
    assert hidden.shape == (2, 9, 24)
    assert torch.equal(stages[2](hidden), whole(tokens))
    expected, loss = whole.loss(tokens, labels), stages[2].loss(hidden, labels)
    assert torch.equal(loss.total, expected.total)
    expected.total.backward()
    loss.total.backward()
    gradients = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-14)


def test_loss_is_the_sum_over_the_unmasked_tokens():
    model = built(CONFIG)
    tokens, labels = batch(CONFIG)
    losses = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    whole = model.loss(tokens, labels)
    torch.testing.assert_close(whole.total, losses.sum(), rtol=1e-13, atol=0)
    assert (whole.tokens.item(), whole.tokens.dtype) == (18, torch.int64)
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[0, :4], mask[1, 7] = True, True
    for masks in (mask, mask.float()):
        masked = model.loss(tokens, labels, masks)
        torch.testing.assert_close(masked.total, losses[mask].sum(), rtol=1e-13, atol=0)
        assert (masked.tokens.item(), masked.tokens.dtype) == (5, torch.int64)


def test_no_token_is_predicted_from_itself_or_later_ones():
    model = built(CONFIG)
    tokens, _ = batch(CONFIG)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-14)
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-6


def test_positions_may_be_handed_in():
    model = built(CONFIG)
    tokens, _ = batch(CONFIG)
    torch.testing.assert_close(model(tokens, torch.arange(9)), model(tokens), rtol=0, atol=0)
    torch.testing.assert_close(model(tokens, torch.arange(9) + 100), model(tokens), rtol=0, atol=1e-5)  # only distances
    assert not torch.allclose(model(tokens, torch.arange(9) * 3), model(tokens), rtol=0, atol=1e-5)


def test_autocast_keeps_losses_parameters_and_residuals_in_fp32():
    model = built(CONFIG, torch.float32)
    tokens, labels = batch(CONFIG)
    exact = model.loss(tokens, labels).total
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens).dtype == torch.bfloat16
        loss = model.loss(tokens, labels).total
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    stage = built(CONFIG, torch.float32, has_head=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert stage(tokens).dtype == torch.float32


@pytest.mark.parametrize("length", [1, 2, 65])
def test_any_length(length):
    tokens, labels = batch(CONFIG, length)
    assert built(CONFIG).loss(tokens, labels).tokens.item() == 2 * length


def test_an_unsettled_vocabulary_is_refused():
    with pytest.raises(ValueError, match="with_vocabulary"):
        Transformer(replace(CONFIG, vocab_size=0))
