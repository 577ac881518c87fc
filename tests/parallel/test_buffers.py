"""Flat buffers: the module computes as before, and the buffers hold exactly its parameters and gradients."""

import copy

import pytest
import torch
from torch import nn

from megalrps.parallel.buffers import FlatBuffers
from megalrps.parallel.world import World

ALONE = World(0, 1, torch.device("cpu"), None)


def small_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    inputs = torch.arange(20, dtype=torch.float64).view(4, 5) / 7
    module(inputs).square().sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def test_values_names_and_gradients_are_those_of_the_plain_module():
    plain, flat = small_module(), small_module()
    buffers = FlatBuffers(flat)
    held = dict(buffers.named_parameters())
    assert held.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(held[name], parameter)
    wanted = gradients_of(plain)
    gradients_of(flat)
    for group in buffers.groups:
        for name, gradient in group.named(group.gradients):
            assert torch.equal(gradient, wanted[name])


def test_autograd_adds_into_the_buffer_and_zeroing_empties_it():
    module = small_module()
    buffers = FlatBuffers(module)
    gradients_of(module)
    once = [group.gradients.clone() for group in buffers.groups]
    gradients_of(module)
    for group, first in zip(buffers.groups, once, strict=True):
        assert torch.equal(group.gradients, 2 * first)
    buffers.zero_gradients()
    assert all(group.gradients.count_nonzero() == 0 for group in buffers.groups)


def test_writing_to_the_buffer_changes_what_the_module_computes():
    module = small_module()
    buffers = FlatBuffers(module)
    for group in buffers.groups:
        group.parameters.zero_()
    assert module(torch.ones(1, 5, dtype=torch.float64)).count_nonzero() == 0


def test_matrices_decay_and_norms_and_biases_do_not():
    buffers = FlatBuffers(small_module())
    decaying, other = buffers.groups
    assert decaying.decays and not other.decays
    assert [piece.name for piece in decaying.slices] == ["0.weight", "2.weight"]
    assert [piece.name for piece in other.slices] == ["0.bias", "1.weight", "1.bias", "2.bias"]


def test_the_norm_is_that_of_all_gradients_together():
    module = small_module()
    buffers = FlatBuffers(module)
    all_gradients = torch.cat([gradient.flatten() for gradient in gradients_of(module).values()])
    assert buffers.gradient_norm().item() == pytest.approx(all_gradients.norm().item(), rel=1e-14)
    buffers.scale_gradients(torch.tensor(0.5, dtype=torch.float64))
    assert buffers.gradient_norm().item() == pytest.approx(all_gradients.norm().item() / 2, rel=1e-14)


def test_a_shared_parameter_is_held_once_and_stays_shared():
    module = small_module()
    module[2] = copy.deepcopy(module[0])
    module[2].weight = module[0].weight
    buffers = FlatBuffers(module)
    names = [name for name, _ in buffers.named_parameters()]
    assert names.count("0.weight") == 1 and "2.weight" not in names
    assert module[2].weight.data_ptr() == module[0].weight.data_ptr()


def test_a_world_of_one_sums_to_itself():
    module = small_module()
    buffers = FlatBuffers(module)
    before = {name: gradient.clone() for name, gradient in gradients_of(module).items()}
    buffers.sum_gradients(ALONE)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, before[name])
