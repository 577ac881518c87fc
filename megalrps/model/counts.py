"""Closed forms: parameters, floating-point operations and bytes of a model that need not be built. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from megalrps.model.config import ModelConfig

FlopConvention = Literal["full-square", "causal"]


def layer_matmul_weights(config: ModelConfig) -> int:
    """Weights of the linear maps of one layer: query and output, key and value, gate, up and down."""
    attention = 2 * config.query_width + 2 * config.key_value_width
    return config.hidden_size * (attention + 3 * config.feed_forward_width)


def non_embedding_parameter_count(config: ModelConfig) -> int:
    """Parameters of the layers and the final norm: all but embedding and head."""
    return config.num_layers * (layer_matmul_weights(config) + 2 * config.hidden_size) + config.hidden_size


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model; a tied head counts once."""
    tables = 2 if config.untie_embeddings_and_output_weights else 1
    return non_embedding_parameter_count(config) + tables * config.vocab_size * config.hidden_size


def flops_per_token(config: ModelConfig, sequence_length: int, convention: FlopConvention = "full-square") -> int:
    """Floating-point operations of one training step, forward and backward, for one token.

    ``6 W + 12 L S d``: W weights of matrix products (the head, also a tied one, but not the embedding's gather), L
    layers, S tokens a sequence, d = heads x head size. ``"full-square"`` is the PaLM convention (arXiv 2204.02311,
    appendix B), which published model-FLOPs utilisation uses: it counts the masked half of the attention scores.
    ``"causal"`` halves that term. A multiplication and an addition are two operations; norms, rotary positions and
    softmax are not counted, and neither is anything recomputed.
    """
    weights = config.num_layers * layer_matmul_weights(config) + config.vocab_size * config.hidden_size
    square = 12 * config.num_layers * sequence_length * config.query_width
    return 6 * weights + (square if convention == "full-square" else square // 2)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process that trains a whole model."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def training_memory(
    config: ModelConfig, *, micro_batch_size: int, sequence_length: int, autocast: bool = False
) -> TrainingMemory:
    """Bytes to train with AdamW in fp32 (16 a parameter), optionally under bf16 autocast.

    4 bytes a parameter for the weights (plus 2 for the copy autocast keeps), 4 for the gradients, 8 for the two
    moments. Activations are what the forward pass keeps for the backward pass of one micro-batch
    (:func:`activation_bytes_per_token`). What lives only within one operation is not counted: a block of the loss, a
    gradient on its way down.
    """
    parameters = parameter_count(config)
    return TrainingMemory(
        parameters=parameters * (6 if autocast else 4),
        gradients=parameters * 4,
        optimizer=parameters * 8,
        activations=micro_batch_size * sequence_length * activation_bytes_per_token(config, autocast=autocast),
    )


def activation_bytes_per_token(config: ModelConfig, *, autocast: bool) -> int:
    """Bytes kept for the backward pass, for one token, without recomputation.

    Elements a layer, with H hidden, A = heads x head size, G = key-value heads x head size, F feed-forward, N heads:
    each of the two norms keeps its input, the normalised input and the inverse root (2H + 1) and hands H to the maps
    after it; attention keeps query, key, value, output and its log-sum-exp (2A + 2G + N); the feed-forward layer
    keeps gate, up, silu(gate) and the product (4F). After the layers: the final norm, the head's input and the logits
    (3H + 1 + V). All are 4 bytes; under bf16 autocast the outputs of matrix products and what is computed from them
    alone are 2.
    """
    hidden, query, key_value = config.hidden_size, config.query_width, config.key_value_width
    narrow = 2 if autocast else 4
    norm = 4 * (2 * hidden + 1) + narrow * hidden
    attention = narrow * (2 * query + 2 * key_value) + 4 * config.num_attention_heads
    feed_forward = narrow * 4 * config.feed_forward_width
    return config.num_layers * (2 * norm + attention + feed_forward) + norm + narrow * config.vocab_size
