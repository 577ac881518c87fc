"""Self-attention of one layer: projections, rotary positions, causal attention, output projection."""

from torch import Tensor, nn

from megalrps.kernels.documents import Documents
from megalrps.kernels.rotary import rotary
from megalrps.model.config import ModelConfig
from megalrps.model.layers import Layers
from megalrps.model.recompute import recomputed


class Attention(nn.Module):
    """Grouped-query self-attention.

    Query, key and value are separate maps: with grouped heads their slices under tensor parallelism have different
    sizes, and a fused weight would have to be interleaved by rank, so that neither its checkpoint nor its conversion
    would be free of the layout.
    """

    def __init__(self, config: ModelConfig, layers: Layers, *, recompute_core: bool = False) -> None:
        """``recompute_core``: keep nothing of what lies between the first three maps and the last."""
        super().__init__()
        self.head_size = config.head_size
        self.query = layers.column_linear(config.hidden_size, config.query_width, config.num_attention_heads)
        self.key = layers.column_linear(config.hidden_size, config.key_value_width, config.query_groups)
        self.value = layers.column_linear(config.hidden_size, config.key_value_width, config.query_groups)
        self.output = layers.row_linear(config.query_width, config.hidden_size)
        self._project = layers.project
        self._attend = layers.attention
        self._recompute_core = recompute_core

    def forward(
        self,
        hidden_BSH: Tensor,
        cosine_SR: Tensor,
        sine_SR: Tensor,
        positions_BS: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """``positions_BS``: the tables' row of each token [None: row s]; ``documents``: within which is attended."""
        query, key, value = self._project(hidden_BSH, (self.query, self.key, self.value))
        core = self._core
        arguments = (query, key, value, cosine_SR, sine_SR, positions_BS, documents)
        attended_BSA = recomputed(core, *arguments) if self._recompute_core else core(*arguments)
        output_BSH: Tensor = self.output(attended_BSA)
        return output_BSH

    def _core(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cosine_SR: Tensor,
        sine_SR: Tensor,
        positions_BS: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        """The heads' attention, [B, S, heads x D], from the outputs of the three maps."""
        query_BSND = rotary(self._heads(query), cosine_SR, sine_SR, positions_BS)
        key_BSKD = rotary(self._heads(key), cosine_SR, sine_SR, positions_BS)
        return self._attend(query_BSND, key_BSKD, self._heads(value), documents).flatten(-2)

    def _heads(self, projected: Tensor) -> Tensor:
        """Split [B, S, heads x D] into as many heads as this process's slice holds."""
        return projected.unflatten(-1, (-1, self.head_size))
