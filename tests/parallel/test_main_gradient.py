"""Weight products of linear maps: into main gradients, at once or deferred, they equal what autograd gives."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules

from megalrps.model.activation_options import ActivationOptions
from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_
from megalrps.model.layers import Linear, LocalLayers
from megalrps.model.sharding import placements
from megalrps.model.tensor_layers import TensorLayers
from megalrps.model.transformer import Transformer
from megalrps.parallel.group import Group
from megalrps.parallel.main_gradient import MainGradient, ProductQueue, main_gradient_of, set_main_gradient
from megalrps.parallel.tensor import TensorParallel, column_maps, row_map

torch.set_num_threads(1)

CONFIG = ModelConfig(
    num_layers=8, hidden_size=16, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=24, vocab_size=32
)
TWO_LAYERS = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=24, vocab_size=32
)
BATCH, SEQUENCE, MICRO_BATCHES = 2, 8, 4


def with_main_gradients(model: torch.nn.Module, queue: ProductQueue, dtype: torch.dtype = torch.float64) -> None:
    """Every weight of a linear map gets one, as the flat buffers would give it."""
    for module in model.modules():
        if isinstance(module, Linear):
            gradient = torch.zeros_like(module.weight, dtype=dtype, requires_grad=False)
            set_main_gradient(module.weight, MainGradient(gradient, queue))


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    found = {}
    for name, parameter in model.named_parameters():
        main = main_gradient_of(parameter)
        if main is not None:
            assert parameter.grad is None, name
        gradient = parameter.grad if main is None else main.gradient
        assert gradient is not None, name
        found[name] = gradient.detach().numpy().copy()
    return found


def tokens_of(micro_batch: int, config: ModelConfig = CONFIG) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = np.random.default_rng(micro_batch).integers(0, config.vocab_size, (BATCH, SEQUENCE + 1))
    both = torch.from_numpy(drawn)
    return both[:, :-1], both[:, 1:]


def whole_model(config: ModelConfig, **options: Any) -> Transformer:
    model = Transformer(config, layers=LocalLayers(dtype=torch.float64), **options)
    initialise_(model, config, 3)
    return model


@cache
def expected(config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    """The gradients of a bare model in one process, by autograd alone."""
    model = whole_model(config)
    for micro_batch in range(MICRO_BATCHES):
        model.loss(*tokens_of(micro_batch, config)).total.backward()
    return gradients(model)


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name, gradient in found.items():
        error = np.abs(gradient - wanted[name]).max() / np.abs(wanted[name]).max()
        assert error <= 1e-12, f"{name}: {error}"


@pytest.mark.parametrize("maps", [1, 3])
def test_gradients_of_the_maps_are_the_derivatives(maps):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(5 - i, 4, dtype=torch.float64, requires_grad=True) for i in range(maps)]
    assert torch.autograd.gradcheck(lambda x, *weights: column_maps(x, weights, None), (x, *weights))
    assert torch.autograd.gradcheck(lambda x, weight: row_map(x, weight, None), (x, weights[0]))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_what_is_asked_for_is_computed(wanted):
    x, weight = torch.randn(3, 4, requires_grad=wanted[0]), torch.randn(2, 4, requires_grad=wanted[1])
    column_maps(x, (weight,), None)[0].sum().backward()
    assert (x.grad is not None, weight.grad is not None) == wanted


@pytest.mark.parametrize("deferring", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_main_gradients_of_one_process_are_autograds(deferring, tied):
    config = ModelConfig(**{**vars(TWO_LAYERS), "untie_embeddings_and_output_weights": not tied})
    model, queue = whole_model(config), ProductQueue(deferring=deferring)
    with_main_gradients(model, queue)
    if tied:  # as the flat buffers have it: lookups and the head's products add into one tensor
        weight = model.embedding.weight
        weight.grad = torch.zeros_like(weight)
        set_main_gradient(weight, MainGradient(weight.grad, queue))
    for micro_batch in range(MICRO_BATCHES):
        model.loss(*tokens_of(micro_batch, config)).total.backward()
        queue.take()()
    found = {
        name: main_gradient_of(p).gradient if main_gradient_of(p) else p.grad for name, p in model.named_parameters()
    }
    assert_equal({name: gradient.numpy() for name, gradient in found.items()}, expected(config))


def test_a_deferring_queue_does_nothing_until_its_products_are_called_and_does_them_once():
    queue, told = ProductQueue(deferring=True), []
    main = MainGradient(
        torch.zeros(2, 3), queue, ensure=lambda: told.append("ensure"), contributed=lambda: told.append("contributed")
    )
    main.add_product(torch.ones(4, 2), torch.ones(4, 3))
    first = queue.take()
    main.add_product(torch.ones(5, 2), torch.ones(5, 3))
    assert (len(queue), told, main.gradient.sum().item()) == (1, [], 0.0)
    first()
    first()
    assert told == ["ensure", "contributed"] and main.gradient.unique().tolist() == [4.0]
    queue.take()()
    assert main.gradient.unique().tolist() == [9.0] and len(queue) == 0


def test_a_gradient_may_be_allocated_when_the_first_product_comes():
    def allocate() -> None:
        if main.gradient.numel() == 0:
            main.gradient = torch.zeros(2, 3)

    main = MainGradient(torch.empty(0), ensure=allocate)
    for _ in range(2):
        main.add_product(torch.ones(4, 2), torch.ones(4, 3))
    assert main.gradient.unique().tolist() == [8.0]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_narrow_products_add_up_in_fp32(weights):
    layer = Linear(6, 5, None, weights)
    torch.nn.init.normal_(layer.weight)
    set_main_gradient(layer.weight, MainGradient(torch.zeros(5, 6)))
    x = torch.randn(3, 4, 6, requires_grad=True)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x)
        assert output.dtype == torch.bfloat16
        output.sum().backward()
    product = torch.ones(12, 5, dtype=torch.bfloat16).T @ x.detach().bfloat16().flatten(0, 1)
    assert x.grad.dtype == torch.float32
    assert torch.equal(main_gradient_of(layer.weight).gradient, 2 * product.float())


def _rank_defers(rank: int, sequence_parallel: bool, activations: ActivationOptions) -> dict[str, np.ndarray]:
    group = Group(rank, 2, torch.device("cpu"), dist.group.WORLD)
    layers = TensorLayers(TensorParallel(group, sequence_parallel), dtype=torch.float64)
    model = Transformer(TWO_LAYERS, layers=layers, activations=activations)
    lie = placements(TWO_LAYERS, 2, rank, sequence_parallel=sequence_parallel)
    initialise_(model, TWO_LAYERS, 3, lie)
    queue = ProductQueue(deferring=True)
    with_main_gradients(model, queue)
    for micro_batch in range(MICRO_BATCHES):
        model.loss(*tokens_of(micro_batch, TWO_LAYERS)).total.backward()
        queue.take()()
    found = {}
    for name, parameter in model.named_parameters():
        if (main := main_gradient_of(parameter)) is not None:
            parts = [torch.empty_like(main.gradient) for _ in range(2)]
            dist.all_gather(parts, main.gradient)
            cut = 0 if parts[0].shape[0] < whole_shape(name)[0] else 1
            found[name] = torch.cat(parts, cut).numpy()
    return found


def whole_shape(name: str) -> tuple[int, ...]:
    return tuple(whole_model(TWO_LAYERS).get_parameter(name).shape)


FULL = ActivationOptions(recompute_granularity="full", recompute_method="uniform")


@pytest.mark.parametrize("activations", [ActivationOptions(), FULL], ids=["kept", "recomputed"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_deferred_products_of_a_cut_model_are_those_of_one_process(run_ranks, sequence_parallel, activations):
    for found in run_ranks(2, _rank_defers, sequence_parallel, activations):
        assert len(found) == 2 * 7 + 1
        assert_equal(found, expected(TWO_LAYERS))


STAGES = {  # (stages of each rank)
    "ScheduleZBVZeroBubble": ((0, 3), (1, 2)),
    "ScheduleInterleaved1F1B": ((0, 2), (1, 3)),
}


def _rank_pipelines(rank: int, schedule: str, activations: ActivationOptions) -> dict[str, np.ndarray]:
    held = STAGES[schedule][rank]
    chunks, stages, queues = [], [], []
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    hidden = torch.zeros(BATCH, SEQUENCE, CONFIG.hidden_size, dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(BATCH, SEQUENCE, CONFIG.vocab_size, dtype=torch.float64, requires_grad=True)
    for stage in held:
        first, last = stage == 0, stage == 3
        chunk = Transformer(
            CONFIG,
            range(2 * stage, 2 * stage + 2),
            has_embedding=first,
            has_head=last,
            layers=LocalLayers(dtype=torch.float64),
            activations=activations,
        )
        initialise_(chunk, CONFIG, 3)
        queue = ProductQueue(deferring=True)
        with_main_gradients(chunk, queue)
        chunks.append(chunk)
        queues.append(queue)
        stages.append(
            PipelineStage(
                chunk,
                stage,
                4,
                torch.device("cpu"),
                input_args=tokens if first else hidden,
                output_args=logits if last else hidden,
                dw_builder=queue.take,
            )
        )
    at_end = next((chunk for chunk, stage in zip(chunks, held, strict=True) if stage == 3), None)

    def loss(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        assert at_end is not None
        return at_end.loss_of_logits(logits_BSV, labels_BS).total

    runner = getattr(schedules, schedule)(stages, MICRO_BATCHES, loss_fn=loss, scale_grads=False)
    inputs, labels = (torch.cat(parts) for parts in zip(*map(tokens_of, range(MICRO_BATCHES)), strict=True))
    runner.step(*((inputs,) if 0 in held else ()), target=labels if 3 in held else None)
    assert all(len(queue) == 0 for queue in queues)
    return {name: gradient for chunk in chunks for name, gradient in gradients(chunk).items()}


@pytest.mark.parametrize("activations", [ActivationOptions(), FULL], ids=["kept", "recomputed"])
@pytest.mark.parametrize("schedule", STAGES)
def test_pipelines_that_place_weight_products_themselves_give_the_gradients_of_one_process(
    run_ranks, schedule, activations
):
    by_rank = run_ranks(2, _rank_pipelines, schedule, activations)
    found = by_rank[0] | by_rank[1]
    assert found.keys() == expected().keys()
    assert_equal(found, expected())
