"""One layer of the transformer."""

from torch import Tensor, nn

from megalrps.kernels.documents import Documents
from megalrps.model.activation_options import ActivationOptions, Part
from megalrps.model.attention import Attention
from megalrps.model.config import ModelConfig
from megalrps.model.feed_forward import FeedForward
from megalrps.model.layers import Layers
from megalrps.model.recompute import recomputed


class Block(nn.Module):
    """Pre-norm residual layer (arXiv 2302.13971, 2.2): ``x += attention(norm(x)); x += feed_forward(norm(x))``."""

    def __init__(self, config: ModelConfig, layers: Layers, activations: ActivationOptions | None = None) -> None:
        """``activations`` None keeps them; of its options those are used that concern the parts of a layer."""
        super().__init__()
        self._recomputed = frozenset[Part]() if activations is None else activations.recomputed_parts
        self.attention_norm = layers.norm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, layers, recompute_core="core_attn" in self._recomputed)
        self.feed_forward_norm = layers.norm(config.hidden_size, config.norm_epsilon)
        self.feed_forward = FeedForward(config, layers)

    def forward(
        self,
        hidden_BSH: Tensor,
        cosine_SR: Tensor,
        sine_SR: Tensor,
        positions_BS: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The last four as in :meth:`megalrps.model.attention.Attention.forward`."""
        normed_BSH = self._run("layernorm", self.attention_norm, hidden_BSH)
        hidden_BSH, normed_BSH = self._add_and_norm(
            self.attention(normed_BSH, cosine_SR, sine_SR, positions_BS, documents), hidden_BSH
        )
        return hidden_BSH + self._run("mlp", self.feed_forward, normed_BSH)

    def _add_and_norm(self, attended_BSH: Tensor, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after the attention, and its norm: in one pass, unless the norm is computed again."""
        if "layernorm" in self._recomputed:
            hidden_BSH = hidden_BSH + attended_BSH
            return hidden_BSH, self._run("layernorm", self.feed_forward_norm, hidden_BSH)
        return self.feed_forward_norm(attended_BSH, hidden_BSH)

    def _run(self, part: Part, module: nn.Module, x_BSH: Tensor) -> Tensor:
        output_BSH: Tensor = recomputed(module, x_BSH) if part in self._recomputed else module(x_BSH)
        return output_BSH
