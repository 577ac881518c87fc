"""Self-attention of one layer: projections, rotary positions, causal attention, output projection."""

from torch import Tensor, nn

from megalrps.kernels.rotary import rotary
from megalrps.model.config import ModelConfig
from megalrps.model.layers import Layers


class Attention(nn.Module):
    """Grouped-query self-attention.

    Query, key and value are separate maps: with grouped heads their slices under tensor parallelism have different
    sizes, and a fused weight would have to be interleaved by rank, so that neither its checkpoint nor its conversion
    would be free of the layout.
    """

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.query = layers.column_linear(config.hidden_size, config.query_width, config.num_attention_heads)
        self.key = layers.column_linear(config.hidden_size, config.key_value_width, config.query_groups)
        self.value = layers.column_linear(config.hidden_size, config.key_value_width, config.query_groups)
        self.output = layers.row_linear(config.query_width, config.hidden_size)
        self._project = layers.project
        self._attend = layers.attention

    def forward(self, hidden_BSH: Tensor, cosine_SR: Tensor, sine_SR: Tensor) -> Tensor:
        query, key, value = self._project(hidden_BSH, (self.query, self.key, self.value))
        query_BSND = rotary(self._heads(query), cosine_SR, sine_SR)
        key_BSKD = rotary(self._heads(key), cosine_SR, sine_SR)
        value_BSKD = self._heads(value)
        attended: Tensor = self.output(self._attend(query_BSND, key_BSKD, value_BSKD).flatten(-2))
        return attended

    def _heads(self, projected: Tensor) -> Tensor:
        """Split [B, S, heads x D] into as many heads as this process's slice holds."""
        return projected.unflatten(-1, (-1, self.head_size))
