"""Parts put together: whoever tokenizes them, in whatever order they come, the datasets grow in the order of the input.

Parts come nearly in order, so they are copied into the datasets while others are still being made.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megalrps.data.encode import EncodedPart, part_path, read_lengths
from megalrps.data.indexed import IndexedDatasetWriter
from megalrps.data.input_files import FollowingDigests
from megalrps.data.journal import Work
from megalrps.data.parts import Part, plan_parts
from megalrps.data.progress import ProgressDisplay
from megalrps.data.text import BadLine, BadLines
from megalrps.data.workers import Crew


@dataclass
class Tally:
    """What adds up over all parts; counters are by key."""

    bad_lines: BadLines
    tokenizer: str = ""
    """What tokenized, and why that."""
    documents: int = 0
    text_bytes: Counter[str] = field(default_factory=Counter)
    empty_documents: Counter[str] = field(default_factory=Counter)
    days: tuple[str, str] | None = None
    """First and last day among the documents' dates."""
    undated: int = 0
    parts: int = 0
    parts_resumed: int = 0
    """Parts that an earlier run had finished."""

    def add(self, part: EncodedPart, resumed: bool) -> None:
        """Count ``part``, but its bad lines."""
        self.parts += 1
        self.parts_resumed += resumed
        self.documents += next(iter(part.texts.values())).documents
        for key, texts in part.texts.items():
            self.text_bytes[key] += texts.text_bytes
            self.empty_documents[key] += texts.empty
        self.undated += part.undated
        if part.days is not None:
            known = self.days or part.days
            self.days = min(known[0], part.days[0]), max(known[1], part.days[1])


@dataclass(frozen=True)
class _Done:
    part: Part
    encoded: EncodedPart
    resumed: bool


class Assembly:
    """Has all parts of the input tokenized and puts them together, into one writer for each key."""

    def __init__(
        self,
        work: Work,
        writers: Mapping[str, IndexedDatasetWriter],
        tally: Tally,
        display: ProgressDisplay,
        digests: FollowingDigests | None,
    ) -> None:
        self._work = work
        self._writers = writers
        self._tally = tally
        self._display = display
        self._digests = digests
        self._waiting: dict[int, _Done] = {}  # for a part before them
        self._next = 0
        self._path = ""
        self._lines_before = 0  # of self._path, in the parts put together

    def run(self, paths: Sequence[Path], crew: Crew) -> None:
        """Tokenize what no earlier run has, and put all together; InputError at the first bad line, if they are."""
        for part, encoded in crew.encode(self._unfinished(paths)):
            if encoded.whole:
                self._work.accept(encoded)
            self._keep(_Done(part, encoded, resumed=False))
        assert not self._waiting, "parts are numbered without gaps"

    def _unfinished(self, paths: Sequence[Path]) -> Iterator[Part]:
        for part in plan_parts(paths, self._work.folder):
            if self._digests is not None:
                self._digests.reach(part.path, part.stored_stop)
            encoded = self._work.finished(part.number)
            if encoded is None:
                yield part
            else:
                self._keep(_Done(part, encoded, resumed=True))

    def _keep(self, done: _Done) -> None:
        if done.part.lines is not None:
            Path(done.part.lines).unlink()
        self._waiting[done.part.number] = done
        while (due := self._waiting.pop(self._next, None)) is not None:
            self._next += 1
            self._put(due)

    def _put(self, done: _Done) -> None:
        part, encoded = done.part, done.encoded
        if part.path != self._path:
            self._path, self._lines_before = part.path, 0
        for kind, bad in sorted(encoded.bad.items(), key=lambda each: each[1].first):
            line = BadLine(part.path, self._lines_before + bad.first, kind, bad.detail)
            self._tally.bad_lines.add(line, bad.count)
        self._lines_before += encoded.lines
        self._tally.add(encoded, done.resumed)
        for place, (key, texts) in enumerate(encoded.texts.items()):
            writer = self._writers[key]
            with open(part_path(self._work.folder, part.number, place), "rb", buffering=0) as file:
                lengths = read_lengths(file, texts, writer.dtype.itemsize)
                writer.copy_documents(file, texts.tokens * writer.dtype.itemsize, lengths)
        first = next(iter(encoded.texts.values()))
        stored = part.stored_stop - part.stored_start
        self._display.advance(first.documents, first.text_bytes, stored, done.resumed)
