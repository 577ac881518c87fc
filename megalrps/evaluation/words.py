"""Numbers and learning rates in words, the way a person would write them."""

from collections.abc import Callable
from decimal import Decimal

from megalrps.paths.curves import Curve, Piece

_FORMULAS: dict[str, Callable[[str, str], str]] = {
    "linear": lambda start, end: f"{start} + ({end} - {start})·x",
    "cosine": lambda start, end: f"{end} + ({start} - {end})·½(1 + cos πx)",
    "1-sqrt": lambda start, end: f"{end} + ({start} - {end})·(1 - √x)",
    "exponential": lambda start, end: f"{start}·({end} / {start})^x",
    "exponential-half": lambda start, end: f"{end} + ({start} - {end})·(2·0.5^x - 1)",
    "inverse-linear": lambda start, end: f"1 / (x / {end} + (1 - x) / {start})",
}
_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))


def rate(value: float) -> str:
    """A learning rate, exactly: the shortest decimal that reads back as the same float (0.0003 is 3e-4)."""
    digits = Decimal(repr(float(value))).normalize()
    if digits == 0 or digits.adjusted() >= -2:
        return f"{digits:f}"
    mantissa = digits.scaleb(-digits.adjusted())
    return f"{mantissa:f}e{digits.adjusted()}"


def count(value: float) -> str:
    """A count in full: 1,048,576."""
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """A count to three digits with its unit: 1.05M."""
    for size, unit in _UNITS:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time in the two largest units that matter: 3 h 20 min, 3 min 32 s, 4.2 s."""
    if seconds < 59.95:  # what would round to 60.0 s is a minute
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def joined(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def curve_sentences(curve: Curve, start: int, end: int) -> list[str]:
    """One sentence a piece for the updates start < t <= end of ``curve``, each with its exact formula."""
    return [
        piece_sentence(piece, end)
        for piece in curve.pieces
        if piece.start < end and (piece.last is None or piece.last > start)
    ]


def piece_sentence(piece: Piece, path_end: int) -> str:
    """The learning rate lr(t) of update t over the piece, as far as a path that ends at ``path_end`` uses it."""
    last = path_end if piece.last is None else min(piece.last, path_end)
    steps = f"Step {count(last)}" if last == piece.start + 1 else f"Steps {count(piece.start + 1)} to {count(last)}"
    if piece.shape == "constant" or piece.end is None:
        return f"{steps}: held at {rate(piece.start_lr)}."
    formula = _FORMULAS[piece.shape](rate(piece.start_lr), rate(piece.end_lr))
    if piece.shape == "linear" and piece.start_lr == 0:
        formula = f"{rate(piece.end_lr)}·x"
    length = piece.end - piece.start
    progress = f"t / {count(length)}" if piece.start == 0 else f"(t - {count(piece.start)}) / {count(length)}"
    ends = f"{rate(piece.start_lr)} to {rate(piece.end_lr)}"
    return f"{steps}: {piece.shape} from {ends}, lr(t) = {formula} with x = {progress}."
