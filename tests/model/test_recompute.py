"""Activations that are computed again or wait on the host: the same bits, less kept."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from megalrps.errors import InputError
from megalrps.model import recompute
from megalrps.model.activation_options import ActivationOptions
from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_
from megalrps.model.layers import LocalLayers
from megalrps.model.recompute import units
from megalrps.model.sharding import placements
from megalrps.model.tensor_layers import TensorLayers
from megalrps.model.transformer import Transformer
from megalrps.parallel import collectives
from megalrps.parallel.group import Group
from megalrps.parallel.tensor import TensorParallel

torch.set_num_threads(1)

CONFIG = ModelConfig(
    num_layers=5, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, vocab_size=64
)
BATCH, SEQUENCE = 2, 16
TOKENS = BATCH * SEQUENCE
KEPT = ActivationOptions()
FULL = ActivationOptions(recompute_granularity="full", recompute_method="uniform")
SELECTIVE = ActivationOptions(recompute_granularity="selective")
TREATMENTS = {
    "uniform1": FULL,
    "uniform2": replace(FULL, recompute_num_layers=2),
    "uniform9": replace(FULL, recompute_num_layers=9),
    "block2": replace(FULL, recompute_method="block", recompute_num_layers=2),
    "core": SELECTIVE,
    "norms": replace(SELECTIVE, recompute_modules=("layernorm",)),
    "all parts": replace(SELECTIVE, recompute_modules=("core_attn", "layernorm", "mlp")),
    "host2": ActivationOptions(cpu_offloading_num_layers=2),
    "host9": ActivationOptions(cpu_offloading_num_layers=9),
}


def model_of(activations: ActivationOptions, ranks: TensorParallel | None = None) -> Transformer:
    if ranks is None:
        model = Transformer(CONFIG, layers=LocalLayers(), activations=activations)
        initialise_(model, CONFIG, 0)
        return model
    model = Transformer(CONFIG, layers=TensorLayers(ranks), activations=activations)
    group = ranks.group
    initialise_(model, CONFIG, 0, placements(CONFIG, group.size, group.rank, sequence_parallel=ranks.sequence_parallel))
    return model


def tokens() -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))


def step(model: Transformer, autocast: bool) -> dict[str, torch.Tensor]:
    """The loss and all gradients."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(tokens()[:, :-1], tokens()[:, 1:]).total
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_no_bit_changes(treatment, autocast):
    found, wanted = step(model_of(TREATMENTS[treatment]), autocast), step(model_of(KEPT), autocast)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def _rank_differs(rank: int, treatment: str, autocast: bool) -> list[str]:
    ranks = TensorParallel(Group(rank, 2, torch.device("cpu"), dist.group.WORLD), sequence_parallel=True)
    found, wanted = step(model_of(TREATMENTS[treatment], ranks), autocast), step(model_of(KEPT, ranks), autocast)
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("treatment", ["uniform2", "block2", "all parts", "host2"])
def test_no_bit_changes_under_sequence_parallelism(run_ranks, treatment, autocast):
    assert run_ranks(2, _rank_differs, treatment, autocast) == [[], []]


def _rank_exchanges(rank: int, activations: ActivationOptions) -> list[str]:
    """The kinds and shapes of the exchanges of the layers, in the order in which this rank begins them."""
    ranks = TensorParallel(Group(rank, 2, torch.device("cpu"), dist.group.WORLD), sequence_parallel=True)
    model, begun = model_of(activations, ranks), []

    def noted(name):
        begin = getattr(collectives, name)

        def exchange(*args, **kwargs):
            begun.append(f"{name} {tuple(args[1].shape)}")
            return begin(*args, **kwargs)

        return mock.patch.object(collectives, name, exchange)

    with noted("_ALL_GATHER"), noted("_REDUCE_SCATTER"):
        step(model, False)
    return begun


def test_all_ranks_repeat_the_same_exchanges_but_the_last_of_a_unit(run_ranks):
    kept, again = (run_ranks(2, _rank_exchanges, options) for options in (KEPT, FULL))
    assert again[0] == again[1]
    # Forwards a layer gathers and scatters twice. The last of the four gives nothing that the backward pass needs.
    assert len(again[0]) - len(kept[0]) == 3 * CONFIG.num_layers


def saved_bytes(activations: ActivationOptions, autocast: bool = False) -> int:
    """Bytes of the distinct storages, parameters aside, that the layers keep on the device after a forward pass."""
    model = model_of(activations)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.randn(BATCH, SEQUENCE, CONFIG.hidden_size, requires_grad=True)
    cosine, sine = torch.randn(2, SEQUENCE, CONFIG.head_size // 2).unbind()
    own.update({cosine.untyped_storage().data_ptr(), sine.untyped_storage().data_ptr()})
    with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = recompute.run_layers(list(model.layers.values()), activations, hidden, cosine, sine)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def layer_elements() -> dict[str, int]:
    """What a layer keeps of a token in fp32, in elements, part by part."""
    hidden, query, key = CONFIG.hidden_size, CONFIG.query_width, CONFIG.key_value_width
    return {
        "inputs of the norms": 2 * hidden,
        "insides of the norms": 2,  # the inverse roots
        "inputs of the maps": 2 * hidden,
        "query, key, value, output": 2 * query + 2 * key,
        "statistics of the attention": CONFIG.num_attention_heads,
        "feed-forward": 3 * CONFIG.feed_forward_width,
    }


@pytest.mark.parametrize(
    ("treatment", "dropped"),
    [
        ("core", ["statistics of the attention"]),
        ("norms", ["insides of the norms"]),
        ("all parts", ["statistics of the attention", "insides of the norms", "feed-forward"]),
    ],
)
def test_selective_recomputation_keeps_the_closed_form(treatment, dropped):
    layer = layer_elements()
    assert saved_bytes(KEPT) == 4 * TOKENS * CONFIG.num_layers * sum(layer.values())
    left = sum(elements for part, elements in layer.items() if part not in dropped)
    assert saved_bytes(TREATMENTS[treatment]) == 4 * TOKENS * CONFIG.num_layers * left


@pytest.mark.parametrize(
    ("treatment", "inputs", "layers"), [("uniform1", 5, 0), ("uniform2", 3, 0), ("uniform9", 1, 0), ("block2", 2, 3)]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_full_recomputation_keeps_the_input_of_each_unit(treatment, inputs, layers, autocast):
    whole = saved_bytes(KEPT, autocast) * layers // CONFIG.num_layers
    assert saved_bytes(TREATMENTS[treatment], autocast) == 4 * TOKENS * CONFIG.hidden_size * inputs + whole


@pytest.mark.parametrize(("layers", "copied"), [(0, 0), (2, 2), (9, 5)])
def test_the_first_layers_activations_wait_on_the_host_each_copied_once(layers, copied):
    made: list[torch.Tensor] = []
    copy = recompute._HostCopy.__init__

    def counted(self: object, tensor: torch.Tensor) -> None:
        made.append(tensor)
        copy(self, tensor)

    with mock.patch.object(recompute._HostCopy, "__init__", counted):
        left = saved_bytes(ActivationOptions(cpu_offloading_num_layers=layers))
    whole = 4 * TOKENS * sum(layer_elements().values())
    assert sum(tensor.untyped_storage().nbytes() for tensor in made) == copied * whole
    assert left == (CONFIG.num_layers - copied) * whole  # what goes to the host never comes to the outer hooks


def test_evaluation_neither_repeats_nor_copies():
    for options in (FULL, TREATMENTS["all parts"], TREATMENTS["host2"]):
        with torch.no_grad(), mock.patch.object(recompute, "checkpoint") as repeated:
            logits = model_of(options)(tokens())
        assert not repeated.called and torch.equal(logits, model_of(KEPT)(tokens()))


@pytest.mark.parametrize("layers", [0, 1, 4, 5])
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_units_hold_every_layer_once_in_order(treatment, layers):
    found = units(layers, TREATMENTS[treatment])
    assert [layer for unit in found for layer in range(unit.first, unit.end)] == list(range(layers))


def test_units_of_the_methods():
    assert units(5, TREATMENTS["uniform2"]) == [(0, 2, "recomputed"), (2, 4, "recomputed"), (4, 5, "recomputed")]
    treatments = ["recomputed", "recomputed", "kept", "kept"]
    assert [unit.treatment for unit in units(4, TREATMENTS["block2"])] == treatments


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (ActivationOptions(recompute_method="block"), ["--recompute-method", "--recompute-granularity full"]),
        (replace(SELECTIVE, recompute_num_layers=2), ["--recompute-num-layers 2", "--recompute-granularity full"]),
        (replace(FULL, recompute_method=None), ["--recompute-method"]),
        (replace(FULL, recompute_num_layers=0), ["--recompute-num-layers 0"]),
        (replace(FULL, recompute_modules=("mlp",)), ["--recompute-modules", "selective"]),
        (replace(SELECTIVE, recompute_modules=()), ["--recompute-modules", "core_attn, layernorm, mlp"]),
        (ActivationOptions(cpu_offloading_num_layers=-1), ["--cpu-offloading-num-layers -1"]),
        (replace(FULL, cpu_offloading_num_layers=1), ["--cpu-offloading-num-layers", "--recompute-granularity full"]),
    ],
)
def test_contradictions_are_refused_with_the_flags_named(options, flags):
    with pytest.raises(InputError) as error:
        options.check()
    assert all(flag in str(error.value) for flag in flags) and "\n" not in str(error.value)
    with pytest.raises(InputError):
        Transformer(CONFIG, activations=options)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_sensible_options_pass(treatment):
    TREATMENTS[treatment].check()
