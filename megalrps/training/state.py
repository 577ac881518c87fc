"""Everything that must come back after a restart: parameters, moments, and where on which path they are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_buffers_
from megalrps.parallel.buffers import FlatBuffers
from megalrps.training.engine import Engine
from megalrps.training.optimizer import Optimizer


@dataclass
class TrainState:
    """The live state of a run.

    ``path`` and ``step`` say which trajectory's update was the last; ``checkpoint`` is the name of the committed
    checkpoint that holds exactly this state, or None once an update has been made since. ``train_seconds`` is the
    training time behind this state, along its trajectory, and ``skipped`` the updates on it that were left out,
    ``skipped_in_a_row`` those since the last that was not. ``recent_losses`` are the last ones, oldest first, as far as
    the detector of spikes looks back.
    """

    engine: Engine
    buffers: FlatBuffers
    optimizer: Optimizer
    path: str | None = None
    step: int = 0
    checkpoint: str | None = None
    train_seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)

    def initialise(self, config: ModelConfig, seed: int) -> None:
        """Bring all to where the training of a model of ``seed`` begins. Collective."""
        initialise_buffers_(self.buffers, config, seed)
        self.optimizer.reset()
        self.step, self.train_seconds = 0, 0.0
        self.skipped, self.skipped_in_a_row, self.recent_losses = 0, 0, []

    def filled(self) -> None:
        """Make all that follows from the tensors below, once something has been loaded into them. Collective."""
        self.buffers.refresh()

    def tensors(self) -> dict[str, Tensor]:
        """Name -> live tensor of all that a checkpoint holds: ``model.NAME``, ``optimizer.exp_avg.NAME`` and so on.

        There is no random state: nothing in the network draws random numbers after its initialisation, and the
        samples of a step follow from the plan alone.
        """
        return self.named(self.flats(), self.counts())

    def named(self, flats: Mapping[str, Iterable[Tensor]], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What :meth:`tensors` gives, over other tensors that are like those of :meth:`flats` and :meth:`counts`."""
        views = {f"{kind}.{name}": view for kind, each in flats.items() for name, view in self.buffers.named(each)}
        return {**views, **counts}

    def flats(self) -> dict[str, list[Tensor]]:
        """What of the state grows with the model, laid out like the buckets' shards, by how its names begin."""
        masters = [bucket.master for bucket in self.buffers.buckets]
        return {"model": masters, **{f"optimizer.{kind}": each for kind, each in self.optimizer.moments.items()}}

    def counts(self) -> dict[str, Tensor]:
        """The rest of it: scalars on the host."""
        return {f"optimizer.{name}": count for name, count in self.optimizer.named_counts()}

    def weights(self) -> dict[str, Tensor]:
        """Those of :meth:`tensors` that are the model's: what an evaluation loads.

        Of a tensor cut over ranks it is a view of the global shape that says which part lies here: any layout loads it.
        """
        return {f"model.{name}": view for name, view in self.buffers.named_masters()}
