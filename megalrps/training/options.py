"""The options of the training room: one frozen dataclass a concern, Megatron's names where Megatron has them."""

from dataclasses import dataclass
from typing import Literal

from megalrps.errors import InputError


@dataclass(frozen=True)
class TrainingOptions:
    """Batch, precision and seed: with the increments and the plan, all that decides which numbers come out."""

    global_batch_size: int = 256
    """Samples of one optimizer update, over all ranks."""

    micro_batch_size: int | None = None
    """Samples of one forward and backward pass on one rank; unset: the rank's whole share in one pass."""

    bf16: bool = False
    """Compute in bfloat16 (autocast) over fp32 parameters; off: fp32 throughout."""

    seed: int = 1234
    """Seed of the initial weights and of the sample order."""

    def check(self, ranks: int) -> None:
        """Raise InputError where the batch cannot be shared out evenly over ``ranks`` data-parallel ones."""
        if self.global_batch_size < 1:
            raise InputError(f"--global-batch-size {self.global_batch_size}: must be at least 1")
        if self.global_batch_size % ranks:
            raise InputError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of the {ranks} data-parallel "
                "ranks: change it or --nproc-per-node"
            )
        local = self.global_batch_size // ranks
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or local % self.micro_batch_size):
            raise InputError(
                f"--micro-batch-size {self.micro_batch_size} does not divide the {local} samples of a rank "
                f"(--global-batch-size {self.global_batch_size} over {ranks} ranks)"
            )

    def micro_batch(self, ranks: int) -> int:
        """Samples of one pass on one of ``ranks`` data-parallel ranks."""
        return self.micro_batch_size or self.global_batch_size // ranks


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); the defaults are megalrps defaults, those of LLaMA."""

    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.95
    """Decay of the second moment."""

    adam_eps: float = 1e-8
    """Added to the root of the second moment."""

    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0: never."""

    def check(self) -> None:
        """Raise InputError for values outside AdamW's domain."""
        for name, beta in (("--adam-beta1", self.adam_beta1), ("--adam-beta2", self.adam_beta2)):
            if not 0 <= beta < 1:
                raise InputError(f"{name} {beta}: must be in [0, 1)")
        for name, value in (
            ("--weight-decay", self.weight_decay),
            ("--adam-eps", self.adam_eps),
            ("--clip-grad", self.clip_grad),
        ):
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} {value}: must be finite and not negative")


@dataclass(frozen=True)
class CheckpointOptions:
    """Where the run lives and how often it is saved; forks and releases are always saved and always kept."""

    save: str | None = None
    """Run directory: plan, metrics, checkpoints, summary and report. A run found there is continued."""

    save_interval: int = 1000
    """Steps between the checkpoints in between; 0: at forks and releases only."""

    save_keep: int = 2
    """How many of the checkpoints in between are kept on a path; older ones are removed."""

    def check(self) -> None:
        """Raise InputError for a missing run directory or impossible intervals."""
        if not self.save:
            raise InputError("--save is missing: name the run directory (it is made if it is not there)")
        if self.save_interval < 0:
            raise InputError(f"--save-interval {self.save_interval}: must not be negative (0: forks and releases only)")
        if self.save_keep < 1:
            raise InputError(f"--save-keep {self.save_keep}: must be at least 1, or a killed run would start over")


@dataclass(frozen=True)
class LoggingOptions:
    """What a person sees while it runs; metrics.jsonl always has every step."""

    log_interval: int = 1
    """Steps between log lines."""

    tensorboard_dir: str | None = None
    """Also write the metrics for TensorBoard into this directory (package tensorboard)."""

    def check(self) -> None:
        """Raise InputError for an interval that would never log."""
        if self.log_interval < 1:
            raise InputError(f"--log-interval {self.log_interval}: must be at least 1")


@dataclass(frozen=True)
class RuntimeOptions:
    """Where it runs: none of these changes the numbers beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a device, else the CPU."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """unset: nccl on CUDA, gloo on the CPU."""

    distributed_timeout_minutes: float = 10.0
    """After how long a collective that some rank never joins ends the job."""
