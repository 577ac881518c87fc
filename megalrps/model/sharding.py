"""Which part of every parameter each rank of a tensor-parallel group holds, and which models can be cut so at all."""

from megalrps.errors import InputError
from megalrps.model.config import ModelConfig
from megalrps.model.parameters import Cut, parameter_specs
from megalrps.parallel.placement import Placement


def placements(config: ModelConfig, ranks: int, rank: int, *, sequence_parallel: bool) -> dict[str, Placement]:
    """The part that ``rank`` of ``ranks`` holds of each parameter, by its global name; the cut was checked before.

    A norm's weight is whole everywhere. Under sequence parallelism each rank norms its slice of the sequence, so that
    the gradients have to be summed; without, every rank computes the whole gradient. The ranks that share a key-value
    head read it with different query heads: their gradients are parts in either case.
    """
    whole = Placement(copies=ranks, sums=sequence_parallel and ranks > 1)
    return {
        name: whole if spec.cut is None else _piece(spec.cut, ranks, rank)
        for name, spec in parameter_specs(config).items()
    }


def key_value_copies(config: ModelConfig, ranks: int) -> int:
    """How many of ``ranks`` hold the same key-value head."""
    return max(1, ranks // config.query_groups)


def check_tensor_parallel(config: ModelConfig, ranks: int) -> None:
    """Raise InputError, naming the flags, where a model cannot be cut over ``ranks``; its vocabulary is settled."""
    tensor = f"--tensor-model-parallel-size {ranks}"
    groups = config.query_groups
    if config.num_attention_heads % ranks:
        raise InputError(
            f"{tensor} does not divide --num-attention-heads {config.num_attention_heads}: change one of them"
        )
    if groups % ranks and ranks % groups:
        raise InputError(
            f"{tensor} and --num-query-groups {groups}: one must divide the other, so that key-value heads are "
            "shared out, or shared, evenly; change one of them"
        )
    if config.feed_forward_width % ranks:
        raise InputError(f"{tensor} does not divide --ffn-hidden-size {config.feed_forward_width}: change one of them")
    if config.vocab_size % ranks:
        raise InputError(
            f"{tensor} does not divide the {config.vocab_size} rows of the embedding: set "
            f"--make-vocab-size-divisible-by (or --vocab-size) to a multiple of {ranks}; the size is the same at every "
            "layout, so this makes another model"
        )


def _piece(cut: Cut, ranks: int, rank: int) -> Placement:
    pieces = min(ranks, cut.units) if cut.repeats else ranks
    assert cut.units % pieces == 0 and ranks % pieces == 0
    copies = ranks // pieces
    return Placement(cut.dimension, pieces, rank // copies, copies, sums=copies > 1)
