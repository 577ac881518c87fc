"""Three increments out of the text that this Python installation carries: what ``tools/make_corpus.py`` does.

The standard library's sources and the language reference of ``help()`` are real text, in prose and in code, about
different things; grouped by subject they make increments between which a language model can tell the difference.
Nothing is downloaded. The outcome depends on the installation's files and the options alone.
"""

import ast
import hashlib
import io
import platform
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalrps.data.chunks import cut_text
from megalrps.data.recipe import write_record
from megalrps.data.text_increments import (
    INDEX_NAME,
    RECORD_NAME,
    TextIncrement,
    TextIncrementsWriter,
    is_finished,
    is_held_out,
    read_increments,
)
from megalrps.errors import InputError
from megalrps.fingerprint import fingerprint

TOPICS = "pydoc_data/topics.py"
"""The language reference as ``help()`` shows it: a module that is one dictionary of texts."""

MODULES: Mapping[str, tuple[str, ...]] = {
    "language": (
        "__future__", "_collections_abc", "_compat_pickle", "_py_abc", "_pydatetime", "_pydecimal", "_pyio",
        "_strptime", "_weakrefset", "abc", "ast", "bisect", "calendar", "code", "codecs", "codeop", "collections",
        "colorsys", "contextlib", "copy", "copyreg", "dataclasses", "datetime", "difflib", "dis", "enum", "fractions",
        "functools", "graphlib", "heapq", "inspect", "io", "json", "keyword", "linecache", "numbers", "opcode",
        "operator", "pickle", "pickletools", "pprint", "random", "re", "reprlib", "secrets", "statistics", "string",
        "symtable", "textwrap", "token", "tokenize", "types", "typing", "weakref", "zoneinfo",
    ),
    "network": (
        "asyncio", "base64", "email", "ftplib", "hmac", "html", "http", "imaplib", "ipaddress", "mailbox",
        "mimetypes", "netrc", "nturl2path", "poplib", "quopri", "selectors", "smtplib", "socket", "socketserver",
        "ssl", "urllib", "uuid", "webbrowser", "wsgiref", "xml", "xmlrpc",
    ),
    "tools": (
        "argparse", "bdb", "bz2", "cProfile", "cmd", "compileall", "concurrent", "configparser", "csv", "ctypes",
        "doctest", "filecmp", "fileinput", "fnmatch", "getopt", "getpass", "gettext", "glob", "gzip", "importlib",
        "locale", "logging", "lzma", "modulefinder", "multiprocessing", "optparse", "os", "pathlib", "pdb", "pkgutil",
        "platform", "profile", "pstats", "py_compile", "pyclbr", "pydoc", "queue", "runpy", "sched", "shelve",
        "shlex", "shutil", "site", "sqlite3", "subprocess", "sysconfig", "tabnanny", "tarfile", "tempfile",
        "threading", "timeit", "tomllib", "trace", "traceback", "tracemalloc", "unittest", "warnings", "zipapp",
        "zipfile", "zipimport",
    ),
}  # fmt: skip
"""Modules and packages of each increment, in order; those that an installation lacks are left out."""

_TABLES = frozenset({"html/entities.py"})
"""Tables, not text."""
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__"})
_DOCUMENT_BYTES = 2048
_SELECTION = b"megalrps selection"
"""Makes the hash that chooses documents another one than the hash that holds them out."""


@dataclass(frozen=True)
class CorpusOptions:
    """Make three increments (language, network, tools) out of the text of this Python installation.

    They come out the same each time on the same installation. Run again, it finds its output and ends at once.
    """

    output: Path
    """Folder for NAME.train.jsonl, NAME.valid.jsonl and increments.json."""

    maximum_bytes: int = 1_600_000
    """Bytes of text of each increment, at most; all get as many as the smallest has."""

    minimum_bytes: int = 1_200_000
    """Bytes of text of each increment, at least; an installation with less is refused."""

    held_out_modulo: int = 20
    """One document in so many, chosen by its hash, is held out."""

    overwrite: bool = False
    """Replace increments that were made from other text or with other options."""

    def check(self) -> None:
        """Raise InputError for values that no corpus can have."""
        if not 0 < self.minimum_bytes <= self.maximum_bytes:
            raise InputError(
                f"--minimum-bytes {self.minimum_bytes}: must lie between 1 and --maximum-bytes {self.maximum_bytes}"
            )
        if self.held_out_modulo < 2:
            raise InputError(f"--held-out-modulo {self.held_out_modulo}: must be at least 2, or nothing is trained on")


@dataclass(frozen=True)
class CorpusResult:
    """What a run made, or found made."""

    up_to_date: bool
    increments: tuple[TextIncrement, ...]


@dataclass(frozen=True)
class _SourceFile:
    name: str
    """Path below the standard library, with slashes."""
    content: bytes


def make_corpus(options: CorpusOptions, library: Path | None = None) -> CorpusResult:
    """Make the increments from the standard library in ``library`` (this Python's own), unless they are there already.

    Raises InputError as every tool does, and where the installation carries too little text.
    """
    options.check()
    library = library or Path(sysconfig.get_path("stdlib"))
    files = {name: list(_read_files(library, modules)) for name, modules in MODULES.items()}
    files["language"] = [*_read_topics(library), *files["language"]]
    recipe = _recipe(options, files)
    up_to_date = is_finished(options.output, recipe, options.overwrite)
    if not up_to_date:
        _make(options, files, library, recipe)
    return CorpusResult(up_to_date, read_increments(options.output))


def _recipe(options: CorpusOptions, files: Mapping[str, Sequence[_SourceFile]]) -> dict[str, Any]:
    digests = {
        increment: [[file.name, hashlib.sha256(file.content).hexdigest()] for file in group]
        for increment, group in files.items()
    }
    return {
        "tool": "make_corpus",
        "python": platform.python_version(),
        "inputs": fingerprint(digests),
        "maximum_bytes": options.maximum_bytes,
        "minimum_bytes": options.minimum_bytes,
        "held_out_modulo": options.held_out_modulo,
    }


def _read_files(library: Path, modules: Sequence[str]) -> Iterator[_SourceFile]:
    """The sources of ``modules`` and of everything below them, in order, without tests and tables."""
    for module in modules:
        found = sorted((library / module).rglob("*.py")) or [library / f"{module}.py"]
        for path in found:
            relative = path.relative_to(library)
            if path.is_file() and relative.as_posix() not in _TABLES and not _TEST_FOLDERS & {*relative.parts}:
                yield _SourceFile(relative.as_posix(), path.read_bytes())


def _read_topics(library: Path) -> Iterator[_SourceFile]:
    path = library / TOPICS
    if path.is_file():
        yield _SourceFile(TOPICS, path.read_bytes())


def _make(
    options: CorpusOptions, files: Mapping[str, Sequence[_SourceFile]], library: Path, recipe: dict[str, Any]
) -> None:
    documents = _documents(files)
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in documents.items()}
    smallest = min(sizes, key=lambda name: sizes[name])
    if sizes[smallest] < options.minimum_bytes:
        raise InputError(
            f"{library}: its text for the increment {smallest!r} has {sizes[smallest]:,} bytes, fewer than "
            f"--minimum-bytes {options.minimum_bytes:,}; use a Python installed with its library sources, or lower it"
        )
    size = min(options.maximum_bytes, sizes[smallest])
    source = {"python": platform.python_version(), "files": sum(map(len, files.values()))}
    with TextIncrementsWriter(options.output, list(documents), source) as writer:
        for name, texts in documents.items():
            for text in _select(texts, size):
                writer.add(name, text, is_held_out(text, options.held_out_modulo))
            if not (writer.text_bytes(name, held_out=True) and writer.text_bytes(name, held_out=False)):
                raise InputError(
                    f"--held-out-modulo {options.held_out_modulo}: leaves a part of the increment {name!r} empty; "
                    "choose another, or raise --maximum-bytes"
                )
        write_record(options.output / RECORD_NAME, recipe, {}, seal=options.output / INDEX_NAME)


def _documents(files: Mapping[str, Sequence[_SourceFile]]) -> dict[str, list[str]]:
    """The documents of each increment, in order; the second and later ones of the same text are dropped."""
    seen: set[str] = set()
    documents: dict[str, list[str]] = {name: [] for name in files}
    for name, group in files.items():
        for file in group:
            for text in _texts(file):
                for piece in cut_text(text, _DOCUMENT_BYTES):
                    if piece not in seen:
                        seen.add(piece)
                        documents[name].append(piece)
    return documents


def _texts(file: _SourceFile) -> Iterator[str]:
    """The texts of a file: a source is one; the topics are many."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(file.content).readline)
        source = io.TextIOWrapper(io.BytesIO(file.content), encoding).read()  # universal newlines
        if file.name == TOPICS:
            yield from _topics(source)
        else:
            yield source
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{file.name}: not a source of the standard library ({error}); reinstall Python") from None


def _topics(source: str) -> Iterator[str]:
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            yield from (str(text) for text in ast.literal_eval(statement.value).values())


def _select(texts: Sequence[str], size: int) -> list[str]:
    """As many of ``texts`` as ``size`` bytes hold, drawn from everywhere by their hash, in their own order."""
    ranked = sorted(range(len(texts)), key=lambda position: _rank(texts[position]))
    chosen: list[int] = []
    for position in ranked:
        size -= len(texts[position].encode())
        if size < 0:
            break
        chosen.append(position)
    return [texts[position] for position in sorted(chosen)]


def _rank(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, key=_SELECTION).digest()
