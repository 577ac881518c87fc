"""The options of the parallel room, under Megatron's names."""

from dataclasses import dataclass

from megalrps.errors import InputError
from megalrps.parallel.layout import Layout, layout_of


@dataclass(frozen=True)
class ParallelOptions:
    """How the ranks of a launch share the work: none of it changes the numbers beyond rounding."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every matrix; the launch's ranks are this times the data-parallel ones."""

    sequence_parallel: bool = False
    """Cut norms and residual stream along the sequence over the tensor-parallel ranks; of no effect with one."""

    def layout(self, world_size: int) -> Layout:
        """The layout of ``world_size`` ranks; raises InputError where they do not fill it."""
        return layout_of(world_size, tensor=self.tensor_model_parallel_size)

    def check(self, sequence_length: int) -> None:
        """Raise InputError where the sequence cannot be cut evenly."""
        if self.sequence_parallel and sequence_length % self.tensor_model_parallel_size:
            raise InputError(
                f"--sequence-parallel cuts --seq-length {sequence_length} into {self.tensor_model_parallel_size} "
                "(--tensor-model-parallel-size) unequal parts: change one of them, or leave --sequence-parallel out"
            )
