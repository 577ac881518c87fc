"""Flat buffers: the module computes as before, and the buckets hold exactly its parameters and gradients."""

import copy

import pytest
import torch
from torch import nn

from megalrps.model.layers import Linear, RMSNorm
from megalrps.parallel.bucket import ALIGNMENT
from megalrps.parallel.buffers import FlatBuffers
from megalrps.parallel.main_gradient import main_gradient_of
from megalrps.parallel.placement import Placement


def small_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    inputs = torch.arange(20, dtype=torch.float64).view(4, 5) / 7
    module(inputs).square().sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def names(buffers: FlatBuffers) -> list[list[str]]:
    return [[piece.name for piece in bucket.slices] for bucket in buffers.buckets]


@pytest.mark.parametrize("bucket_size", [1, 30, 10**9])
def test_values_names_and_gradients_are_those_of_the_plain_module(bucket_size: int):
    plain, flat = small_module(), small_module()
    buffers = FlatBuffers(flat, bucket_size=bucket_size)
    wanted = gradients_of(plain)
    buffers.begin(1)
    gradients_of(flat)
    buffers.finish_gradients()
    masters, gradients = dict(buffers.named_masters()), dict(buffers.named_gradients())
    assert masters.keys() == gradients.keys() == wanted.keys() == set(buffers.names)
    for name, parameter in plain.named_parameters():
        assert torch.equal(masters[name], parameter)
        assert torch.equal(gradients[name], wanted[name])


def test_gradients_add_up_until_the_next_update_begins():
    module = small_module()
    buffers = FlatBuffers(module)
    buffers.begin(2)
    gradients_of(module)
    once = [bucket.gradients.clone() for bucket in buffers.buckets]
    gradients_of(module)
    for bucket, first in zip(buffers.buckets, once, strict=True):
        assert torch.equal(bucket.gradients, 2 * first)
    buffers.begin(1)
    assert all(bucket.gradients.count_nonzero() == 0 for bucket in buffers.buckets)


def test_writing_to_the_masters_changes_what_the_module_computes():
    module = small_module()
    buffers = FlatBuffers(module)
    for bucket in buffers.buckets:
        bucket.master.zero_()
    assert module(torch.ones(1, 5, dtype=torch.float64)).count_nonzero() == 0


def test_matrices_decay_and_norms_and_biases_do_not():
    buffers = FlatBuffers(small_module())
    by_decay = {bucket.decays: {piece.name for piece in bucket.slices} for bucket in buffers.buckets}
    assert by_decay == {True: {"0.weight", "2.weight"}, False: {"0.bias", "1.weight", "1.bias", "2.bias"}}


@pytest.mark.parametrize(
    ("bucket_size", "expected"),
    [
        (1, [["4.weight"], ["3.weight"], ["2.weight"], ["1.weight"], ["0.weight"]]),
        (7, [["4.weight", "3.weight"], ["2.weight", "1.weight"], ["0.weight"]]),
        (8, [["4.weight", "3.weight"], ["2.weight", "1.weight"], ["0.weight"]]),
        (9, [["4.weight", "3.weight", "2.weight"], ["1.weight", "0.weight"]]),
        (99, [["4.weight", "3.weight", "2.weight", "1.weight", "0.weight"]]),
    ],
)
def test_buckets_are_full_in_the_order_of_the_backward_pass(bucket_size: int, expected: list[list[str]]):
    module = nn.Sequential(*(Linear(2, 2, None, None) for _ in range(5)))
    assert names(FlatBuffers(module, bucket_size=bucket_size)) == expected


def test_parameters_begin_on_whole_cache_lines_and_what_lies_between_is_zero():
    module = small_module()
    buffers = FlatBuffers(module)
    buffers.begin(1)
    gradients_of(module)
    for bucket in buffers.buckets:
        held = sum(piece.shape.numel() for piece in bucket.slices)
        assert all(piece.offset % ALIGNMENT == 0 for piece in bucket.slices)
        assert held < len(bucket.gradients) and len(bucket.gradients) % ALIGNMENT == 0
        assert bucket.gradients.count_nonzero() <= held and bucket.parameters.count_nonzero() <= held


def test_the_norm_is_that_of_all_gradients_together():
    module = small_module()
    buffers = FlatBuffers(module, bucket_size=1)
    all_gradients = torch.cat([gradient.flatten() for gradient in gradients_of(module).values()])
    assert buffers.gradient_norm().item() == pytest.approx(all_gradients.norm().item(), rel=1e-14)


def test_a_shared_parameter_is_held_once_and_stays_shared():
    module = small_module()
    module[2] = copy.deepcopy(module[0])
    module[2].weight = module[0].weight
    buffers = FlatBuffers(module)
    assert buffers.names.count("0.weight") == 1 and "2.weight" not in buffers.names
    assert module[2].weight.data_ptr() == module[0].weight.data_ptr()


def test_what_is_assigned_is_computed_with_once_refreshed():
    module = small_module()
    buffers = FlatBuffers(module)
    buffers.assign("0.weight", torch.ones(7, 5))
    buffers.refresh()
    assert torch.equal(module[0].weight, torch.ones(7, 5, dtype=torch.float64))
    assert module[2].weight.unique().numel() == 21 and buffers.holds("2.weight")


def narrow_module() -> tuple[nn.Module, FlatBuffers]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(11, 6), RMSNorm(6, 1e-5, None, None), Linear(6, 9, None, None), nn.Linear(9, 5))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module.embedding = module[0]
    return module, FlatBuffers(module, compute_dtype=torch.bfloat16, narrows=lambda _, each: each.shape[0] in (9, 5))


def test_narrow_parameters_are_their_rounded_masters():
    module, buffers = narrow_module()
    assert [parameter.dtype for parameter in module.parameters()] == [torch.float32] * 2 + [torch.bfloat16] * 3
    masters = dict(buffers.named_masters())
    for name, parameter in module.named_parameters():
        assert masters[name].dtype == torch.float32
        assert torch.equal(parameter, masters[name].to(parameter.dtype))
    assert (masters["2.weight"] != module[2].weight).any(), "the masters must have kept what rounding takes away"
    buffers.assign("2.weight", torch.full((9, 6), 1 / 3))
    assert not (module[2].weight == torch.tensor(1 / 3, dtype=torch.bfloat16)).any()
    buffers.refresh()
    assert (module[2].weight == torch.tensor(1 / 3, dtype=torch.bfloat16)).all()


def test_narrow_parameters_have_wide_gradients_from_maps_and_from_autograd():
    module, buffers = narrow_module()
    tokens = torch.arange(11)
    buffers.begin(2)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            output = module[3](module[2](module[1](module[0](tokens))))
        output.float().square().sum().backward()
    buffers.finish_gradients()
    gradients = dict(buffers.named_gradients())
    assert all(gradient.dtype == torch.float32 and gradient.count_nonzero() for gradient in gradients.values())
    assert module[2].weight.grad is None and module[3].weight.grad is None
    plain = copy.deepcopy(module).float()
    for parameter in plain.parameters():
        parameter.grad = None
    (2 * plain[3](plain[2](plain[1](plain[0](tokens)))).square().sum()).backward()
    for name, parameter in plain.named_parameters():
        assert (gradients[name] - parameter.grad).norm() < 0.02 * parameter.grad.norm()


def test_a_map_adds_to_the_same_gradient_as_autograd():
    module = nn.Sequential(Linear(4, 4, None, torch.float64))
    nn.init.normal_(module[0].weight)
    x = torch.randn(3, 4, dtype=torch.float64)
    buffers = FlatBuffers(module)
    weight = module[0].weight
    buffers.begin(1)
    (module(x).sum() + (x @ weight.T).sum()).backward()  # a tied head beside its table
    buffers.finish_gradients()
    assert main_gradient_of(weight) is not None
    expected = 2 * x.sum(0).expand(4, 4)
    torch.testing.assert_close(dict(buffers.named_gradients())["0.weight"], expected, rtol=1e-14, atol=0)


def test_a_part_is_told_as_part_of_the_global_tensor():
    buffers = FlatBuffers(
        nn.Sequential(nn.Linear(5, 7, bias=False)), placements={"0.weight": Placement(dimension=0, pieces=3, piece=2)}
    )
    (name, view), *others = buffers.named_masters()
    assert name == "0.weight" and not others and view.shape == (21, 5)
    assert [(offsets, part.shape) for offsets, part in view.chunks()] == [((14, 0), (7, 5))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_cannot_be_narrow(dtype: torch.dtype):
    with pytest.raises(ValueError, match="masters are fp32"):
        FlatBuffers(nn.Sequential(nn.Linear(2, 2)).to(dtype))


def test_products_that_were_put_aside_and_never_done_are_noticed():
    module = nn.Sequential(Linear(4, 4, None, None))
    buffers = FlatBuffers(module)
    buffers.queue.deferring = True
    buffers.begin(1)
    module(torch.ones(2, 4)).sum().backward()
    with pytest.raises(AssertionError, match="put aside"):
        buffers.finish_gradients()
    buffers.queue.take()()
    buffers.finish_gradients()
    assert buffers.buckets[0].gradients.count_nonzero() == 16
