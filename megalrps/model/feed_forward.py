"""The gated feed-forward layer (SwiGLU)."""

from torch import Tensor, nn

from megalrps.kernels.swiglu import swiglu
from megalrps.model.config import ModelConfig
from megalrps.model.layers import Layers


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up are separate maps, so that slicing each needs no interleaving."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.gate = layers.column_linear(config.hidden_size, config.feed_forward_width)
        self.up = layers.column_linear(config.hidden_size, config.feed_forward_width)
        self.down = layers.row_linear(config.feed_forward_width, config.hidden_size)
        self._project = layers.project

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        gate_BSF, up_BSF = self._project(hidden_BSH, (self.gate, self.up))
        output_BSH: Tensor = self.down(swiglu(gate_BSF, up_BSF))
        return output_BSH
