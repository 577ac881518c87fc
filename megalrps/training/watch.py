"""Which phase of a step each rank is in."""

from types import TracebackType
from typing import Self


class Watch:
    """The phase that this rank is in, for messages about ranks that are stuck."""

    def __init__(self) -> None:
        self.phase = "start"

    def enter(self, phase: str) -> None:
        """This rank is in ``phase`` from now on."""
        self.phase = phase

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
