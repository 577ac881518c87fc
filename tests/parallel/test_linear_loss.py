"""Head and loss in one, by chunks of tokens: the numbers of the loss of kept logits, and none of their memory."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from layout_job import Case, case_name, errors, trained, trained_together
from rank_pieces import Pieces
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules

from megalrps.errors import InputError
from megalrps.kernels.cross_entropy import cross_entropy_reference
from megalrps.model.activation_options import ActivationOptions
from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_
from megalrps.model.layers import LocalLayers
from megalrps.model.sharding import placements
from megalrps.model.tensor_layers import TensorLayers
from megalrps.model.transformer import Transformer
from megalrps.parallel.group import Group
from megalrps.parallel.linear_loss import chunks, linear_cross_entropy
from megalrps.parallel.main_gradient import MainGradient, ProductQueue, main_gradient_of, set_main_gradient
from megalrps.parallel.tensor import TensorParallel
from megalrps.training.storage_tracker import StorageTracker

torch.set_num_threads(1)

UNTIED = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=24, vocab_size=32
)
TIED = replace(UNTIED, untie_embeddings_and_output_weights=False)
BATCH, SEQUENCE = 3, 8
NATIVE = ActivationOptions()
LINEAR = ActivationOptions(cross_entropy_fusion_impl="linear", loss_chunk_tokens=7)  # 24 tokens: 6, 6, 6 and 6
UNEVEN = replace(LINEAR, loss_chunk_tokens=9)  # of 15 tokens: 7 and 8
FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}


def batch(length: int = SEQUENCE) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(32, (BATCH, length + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


def model_of(
    config: ModelConfig, activations: ActivationOptions, ranks: TensorParallel | None = None, dtype: Any = torch.float64
) -> Transformer:
    if ranks is None:
        model = Transformer(config, layers=LocalLayers(dtype=dtype), activations=activations)
        initialise_(model, config, 3)
        return model
    model = Transformer(config, layers=TensorLayers(ranks, dtype=dtype), activations=activations)
    group = ranks.group
    initialise_(model, config, 3, placements(config, group.size, group.rank, sequence_parallel=ranks.sequence_parallel))
    return model


def step(model: Transformer, mask: Tensor | None = None, length: int = SEQUENCE) -> dict[str, np.ndarray]:
    """The loss and every gradient."""
    loss = model.loss(*batch(length), mask).total
    loss.backward()
    found = {"loss": loss.detach().numpy()}
    return found | {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], bound: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = np.abs(found[name] - value).max() / np.abs(value).max()
        assert error <= bound, f"{name}: {error}"


@pytest.mark.parametrize(("tokens", "most"), [(1, 1), (1, 5), (7, 3), (8, 4), (9, 4), (4097, 2048), (10, 100)])
def test_chunks_hold_every_token_once_and_are_as_few_and_as_equal_as_can_be(tokens, most):
    found = chunks(tokens, most)
    assert [token for run in found for token in range(run.start, run.stop)] == list(range(tokens))
    lengths = {run.stop - run.start for run in found}
    assert max(lengths) <= most and max(lengths) - min(lengths) <= 1
    assert len(found) == -(-tokens // most)


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_gradients_are_the_derivatives(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in ((5, 3), (7, 3))
    )
    labels = torch.tensor([0, 6, 3, 3, 1])
    losses = linear_cross_entropy(hidden, weight, labels, None, chunk)
    torch.testing.assert_close(losses, cross_entropy_reference(hidden @ weight.T, labels), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels, None, chunk), (hidden, weight))
    for one in (hidden, weight):
        pair = [x if x is one else x.detach() for x in (hidden, weight)]
        assert torch.autograd.gradcheck(lambda *pair: linear_cross_entropy(*pair, labels, None, chunk), pair)


@pytest.mark.parametrize(
    "activations", [LINEAR, UNEVEN, replace(LINEAR, loss_chunk_tokens=None), replace(UNEVEN, **FULL)]
)
@pytest.mark.parametrize("config", [UNTIED, TIED])
def test_a_model_has_the_gradients_of_kept_logits(config, activations):
    native, linear = (model_of(config, each) for each in (NATIVE, activations))
    assert_equal(step(linear), step(native))
    mask = torch.rand(BATCH, SEQUENCE) > 0.5
    for model in (native, linear):
        model.zero_grad()
    assert_equal(step(linear, mask), step(native, mask))
    for model in (native, linear):
        model.zero_grad()
    assert_equal(step(linear, length=5), step(native, length=5))


def test_whole_logits_and_their_loss_are_still_given():
    native, linear = (model_of(UNTIED, each) for each in (NATIVE, LINEAR))
    tokens, labels = batch()
    assert torch.equal(linear(tokens), native(tokens))
    assert linear.output(tokens).shape == (BATCH, SEQUENCE, 16) and torch.equal(native.output(tokens), native(tokens))
    assert torch.equal(linear.loss_of_logits(linear(tokens), labels).total, native.loss(tokens, labels).total)


@pytest.mark.parametrize("deferring", [False, True])
@pytest.mark.parametrize("config", [UNTIED, TIED])
def test_a_main_gradient_has_one_contribution_a_pass_done_in_that_pass(config, deferring):
    native, linear = (model_of(config, each) for each in (NATIVE, LINEAR))
    told, queue = [], ProductQueue(deferring=deferring)
    weight = linear.embedding.weight if linear.head is None else linear.head.weight
    weight.grad = torch.zeros_like(weight)  # as the flat buffers have it: lookups add into the same memory
    main = MainGradient(weight.grad, queue, lambda: told.append("ensure"), lambda: told.append("contributed"))
    set_main_gradient(weight, main)
    for model in (native, linear):
        for _ in range(2):
            model.loss(*batch()).total.backward()
    assert len(queue) == 0 and told == ["ensure", "contributed"] * 2
    grads = [{name: p.grad.numpy() for name, p in model.named_parameters()} for model in (linear, native)]
    assert_equal(*grads)


@pytest.mark.parametrize("main", [False, True])
def test_the_weights_gradient_adds_up_in_fp32(main):
    """Of 600 chunks, each 0.5: a sum in bf16 would stand still at 128."""
    weight = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    if main:
        set_main_gradient(weight, MainGradient(torch.zeros(2, 3)))
    hidden, labels = torch.ones(600, 3, dtype=torch.bfloat16), torch.zeros(600, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, labels, None, 1).sum().backward()
    gradient = main_gradient_of(weight).gradient if main else weight.grad
    assert gradient[:, 0].tolist() == [-300.0, 300.0] and (weight.grad is None) == main


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [UNTIED, TIED])
def test_under_autocast_products_are_narrow_also_where_the_loss_comes_after_it(config, narrow):
    native, linear = (model_of(config, each, dtype=torch.float32) for each in (NATIVE, LINEAR))
    found = []
    for model in (native, linear):
        with torch.autocast("cpu", narrow):
            output = model.output(batch()[0])
        assert output.dtype == narrow
        loss = model.loss_of_output(output, batch()[1]).total  # as the engine does it
        (loss * 64).backward()
        assert loss.dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        found.append({"loss": loss.detach().numpy()} | {name: p.grad.numpy() for name, p in model.named_parameters()})
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
    assert_equal(found[1], found[0], 4 * torch.finfo(narrow).eps)
    with torch.autocast("cpu", narrow):
        inside = linear.loss(*batch()).total
    assert inside.item() == found[1]["loss"]


def test_autocast_narrows_hidden_states_that_are_wide():
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    labels = torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(x, weight, labels, None, 2)
    losses.sum().backward()
    assert torch.equal(losses, linear_cross_entropy(x.bfloat16(), weight.bfloat16(), labels, None, 2))
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_no_pass_holds_all_logits():
    """Beside a chunk's logits: hidden states, their gradient, the weight's, and a few numbers a token."""
    tokens, hidden, vocabulary, chunk = 512, 8, 2048, 32
    with StorageTracker() as tracker:
        x, weight = torch.randn(tokens, hidden), torch.randn(vocabulary, hidden)
        labels = torch.randint(vocabulary, (tokens,))
        leaves = [each.requires_grad_() for each in (x, weight)]
        before = tracker.mark()
        losses = linear_cross_entropy(*leaves, labels, None, chunk)
        of_chunk, few = 4 * chunk * vocabulary, 64 * tokens
        assert of_chunk <= tracker.peak - before <= of_chunk + few
        assert tracker.alive - before <= few, "kept between the passes"
        total = losses.sum()
        before = tracker.mark()
        total.backward()
        assert of_chunk <= tracker.peak - before <= of_chunk + 4 * hidden * (tokens + vocabulary) + few
        with torch.no_grad():
            before = tracker.mark()
            linear_cross_entropy(*leaves, labels, None, chunk)
            assert tracker.peak - before <= of_chunk + few and tracker.alive == before


def test_gathers_of_parameters_see_the_head_called():
    model, called = model_of(UNTIED, LINEAR), []
    model.head.register_forward_pre_hook(lambda *_: called.append(True))
    model.loss(*batch())
    assert called == [True]


def _rank_steps(rank: int) -> dict[str, dict[str, np.ndarray]]:
    """Steps of a cut model by both losses, and of chunks and heads of every kind."""
    group = Group(rank, dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    found = {}
    for sequence_parallel in (False, True):
        ranks = TensorParallel(group, sequence_parallel)
        for tied, config in ((False, UNTIED), (True, TIED)):
            for activations in (NATIVE, LINEAR, replace(UNEVEN, **FULL)):
                name = f"sequence {sequence_parallel}, tied {tied}"
                steps = found.setdefault(name, [])
                steps.append(step(model_of(config, activations, ranks)))
                if activations is LINEAR:
                    with torch.no_grad():
                        steps[-1]["evaluated"] = model_of(config, activations, ranks).loss(*batch()).total.numpy()
                        steps[0]["evaluated"] = steps[0]["loss"]
    return found


def test_a_cut_model_has_the_gradients_of_kept_logits(run_ranks):
    by_rank = run_ranks(2, _rank_steps)
    for found in by_rank:
        for name, (native, linear, recomputed) in found.items():
            alone = step(model_of(TIED if "tied True" in name else UNTIED, NATIVE))["loss"]
            assert_equal(linear, native)
            native.pop("evaluated")
            assert_equal(recomputed, native)
            assert linear["loss"] == pytest.approx(alone, rel=1e-12)
    for name, (_, linear, _) in by_rank[0].items():
        assert linear["loss"] == by_rank[1][name][1]["loss"], "every rank has the same bits"


def _rank_pipelines(rank: int, activations: ActivationOptions) -> dict[str, np.ndarray]:
    """Gradients of two micro-batches under a schedule that defers weight products, stages down the ranks and up."""
    config = replace(UNTIED, num_layers=4)
    stages, chunks_held, queue = [], [], ProductQueue(deferring=True)
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    hidden = torch.zeros(BATCH, SEQUENCE, 16, dtype=torch.float64, requires_grad=True)
    for stage in (0, 3) if rank == 0 else (1, 2):
        ends = {"has_embedding": stage == 0, "has_head": stage == 3}
        layers = LocalLayers(dtype=torch.float64)
        chunk = Transformer(config, [stage], layers=layers, activations=activations, **ends)
        initialise_(chunk, config, 3)
        for parameter in chunk.parameters():
            parameter.grad = torch.zeros_like(parameter)
            set_main_gradient(parameter, MainGradient(parameter.grad, queue))
        chunks_held.append(chunk)
        inputs = tokens if stage == 0 else hidden
        stages.append(
            PipelineStage(
                Output(chunk),
                stage,
                4,
                torch.device("cpu"),
                input_args=inputs,
                output_args=hidden,
                dw_builder=queue.take,
            )
        )

    def loss(output: Tensor, labels_BS: Tensor) -> Tensor:
        return chunks_held[-1].loss_of_output(output, labels_BS).total

    runner = schedules.ScheduleZBVZeroBubble(stages, 4, loss_fn=loss, scale_grads=False)
    inputs, labels = (torch.cat([each] * 4) for each in batch())
    runner.step(*((inputs,) if rank == 0 else ()), target=labels if rank == 0 else None)
    assert len(queue) == 0
    return {name: p.grad.numpy() for chunk in chunks_held for name, p in chunk.named_parameters()}


class Output(torch.nn.Module):
    """A stage as the engine hands it to a pipeline."""

    def __init__(self, stage: Transformer) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, inputs: Tensor) -> Tensor:
        return self.stage.output(inputs)


def test_the_last_stage_of_a_pipeline_that_defers_products(run_ranks):
    by_rank = run_ranks(2, _rank_pipelines, LINEAR)
    alone = model_of(replace(UNTIED, num_layers=4), NATIVE)
    expected = {name: 4 * each for name, each in step(alone).items() if name != "loss"}
    assert_equal(by_rank[0] | by_rank[1], expected)


LAYOUTS = [
    Case(tp=2, pp=2, schedule="zbv", sequence_parallel=True, layers=4, activations=LINEAR, updates=3),
    Case(dp=2, sharding="optim_grads", bucket=3000, tied=True, micro_batch=2, activations=UNEVEN, updates=3),
    Case(dp=2, bucket=3000, micro_batch=2, activations=LINEAR, updates=3),
]


def _rank_trains(rank: int, case: Case) -> Pieces:
    return trained(case)


@pytest.mark.parametrize("case", LAYOUTS, ids=case_name)
def test_jobs_learn_what_one_process_with_kept_logits_does(run_ranks, case):
    found = trained_together(run_ranks, case, _rank_trains)
    expected = trained_together(run_ranks, case.alone, _rank_trains)
    wrong = {
        name: error for name, error in errors(found, expected).items() if error > (1e-6 if name == "loss" else 1e-12)
    }
    assert not wrong


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"cross_entropy_fusion_impl": "native"}, "--cross-entropy-fusion-impl linear"),
        ({"loss_chunk_tokens": 0}, "at least 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changed, told):
    LINEAR.check()
    with pytest.raises(InputError, match=f"--loss-chunk-tokens.* {told}"):
        ActivationOptions(**{**asdict(LINEAR), **changed}).check()
