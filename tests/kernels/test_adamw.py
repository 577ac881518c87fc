"""AdamW over flat tensors against torch's, the native code and the torch form alike."""

import pytest
import torch

from megalrps.kernels.adamw import _CPU_BLOCK_ELEMENTS, IMPLEMENTATION, adamw_, adamw_reference_

torch.set_num_threads(1)

FUNCTIONS = [pytest.param(adamw_, id=IMPLEMENTATION)] + [
    pytest.param(adamw_reference_, id="reference") for _ in range(IMPLEMENTATION == "native")
]

SETTINGS = {"learning_rate": 3e-2, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("adamw_", FUNCTIONS)
@pytest.mark.parametrize("size", [1, 1001, 2 * _CPU_BLOCK_ELEMENTS + 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_twenty_steps_equal_torch_adamw(adamw_, size, dtype, tolerance):
    generator = torch.Generator().manual_seed(size)
    param = torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)
    theirs = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([theirs], lr=3e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    for step in range(1, 21):
        grad = torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)
        theirs.grad = grad.clone()
        optimizer.step()
        adamw_(param, grad, exp_avg, exp_avg_sq, step=step, **SETTINGS)
        assert torch.equal(grad, theirs.grad), "the gradient is read only"
    torch.testing.assert_close(param, theirs.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(exp_avg, optimizer.state[theirs]["exp_avg"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(exp_avg_sq, optimizer.state[theirs]["exp_avg_sq"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("adamw_", FUNCTIONS)
def test_weight_decay_is_decoupled_from_the_gradient(adamw_):
    param, zero = torch.full((8,), 2.0, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    adamw_(param, zero, zero.clone(), zero.clone(), step=1, **SETTINGS)
    torch.testing.assert_close(param, torch.full((8,), 2.0 * (1 - 3e-2 * 0.1), dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("adamw_", FUNCTIONS)
def test_the_first_step_has_the_size_of_the_learning_rate(adamw_):
    param, grad = torch.zeros(4, dtype=torch.float64), torch.tensor([1e-3, -5.0, 7e4, -1e-2], dtype=torch.float64)
    settings = SETTINGS | {"epsilon": 1e-30}
    adamw_(param, grad, torch.zeros_like(param), torch.zeros_like(param), step=1, **settings)
    torch.testing.assert_close(param, -3e-2 * grad.sign())


@pytest.mark.parametrize("adamw_", FUNCTIONS)
def test_an_empty_shard_is_a_shard(adamw_):
    empty = torch.zeros(0)
    adamw_(empty, empty, empty, empty, step=1, **SETTINGS)
