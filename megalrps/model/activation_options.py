"""Which activations are kept between the passes: the options. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from megalrps.errors import InputError

Part = Literal["core_attn", "layernorm", "mlp"]
Loss = Literal["native", "linear"]


@dataclass(frozen=True)
class ActivationOptions:
    """What the backward pass finds of a forward pass: less memory for more arithmetic, or for transfers."""

    recompute_granularity: Literal["selective", "full"] | None = None
    """Compute activations again in the backward pass: some parts of every layer, or whole layers."""

    recompute_method: Literal["uniform", "block"] | None = None
    """For full: all layers of a stage in units that keep only their input, or each of its first layers alone."""

    recompute_num_layers: int | None = None
    """For full: layers of a unit (uniform), or layers computed again (block); unset: 1."""

    recompute_modules: tuple[Part, ...] = ("core_attn",)
    """For selective: attention between its maps (a fused one keeps little besides), norms, the feed-forward layer."""

    cpu_offloading_num_layers: int = 0
    """First layers of each stage whose activations wait in the host's memory for the backward pass."""

    cross_entropy_fusion_impl: Loss = "native"
    """native: all logits are kept; linear: they are made twice, of some tokens at a time (8 h V FLOP, not 6)."""

    loss_chunk_tokens: int | None = None
    """For linear: tokens of a micro-batch whose logits exist at a time, at most; unset: 2048."""

    def check(self) -> None:
        """Raise InputError where the options contradict each other."""
        granularity, method, layers = self.recompute_granularity, self.recompute_method, self.recompute_num_layers
        for flag, value in (("method", method), ("num-layers", layers)):
            if value is not None and granularity != "full":
                raise InputError(f"--recompute-{flag} {value} needs --recompute-granularity full: add it")
        if granularity == "full" and method is None:
            raise InputError("--recompute-granularity full needs --recompute-method: add uniform or block")
        if layers is not None and layers < 1:
            raise InputError(f"--recompute-num-layers {layers}: must be at least 1")
        if granularity != "selective" and self.recompute_modules != ("core_attn",):
            raise InputError("--recompute-modules needs --recompute-granularity selective: add it")
        if granularity == "selective" and not self.recompute_modules:
            raise InputError(
                f"--recompute-modules names nothing to compute again: name some of {', '.join(get_args(Part))}"
            )
        if self.cpu_offloading_num_layers < 0:
            raise InputError(f"--cpu-offloading-num-layers {self.cpu_offloading_num_layers}: must be at least 0")
        if self.cpu_offloading_num_layers and granularity is not None:
            raise InputError(
                f"--cpu-offloading-num-layers and --recompute-granularity {granularity} exclude each other: drop one"
            )
        self._check_loss()

    def _check_loss(self) -> None:
        tokens = self.loss_chunk_tokens
        if tokens is not None and self.cross_entropy_fusion_impl != "linear":
            raise InputError(f"--loss-chunk-tokens {tokens} needs --cross-entropy-fusion-impl linear: add it")
        if tokens is not None and tokens < 1:
            raise InputError(f"--loss-chunk-tokens {tokens}: must be at least 1")

    @property
    def recomputed_parts(self) -> frozenset[Part]:
        """The parts of every layer that are computed again by themselves."""
        return frozenset(self.recompute_modules if self.recompute_granularity == "selective" else ())
