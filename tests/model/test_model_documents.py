"""A window of several documents is those documents, each run alone: logits and gradients, in float64."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megalrps.kernels.documents import Documents, documents_from_starts
from megalrps.model.activation_options import ActivationOptions
from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_
from megalrps.model.layers import LocalLayers
from megalrps.model.transformer import Transformer

torch.set_num_threads(1)

CONFIG = ModelConfig(
    num_layers=3, hidden_size=24, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=20, vocab_size=37
)
LENGTH = 13
CUTS = ((5,), (1, 2, 11), (12,))
"""Where documents begin in each window beside its first place: documents of one token, at either end too."""
TOLERANCE = 1e-12

FULL = ActivationOptions(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)
CORE = ActivationOptions(recompute_granularity="selective")
TREATMENTS = {
    "kept": ActivationOptions(),
    "linear loss": ActivationOptions(cross_entropy_fusion_impl="linear", loss_chunk_tokens=7),
    "recomputed": FULL,
    "core recomputed": CORE,
    "on the host": ActivationOptions(cpu_offloading_num_layers=2),
}


def model_of(activations: ActivationOptions = TREATMENTS["kept"], *, tied: bool = False, backend="auto") -> Transformer:
    config = replace(CONFIG, untie_embeddings_and_output_weights=not tied)
    layers = LocalLayers(dtype=torch.float64, attention_backend=backend)
    model = Transformer(config, layers=layers, activations=activations)
    initialise_(model, config, seed=1)
    return model


def windows() -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, S]."""
    tokens = torch.randint(CONFIG.vocab_size, (len(CUTS), LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def documents() -> Documents:
    is_start = torch.zeros(len(CUTS), LENGTH, dtype=torch.bool)
    for row, cuts in enumerate(CUTS):
        is_start[row, list(cuts)] = True
    return documents_from_starts(is_start)


def each_document() -> list[tuple[int, slice]]:
    """The window of each document, and its place there."""
    bounds = [(0, *cuts, LENGTH) for cuts in CUTS]
    return [(row, slice(*pair)) for row, of_row in enumerate(bounds) for pair in pairwise(of_row)]


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest element of its tensor."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in wanted.items())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_each_document_alone(tied: bool, backend: str):
    model, (inputs, _), within = model_of(tied=tied, backend=backend), windows(), documents()
    found = model(inputs, within.positions, within)
    for row, place in each_document():
        alone = model(inputs[row : row + 1, place])[0]
        torch.testing.assert_close(found[row, place], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_losses_and_gradients_are_those_of_each_document_alone(treatment: str):
    together, apart, (inputs, labels), within = model_of(TREATMENTS[treatment]), model_of(), windows(), documents()
    loss = together.loss_of_output(together.output(inputs, within.positions, within), labels)
    loss.total.backward()
    total = torch.zeros((), dtype=torch.float64)
    for row, place in each_document():
        of_document = apart.loss(inputs[row : row + 1, place], labels[row : row + 1, place]).total
        of_document.backward()
        total += of_document.detach()
    assert loss.total.item() == pytest.approx(total.item(), rel=TOLERANCE)
    assert loss.tokens.item() == inputs.numel()
    assert worst(gradients(together), gradients(apart)) < TOLERANCE


def test_with_the_mask_alone_positions_go_on_through_the_window():
    model, (inputs, _), within = model_of(), windows(), documents()
    found = model(inputs, None, within)
    for row, place in each_document():
        alone = model(inputs[row : row + 1, place], torch.arange(LENGTH)[place])[0]
        torch.testing.assert_close(found[row, place], alone, rtol=0, atol=TOLERANCE)


def test_with_the_positions_alone_attention_goes_on_through_the_window():
    model, (inputs, _), within = model_of(), windows(), documents()
    found, usual = model(inputs, within.positions), model(inputs)
    for row, cuts in enumerate(CUTS):
        alone = model(inputs[row : row + 1], within.positions[row])[0]
        torch.testing.assert_close(found[row], alone, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(found[row, : cuts[0]], usual[row, : cuts[0]], rtol=0, atol=TOLERANCE)
        assert (found[row, cuts[0] :] - usual[row, cuts[0] :]).abs().amax(-1).min() > 1e-6


def test_one_document_a_window_changes_no_bit():
    whole = documents_from_starts(torch.zeros(len(CUTS), LENGTH, dtype=torch.bool))
    models, (inputs, labels) = (model_of(backend="reference"), model_of(backend="reference")), windows()
    told = ((None, None), (whole.positions, whole))
    for model, of_model in zip(models, told, strict=True):
        model.loss_of_output(model.output(inputs, *of_model), labels).total.backward()
    found, wanted = gradients(models[1]), gradients(models[0])
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("treatment", ["recomputed", "core recomputed", "on the host"])
def test_what_is_computed_again_is_the_same_bits_within_documents(treatment: str, autocast: bool):
    (inputs, labels), within, found = windows(), documents(), []
    for activations in (TREATMENTS["kept"], TREATMENTS[treatment]):
        model = model_of(activations).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss_of_output(model.output(inputs, within.positions, within), labels)
        loss.total.backward()
        found.append(gradients(model))
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


@pytest.mark.parametrize("treatment", ["kept", "linear loss"])
def test_a_masked_loss_and_its_gradient_are_the_sums_over_what_counts(treatment: str):
    masked, single, (inputs, labels) = model_of(TREATMENTS[treatment]), model_of(), windows()
    counted = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    counted[1] = False
    loss = masked.loss(inputs, labels, counted)
    loss.total.backward()
    log_probabilities = single(inputs).log_softmax(-1)
    places = counted.nonzero().tolist()
    total = -sum(log_probabilities[row, place, labels[row, place]] for row, place in places)
    total.backward()
    assert loss.tokens.item() == len(places) > 0
    assert loss.total.item() == pytest.approx(total.item(), rel=TOLERANCE)
    assert worst(gradients(masked), gradients(single)) < TOLERANCE
