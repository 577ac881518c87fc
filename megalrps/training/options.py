"""The options of the training room: one frozen dataclass a concern, Megatron's names where Megatron has them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megalrps.errors import InputError

if TYPE_CHECKING:
    import torch

MomentType = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainingOptions:
    """Batch, precision and seed: with the increments and the plan, all that decides which numbers come out."""

    global_batch_size: int = 256
    """Samples of one optimizer update, over all ranks."""

    micro_batch_size: int | None = None
    """Samples of one pass on one rank; unset: the rank's whole share, or what of it keeps a pipeline busy."""

    bf16: bool = False
    """Compute in bfloat16 over fp32 masters of the parameters; off, and without --fp16: fp32 throughout."""

    fp16: bool = False
    """Compute in fp16 over fp32 masters, the loss scaled so that small gradients do not vanish."""

    seed: int = 1234
    """Seed of the initial weights and of the sample order."""

    def check(self, ranks: int) -> None:
        """Raise InputError where the batch cannot be shared out evenly over ``ranks`` data-parallel ones."""
        if self.bf16 and self.fp16:
            raise InputError("--bf16 and --fp16 are two precisions: give one of them")
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

    @property
    def compute_dtype(self) -> "torch.dtype | None":
        """The type of matrix products, where it is not that of the parameters."""
        import torch  # options are read and checked by tools that do without

        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

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

    exp_avg_dtype: MomentType = "fp32"
    """In which the first moment is kept; it is computed in fp32 either way."""

    exp_avg_sq_dtype: MomentType = "fp32"
    """In which the second moment is kept; bf16 cannot follow the decay of a beta2 above about 0.998."""

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
class LossScaleOptions:
    """What --fp16 multiplies the loss by, so that gradients do not vanish, and when that changes."""

    loss_scale: float | None = None
    """A constant scale; unset: one that follows the gradients."""

    initial_loss_scale: float = 65536.0
    """The scale that a run starts with."""

    min_loss_scale: float = 1.0
    """The scale is never lowered below this."""

    loss_scale_window: int = 1000
    """Updates without an overflow after which the scale is doubled."""

    hysteresis: int = 2
    """Overflows before the scale is halved."""

    def check(self, fp16: bool) -> None:
        """Raise InputError for scales that are none, or that nothing would use."""
        if self.loss_scale is not None and not fp16:
            raise InputError("--loss-scale needs --fp16: other precisions do not scale the loss")
        for name, value in (
            ("--loss-scale", self.loss_scale),
            ("--initial-loss-scale", self.initial_loss_scale),
            ("--min-loss-scale", self.min_loss_scale),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} {value}: must be finite and above 0")
        if self.initial_loss_scale < self.min_loss_scale:
            raise InputError(
                f"--initial-loss-scale {self.initial_loss_scale} is below --min-loss-scale {self.min_loss_scale}"
            )
        for name, count in (("--loss-scale-window", self.loss_scale_window), ("--hysteresis", self.hysteresis)):
            if count < 1:
                raise InputError(f"{name} {count}: must be at least 1")


@dataclass(frozen=True)
class CheckpointOptions:
    """Where the run lives and how often it is saved; forks and releases are always saved and always kept."""

    save: str | None = None
    """Run directory: plan, metrics, checkpoints, summary and report. A run found there is continued."""

    save_interval: int = 1000
    """Steps between the checkpoints in between; 0: at forks and releases only."""

    save_keep: int = 2
    """How many of the checkpoints in between are kept on a path; older ones are removed."""

    async_save: bool = False
    """Write the checkpoints in between while training goes on, from a copy of masters and moments in host memory."""

    load: Literal["auto", "required", "none"] = "auto"
    """auto: go on with the run in --save, or begin it; required: do not begin one; none: do not go on with one."""

    allow: tuple[str, ...] = ()
    """CHANGE=reason: go on although this option, which changes the result, was another; checkpoints record it."""

    lease_seconds: float = 30.0
    """After how long without a sign of life a launch on another host counts as dead, so that this one may go on."""

    def check(self) -> None:
        """Raise InputError for a missing run directory or impossible intervals."""
        if not self.save:
            raise InputError("--save is missing: name the run directory (it is made if it is not there)")
        if self.save_interval < 0:
            raise InputError(f"--save-interval {self.save_interval}: must not be negative (0: forks and releases only)")
        if self.save_keep < 1:
            raise InputError(f"--save-keep {self.save_keep}: must be at least 1, or a killed run would start over")
        if not 1.0 <= self.lease_seconds < float("inf"):
            raise InputError(f"--lease-seconds {self.lease_seconds}: must be at least 1")


@dataclass(frozen=True)
class StabilityOptions:
    """What happens to an update whose numbers are none or leap; all ranks decide alike, in the same step."""

    on_non_finite: Literal["stop", "skip"] = "stop"
    """stop: end the run, nothing of the step is saved; skip: leave the update out, count it and go on."""

    max_skipped_steps: int = 10
    """With --on-non-finite skip: how many updates in a row may be left out before the run is stopped."""

    on_loss_spike: Literal["log", "stop", "ignore"] = "log"
    """log: say which samples the step drew and go on; stop: end the run before the update is saved."""

    loss_spike_window: int = 128
    """How many losses before a step its own is compared with; no step is a spike before there are so many."""

    loss_spike_sigma: float = 6.0
    """A loss so many standard deviations above the mean of the window is a spike."""

    def check(self) -> None:
        """Raise InputError for limits that are none."""
        if self.max_skipped_steps < 1:
            raise InputError(f"--max-skipped-steps {self.max_skipped_steps}: must be at least 1")
        if self.loss_spike_window < 2:
            raise InputError(f"--loss-spike-window {self.loss_spike_window}: must be at least 2")
        if not 0 < self.loss_spike_sigma < float("inf"):
            raise InputError(f"--loss-spike-sigma {self.loss_spike_sigma}: must be finite and above 0")


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
    """Where and how long it runs: none of these changes the numbers beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a device, else the CPU."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """unset: nccl on CUDA, gloo on the CPU."""

    distributed_timeout_minutes: float = 10.0
    """After how long a collective that some rank never joins ends the job."""

    paths: tuple[str, ...] = ()
    """Train only these paths of the plan, while other launches train others; unset: all."""

    exit_duration_in_mins: float | None = None
    """Save and leave, as on SIGTERM, after so many minutes."""

    exit_interval: int | None = None
    """Save and leave, as on SIGTERM, at the next step that is a multiple of this."""

    def check(self) -> None:
        """Raise InputError for times and intervals that are none."""
        if not 0 < self.distributed_timeout_minutes < float("inf"):
            raise InputError(
                f"--distributed-timeout-minutes {self.distributed_timeout_minutes}: must be finite and above 0"
            )
        if self.exit_duration_in_mins is not None and not 0 < self.exit_duration_in_mins < float("inf"):
            raise InputError(f"--exit-duration-in-mins {self.exit_duration_in_mins}: must be finite and above 0")
        if self.exit_interval is not None and self.exit_interval < 1:
            raise InputError(f"--exit-interval {self.exit_interval}: must be at least 1")
