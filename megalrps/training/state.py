"""Everything that must come back after a restart: parameters, moments, and where on which path they are."""

from dataclasses import dataclass

from torch import Tensor

from megalrps.model.transformer import Transformer
from megalrps.parallel.buffers import FlatBuffers
from megalrps.training.optimizer import Optimizer


@dataclass
class TrainState:
    """The live state of a run.

    ``path`` and ``step`` say which trajectory's update was the last; ``checkpoint`` is the name of the committed
    checkpoint that holds exactly this state, or None once an update has been made since. ``train_seconds`` is the
    training time behind this state, along its trajectory.
    """

    model: Transformer
    buffers: FlatBuffers
    optimizer: Optimizer
    path: str | None = None
    step: int = 0
    checkpoint: str | None = None
    train_seconds: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Name -> live tensor of all that a checkpoint holds: ``model.NAME``, ``optimizer.exp_avg.NAME`` and so on.

        There is no random state: nothing in the network draws random numbers after its initialisation, and the
        samples of a step follow from the plan alone.
        """
        return {**self.weights(), **{f"optimizer.{name}": view for name, view in self.optimizer.named_state()}}

    def weights(self) -> dict[str, Tensor]:
        """Those of :meth:`tensors` that are the model's: what an evaluation loads.

        Tensors cut over ranks are DTensors of the global shape on the live memory, so that any layout loads them.
        """
        named = self.buffers.named_parameters()
        return {f"model.{name}": self.buffers.as_global(name, view) for name, view in named}
