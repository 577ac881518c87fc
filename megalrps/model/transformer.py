"""The transformer, whole or a stage of it: the same class, so that a pipeline's stages cannot drift from the model."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalrps.kernels.documents import Documents
from megalrps.kernels.rotary import rotary_tables
from megalrps.model.activation_options import ActivationOptions
from megalrps.model.block import Block
from megalrps.model.config import ModelConfig
from megalrps.model.layers import Layers, LocalLayers
from megalrps.model.recompute import run_layers
from megalrps.parallel.linear_loss import CHUNK_TOKENS


class SummedLoss(NamedTuple):
    """Losses are summed, never averaged, here: the caller divides by the tokens of the *global* batch."""

    total: Tensor
    """Sum of the token losses in nats: scalar, fp32 (fp64 for an fp64 model)."""
    tokens: Tensor
    """Number of tokens summed: scalar, int64."""


class Transformer(nn.Module):
    """Some or all layers of a LLaMA, with the embedding before and the norm and head after them where it has those.

    Module names carry the global layer index (``layers.7.attention.query.weight``), so a parameter's name does not
    depend on the stage that holds it. A tied head is the embedding: the last stage of a pipeline then holds a copy
    under the embedding's own name. Parameters are uninitialised until ``initialise_`` or a checkpoint fills them.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_range: Sequence[int] | None = None,
        *,
        has_embedding: bool = True,
        has_head: bool = True,
        layers: Layers | None = None,
        activations: ActivationOptions | None = None,
    ) -> None:
        """``layer_range`` None is every layer, ``layers`` None is one process, ``activations`` None keeps them all.

        Raises InputError on a bad config, and on options of the activations that contradict each other.
        """
        super().__init__()
        config.validate()
        activations = ActivationOptions() if activations is None else activations
        activations.check()
        if config.vocab_size == 0:
            raise ValueError(
                "vocab_size is 0: settle it with with_vocabulary(config, tokenizer size) before building the model"
            )
        layers = LocalLayers() if layers is None else layers
        layer_range = range(config.num_layers) if layer_range is None else layer_range
        tied = not config.untie_embeddings_and_output_weights
        self.config = config
        self.has_embedding = has_embedding
        self.has_head = has_head
        if has_embedding or (has_head and tied):
            self.embedding = layers.embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(index): Block(config, layers, activations) for index in layer_range})
        if has_head:
            self.final_norm = layers.norm(config.hidden_size, config.norm_epsilon)
            self.head = None if tied else layers.head(config.hidden_size, config.vocab_size)
        self._cross_entropy = layers.cross_entropy
        self._activations = activations

    def forward(self, inputs: Tensor, positions: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """Logits [B, S, V] from a stage with the head, hidden states [B, S, H] from any other, whatever the options.

        ``inputs`` are tokens [B, S] for a stage with the embedding, hidden states [B, S, H] for any other.
        ``positions`` are the tokens' places in their sequence, [S]: 0 to S-1 unless a layout that cuts the sequence
        says otherwise; or [B, S], below S, where they begin anew in it. Attention is within the ``documents``, if any.
        """
        hidden_BSH = self._hidden(inputs, positions, documents)
        return self._logits(hidden_BSH) if self.has_head else hidden_BSH

    def output(self, inputs: Tensor, positions: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """What the next stage takes, or of a stage with the head :meth:`loss_of_output`; arguments as :meth:`forward`.

        That is :meth:`forward`'s, unless the options have the logits made with the loss: then a stage with the head
        gives the hidden states [B, S, H] after its norm.
        """
        linear = self._activations.cross_entropy_fusion_impl == "linear"
        output: Tensor = (self._hidden if linear else self)(inputs, positions, documents)
        return output

    def loss(self, inputs: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor | None = None) -> SummedLoss:
        """Summed loss of predicting ``labels_BS`` from ``inputs`` (see :meth:`forward`); for a stage with the head."""
        return self.loss_of_output(self.output(inputs), labels_BS, loss_mask_BS)

    def loss_of_output(self, output: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor | None = None) -> SummedLoss:
        """Summed loss of what :meth:`output` of a stage with the head gave.

        This call and the backward pass may overwrite that. Mask as in :meth:`loss_of_logits`.
        """
        if self._activations.cross_entropy_fusion_impl == "native":
            return self.loss_of_logits(output, labels_BS, loss_mask_BS)
        chunk_tokens = self._activations.loss_chunk_tokens or CHUNK_TOKENS
        of_head = self.embedding.losses if self.head is None else self.head
        return _summed(of_head(output, labels_BS, chunk_tokens), labels_BS, loss_mask_BS)

    def loss_of_logits(self, logits_BSV: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor | None = None) -> SummedLoss:
        """Summed loss of this model's whole logits; this call and the backward pass may overwrite them.

        Tokens where ``loss_mask_BS`` is 0 or False count for nothing; their labels must still lie in the vocabulary.
        """
        losses_T = self._cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
        return _summed(losses_T, labels_BS, loss_mask_BS)

    def _hidden(self, inputs: Tensor, positions: Tensor | None, documents: Documents | None) -> Tensor:
        """Hidden states [B, S, H] after this stage's layers and, where it has the head, the norm before that."""
        positions_BS = positions if positions is not None and positions.dim() == 2 else None
        if positions is None or positions_BS is not None:
            length = inputs.shape[1] if positions is None else positions.shape[1]
            positions = torch.arange(length, device=inputs.device)
        tables = rotary_tables(positions, self.config.head_size, self.config.rotary_base)
        hidden_BSH = self.embedding(inputs) if self.has_embedding else inputs
        blocks = list(self.layers.values())
        hidden_BSH = run_layers(blocks, self._activations, hidden_BSH, *tables, positions_BS, documents)
        return self.final_norm(hidden_BSH) if self.has_head else hidden_BSH

    def _logits(self, hidden_BSH: Tensor) -> Tensor:
        logits_BSV: Tensor = self.embedding.logits(hidden_BSH) if self.head is None else self.head(hidden_BSH)
        return logits_BSV


def _summed(losses_T: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor | None) -> SummedLoss:
    if loss_mask_BS is None:
        return SummedLoss(losses_T.sum(), torch.tensor(labels_BS.numel(), device=labels_BS.device))
    return SummedLoss((losses_T * loss_mask_BS.flatten()).sum(), loss_mask_BS.sum(dtype=torch.int64))
