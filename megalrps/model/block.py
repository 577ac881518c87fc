"""One layer of the transformer."""

from torch import Tensor, nn

from megalrps.model.attention import Attention
from megalrps.model.config import ModelConfig
from megalrps.model.feed_forward import FeedForward
from megalrps.model.layers import Layers


class Block(nn.Module):
    """Pre-norm residual layer (arXiv 2302.13971, 2.2): ``x += attention(norm(x)); x += feed_forward(norm(x))``."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.attention_norm = layers.norm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, layers)
        self.feed_forward_norm = layers.norm(config.hidden_size, config.norm_epsilon)
        self.feed_forward = FeedForward(config, layers)

    def forward(self, hidden_BSH: Tensor, cosine_SR: Tensor, sine_SR: Tensor) -> Tensor:
        hidden_BSH = hidden_BSH + self.attention(self.attention_norm(hidden_BSH), cosine_SR, sine_SR)
        output_BSH: Tensor = hidden_BSH + self.feed_forward(self.feed_forward_norm(hidden_BSH))
        return output_BSH
