"""The parameters of a model as data: global names, global shapes and roles, known before anything is built.

Initialisation, conversion, checkpoints and parallel layouts speak of a parameter by its global name, whatever process
or stage holds it. Imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from megalrps.model.config import ModelConfig


class Role(Enum):
    """What a parameter is for; it decides the initial values."""

    EMBEDDING = "embedding"
    NORM = "norm"
    PROJECTION = "projection"
    OUTPUT_PROJECTION = "output projection"  # writes to the residual stream
    HEAD = "head"


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism may cut a parameter: along ``dimension``, into equal runs of whole units, of ``units``.

    A unit is a head, a row of the vocabulary or a neuron. Where ``repeats`` and there are fewer units than ranks, a
    unit is held by several ranks: the key-value heads of grouped-query attention.
    """

    dimension: int
    units: int
    repeats: bool = False


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the whole model; ``shape`` is the global one, a linear map's is [outputs, inputs].

    ``cut`` None: every tensor-parallel rank holds it whole.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    cut: Cut | None = None


def parameter_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Every parameter of the model by name, in the order of the forward pass; a tied head has no entry of its own."""
    return {spec.name: spec for spec in _specs(config)}


def _specs(config: ModelConfig) -> Iterator[ParameterSpec]:
    vocabulary, hidden = config.vocab_size, config.hidden_size
    yield ParameterSpec("embedding.weight", (vocabulary, hidden), Role.EMBEDDING, Cut(0, vocabulary))
    for layer in range(config.num_layers):
        yield from _layer_specs(config, f"layers.{layer}")
    yield ParameterSpec("final_norm.weight", (hidden,), Role.NORM)
    if config.untie_embeddings_and_output_weights:
        yield ParameterSpec("head.weight", (vocabulary, hidden), Role.HEAD, Cut(0, vocabulary))


def _layer_specs(config: ModelConfig, prefix: str) -> Iterator[ParameterSpec]:
    hidden, feed_forward = config.hidden_size, config.feed_forward_width
    query, key_value = config.query_width, config.key_value_width
    heads = config.num_attention_heads
    shared_heads, neurons = Cut(0, config.query_groups, repeats=True), Cut(0, feed_forward)
    yield ParameterSpec(f"{prefix}.attention_norm.weight", (hidden,), Role.NORM)
    yield ParameterSpec(f"{prefix}.attention.query.weight", (query, hidden), Role.PROJECTION, Cut(0, heads))
    yield ParameterSpec(f"{prefix}.attention.key.weight", (key_value, hidden), Role.PROJECTION, shared_heads)
    yield ParameterSpec(f"{prefix}.attention.value.weight", (key_value, hidden), Role.PROJECTION, shared_heads)
    yield ParameterSpec(f"{prefix}.attention.output.weight", (hidden, query), Role.OUTPUT_PROJECTION, Cut(1, heads))
    yield ParameterSpec(f"{prefix}.feed_forward_norm.weight", (hidden,), Role.NORM)
    yield ParameterSpec(f"{prefix}.feed_forward.gate.weight", (feed_forward, hidden), Role.PROJECTION, neurons)
    yield ParameterSpec(f"{prefix}.feed_forward.up.weight", (feed_forward, hidden), Role.PROJECTION, neurons)
    down = (hidden, feed_forward)
    yield ParameterSpec(f"{prefix}.feed_forward.down.weight", down, Role.OUTPUT_PROJECTION, Cut(1, feed_forward))
