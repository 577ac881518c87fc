"""The shape of a model, under Megatron's flag names. Imports no torch: planning and ``--help`` stay instant."""

from dataclasses import dataclass, replace

from megalrps.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm LLaMA: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases."""

    num_layers: int
    """Number of transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Number of query heads."""
    ffn_hidden_size: int | None = None
    """Width of the gated feed-forward layer; unset: 8/3 of the hidden size, cut to a multiple of 64."""
    num_query_groups: int | None = None
    """Number of key-value heads (grouped-query attention); unset: one for each query head."""
    kv_channels: int | None = None
    """Size of one head; unset: hidden size / query heads."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding's wavelengths."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    untie_embeddings_and_output_weights: bool = True
    """Give the output head its own weights instead of the embedding's."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 x layers)."""
    vocab_size: int = 0
    """Rows of the embedding, padding included; 0: the tokenizer's size, padded."""
    make_vocab_size_divisible_by: int = 128
    """The tokenizer's size is padded to a multiple of this."""

    @property
    def head_size(self) -> int:
        """Elements of one attention head (D)."""
        return self.kv_channels if self.kv_channels is not None else self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Key-value heads (K)."""
        return self.num_query_groups if self.num_query_groups is not None else self.num_attention_heads

    @property
    def query_width(self) -> int:
        """Elements of all query heads together (N x D)."""
        return self.num_attention_heads * self.head_size

    @property
    def key_value_width(self) -> int:
        """Elements of all key heads, or all value heads, together (K x D)."""
        return self.query_groups * self.head_size

    @property
    def feed_forward_width(self) -> int:
        """Elements of the gated feed-forward layer (F); the default is Megatron's for ``--swiglu``."""
        return self.ffn_hidden_size if self.ffn_hidden_size is not None else int(self.hidden_size * 8 / 3 / 64) * 64

    def validate(self) -> None:
        """Raise InputError naming the flags of the first combination that no model can have."""
        self._validate_ranges()
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"--num-attention-heads {self.num_attention_heads} does not divide --hidden-size {self.hidden_size}: "
                "change one of them or state --kv-channels"
            )
        if self.head_size % 2:
            raise InputError(
                f"the head size is {self.head_size}, and rotary positions turn pairs: make --kv-channels "
                "(or --hidden-size / --num-attention-heads) even"
            )
        if self.num_attention_heads % self.query_groups:
            raise InputError(
                f"--num-query-groups {self.num_query_groups} does not divide "
                f"--num-attention-heads {self.num_attention_heads}: change one of them"
            )
        if self.feed_forward_width == 0:
            raise InputError(
                f"--hidden-size {self.hidden_size} is too small to derive --ffn-hidden-size from: state it"
            )

    def _validate_ranges(self) -> None:
        for field in _POSITIVE_FIELDS:
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise InputError(f"--{field.replace('_', '-')} is {value} and must be positive")
        if self.vocab_size < 0:
            raise InputError(f"--vocab-size is {self.vocab_size}: give the padded size, or 0 to take the tokenizer's")


_POSITIVE_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "num_query_groups",
    "kv_channels",
    "rotary_base",
    "norm_epsilon",
    "init_method_std",
    "make_vocab_size_divisible_by",
)


def padded_vocab_size(vocab_size: int, divisor: int) -> int:
    """The smallest multiple of ``divisor`` that is at least ``vocab_size``."""
    return -(-vocab_size // divisor) * divisor


def with_vocabulary(config: ModelConfig, tokenizer_vocab_size: int) -> ModelConfig:
    """``config`` with its vocabulary settled: the tokenizer's, padded, unless a size is stated that holds it.

    Raises InputError when the tokenizer has more entries than the stated ``--vocab-size``.
    """
    if config.vocab_size == 0:
        return replace(config, vocab_size=padded_vocab_size(tokenizer_vocab_size, config.make_vocab_size_divisible_by))
    if config.vocab_size < tokenizer_vocab_size:
        raise InputError(
            f"--vocab-size {config.vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size} entries: "
            "use the tokenizer the model was made for, or set --vocab-size 0"
        )
    return config
