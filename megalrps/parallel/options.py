"""The options of the parallel room, under Megatron's names."""

from dataclasses import dataclass
from typing import Literal

from megalrps.errors import InputError
from megalrps.parallel.layout import Layout, layout_of
from megalrps.parallel.schedule import SCHEDULES, PipelineSchedule


@dataclass(frozen=True)
class ParallelOptions:
    """How the ranks of a launch share the work: none of it changes the numbers beyond rounding."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every matrix; what the sizes leave of the launch's ranks is data parallel."""

    sequence_parallel: bool = False
    """Cut norms and residual stream along the sequence over the tensor-parallel ranks; of no effect with one."""

    pipeline_model_parallel_size: int = 1
    """Ranks that share the depth: each holds some consecutive layers, or several runs of them."""

    pipeline_schedule: PipelineSchedule = "1f1b"
    """The order of forward and backward passes over the pipeline; tools/draw_schedule.py draws it."""

    num_virtual_stages_per_pipeline_rank: int | None = None
    """Runs of layers a pipeline rank holds; unset: 1 for gpipe and 1f1b, 2 for the others, where it must be >= 2."""

    pipeline_model_parallel_layout: str | None = None
    """Where each stage begins: E embedding, t layer, L head, | boundary, as in "Ett|(t|)*2tL"; unset: cut by cost."""

    context_parallel_size: int = 1
    """Ranks that share every sequence: for sequences whose activations do not fit."""

    data_parallel_sharding_strategy: Literal["no_shard", "optim", "optim_grads"] = "optim"
    """What data-parallel ranks share out: nothing, the optimizer's state (ZeRO-1), or gradients too (ZeRO-2)."""

    ddp_bucket_size: int = 40_000_000
    """Parameters whose gradients are exchanged in one go, at least; a smaller bucket leaves earlier."""

    overlap_grad_reduce: bool = True
    """Exchange each bucket of gradients while the backward pass goes on."""

    overlap_param_gather: bool = True
    """Gather each bucket of updated parameters while the next forward pass goes on."""

    optimizer_cpu_offload: bool = False
    """Keep the optimizer's state and the fp32 masters on the host, and update the parameters there."""

    deterministic_reduction: bool = False
    """For debugging: the same bits on 1, 2, 4 ... data-parallel ranks; more copies of gradients, all sent to all."""

    def layout(self, world_size: int) -> Layout:
        """The layout of ``world_size`` ranks; raises InputError where they do not fill it."""
        return layout_of(
            world_size,
            tensor=self.tensor_model_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            context=self.context_parallel_size,
        )

    def check_reduction(self, data_ranks: int, micro_batch_size: int | None, optimizer_backend: str) -> None:
        """Raise InputError where --deterministic-reduction could not keep its promise, or does not work."""
        if not self.deterministic_reduction:
            return
        flag = "--deterministic-reduction"
        if micro_batch_size is None:
            raise InputError(f"{flag} adds micro-batches up in their order: give --micro-batch-size, always the same")
        if data_ranks & (data_ranks - 1):
            raise InputError(
                f"{flag} takes 1, 2, 4, 8 ... data-parallel ranks, not {data_ranks}: change --nproc-per-node or leave "
                "it out"
            )
        refused = {
            "--pipeline-model-parallel-size": self.pipeline_model_parallel_size > 1,
            "--context-parallel-size": self.context_parallel_size > 1,
            "--data-parallel-sharding-strategy optim_grads": self.data_parallel_sharding_strategy == "optim_grads",
            f"--optimizer-backend {optimizer_backend}": optimizer_backend in ("torch", "apex"),
        }
        for other, given in refused.items():
            if given:
                raise InputError(f"{flag} does not go with {other}: leave one of them out")

    @property
    def fewest_ranks(self) -> int:
        """The ranks of the smallest launch of this layout."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def stages_per_rank(self) -> int:
        """Stages on a pipeline rank: as stated, or the fewest that the schedule takes."""
        return self.num_virtual_stages_per_pipeline_rank or SCHEDULES[self.pipeline_schedule].stages_per_rank

    def check(self, sequence_length: int) -> None:
        """Raise InputError where the sequence cannot be cut evenly, or for a size that is none."""
        tensor = self.tensor_model_parallel_size if self.sequence_parallel else 1
        # a context-parallel rank holds two runs of the sequence, one from each end
        context = 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1
        if sequence_length % (tensor * context):
            flags = ["--sequence-parallel over --tensor-model-parallel-size " + str(tensor)] if tensor > 1 else []
            flags += [f"--context-parallel-size {self.context_parallel_size}"] if context > 1 else []
            raise InputError(
                f"{' and '.join(flags)} cut --seq-length {sequence_length} into {tensor * context} unequal parts: "
                f"make it a multiple of {tensor * context}, or change the layout"
            )
        if self.pipeline_model_parallel_size == 1 and self.pipeline_model_parallel_layout is not None:
            raise InputError(
                "--pipeline-model-parallel-layout needs --pipeline-model-parallel-size: one rank holds every layer"
            )
        if self.ddp_bucket_size < 1:
            raise InputError(f"--ddp-bucket-size {self.ddp_bucket_size}: must be at least 1")
