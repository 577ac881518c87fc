#!/usr/bin/env python3
"""Write docs/reference.md: every option of every command line, from the code that defines it.

tools/reference.py              write the page
tools/reference.py --check      write nothing; status 2 where the page is not what the code says
"""

import argparse
import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import adopt_dataset
import blend_increments
import draw_schedule
import lineage
import plan_versions
import report
import tyro
import verify_data

from megalrps.commandline import run_tool
from megalrps.config import Config
from megalrps.data.corpus import CorpusOptions
from megalrps.data.preprocess_options import PreprocessOptions
from megalrps.data.split import SplitOptions
from megalrps.data.tokenizer_training import TokenizerTrainingOptions
from megalrps.errors import InputError
from megalrps.files import write_text
from megalrps.kernels import __main__ as kernels_command
from megalrps.model.config import with_vocabulary
from megalrps.model.counts import parameter_count
from megalrps.model.presets import PRESETS

PROGRAM = "reference.py"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
_SMALL_VOCABULARY = 2048

INTRODUCTION = """\
# Reference: every option

This page is generated: run `python tools/reference.py` after a change of an option; a test fails while it is stale.

Options of `pretrain_gpt.py` are given as flags, or in a YAML file named by `--config`, under the section they stand
in here or under none (`lr: 3.0e-4` is `--lr 3e-4`). What is said later wins: defaults, `--preset`, the file, flags. An
unknown option is refused with the nearest known one, and the status is 2. A preset gives every option of the model that
is marked required.

A switch is on with `--name`; where `--no-name` stands beside it, that turns it off. `...` after a kind means that the
option takes several values.
"""


@dataclass(frozen=True)
class ReferenceOptions:
    """Write the page of every option from the code that defines them."""

    output: Path = PAGE
    """The page."""

    check: bool = False
    """Write nothing; fail where the page is not what the code says."""


@dataclass(frozen=True)
class Command:
    """A command line whose options are a dataclass; ``paired``: a switch also has a ``--no-`` form."""

    program: str
    options: type
    paired: bool = False


@dataclass(frozen=True)
class Row:
    """One option: its flag, what it takes, what it is when it is left out, and what it does."""

    flag: str
    takes: str
    default: str
    text: str


COMMANDS = (
    Command("pretrain_gpt.py", Config, paired=True),
    Command("tools/plan_versions.py", plan_versions.Arguments),
    Command("tools/draw_schedule.py", draw_schedule.Arguments),
    Command("tools/preprocess_data.py", PreprocessOptions),
    Command("tools/blend_increments.py", blend_increments.BlendOptions),
    Command("tools/adopt_dataset.py", adopt_dataset.AdoptOptions),
    Command("tools/verify_data.py", verify_data.VerifyOptions),
    Command("tools/split_increments.py", SplitOptions),
    Command("tools/make_corpus.py", CorpusOptions),
    Command("tools/train_tokenizer.py", TokenizerTrainingOptions),
    Command("tools/reference.py", ReferenceOptions),
    Command("python -m megalrps.kernels", kernels_command.Arguments),
)


def render_page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for command in COMMANDS:
        parts += [f"## {command.program}\n", *_sections(command.options, command.paired, level=3)]
        if command.options is Config:
            parts += ["### Presets\n", _preset_table()]
    parser = report.parser()
    parts += [
        "## tools/report.py\n",
        _prose((parser.description or "").partition("\n\n")[0]),
        _table(_parser_rows(parser)),
        *_commands("tools/lineage.py", lineage.parser()),
    ]
    return "\n".join(parts)


def _commands(program: str, parser: lineage.Parser) -> Iterator[str]:
    """The section of a program that has commands, each with options of its own."""
    yield f"## {program}\n"
    yield _prose((parser.description or "").partition("\n\n")[0])
    for name, command in parser.commands.choices.items():
        yield f"### {name}\n"
        yield _prose(command.description or "")
        yield _table(_parser_rows(command))


def _sections(options: type, paired: bool, level: int) -> Iterator[str]:
    """What ``options`` is, the table of its own options, and the same of each group inside it."""
    yield _prose(inspect.getdoc(options) or "")
    hints, texts = get_type_hints(options), _attribute_texts(options)
    own = [each for each in fields(options) if not is_dataclass(hints[each.name])]
    if own:
        yield _table(_row(each, hints[each.name], texts[each.name], paired) for each in own)
    for each in fields(options):
        if is_dataclass(hints[each.name]):
            yield f"{'#' * level} {each.name}\n"
            yield from _sections(hints[each.name], paired, level + 1)


def _attribute_texts(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass: what its command line shows as help."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef), "a class begins with its definition"
    return {
        field.target.id: _one_line(text.value.value)
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _row(field: Field[Any], kind: Any, text: str, paired: bool) -> Row:
    flag = f"--{field.name.replace('_', '-')}"
    if kind is bool and paired:
        flag = f"{flag}, --no-{flag.removeprefix('--')}"
    required = field.default is MISSING and field.default_factory is MISSING
    return Row(flag, _takes(kind), "required" if required else _shown(field.default), text)


def _takes(kind: Any) -> str:
    """What an option of the type ``kind`` takes, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _takes(next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        return f"{_takes(arguments[0])} ..."
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    return {bool: "switch", int: "integer", float: "number", str: "text", Path: "path"}[kind]


def _shown(default: Any) -> str:
    """A default as a reader would type it."""
    if default is None or default in ((), ""):
        return "unset"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(_shown(item) for item in default)
    if isinstance(default, Path):
        return f"`{default.relative_to(PAGE.parents[1])}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _parser_rows(parser: argparse.ArgumentParser) -> Iterator[Row]:
    for action in parser._actions:
        if action.dest != "help":
            flag = ", ".join(action.option_strings) or str(action.metavar)
            default = "required" if action.required and action.nargs != "*" else _shown(action.default or None)
            if action.nargs == 0:
                default = "off"
            yield Row(flag, _taken(action), default, action.help or "")


def _taken(action: argparse.Action) -> str:
    """What the option or argument ``action`` takes, in words."""
    if action.nargs == 0:
        return "switch"
    kind = Literal[tuple(action.choices)] if action.choices else action.type or str
    return _takes(kind) + (" ..." if action.nargs in ("+", "*") else "")


def _preset_table() -> str:
    rows = ["| preset | layers | hidden | heads | key-value heads | feed-forward | head tied | parameters |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, preset in PRESETS.items():
        model = with_vocabulary(preset, _SMALL_VOCABULARY)
        cells = (
            f"`{name}`",
            model.num_layers,
            model.hidden_size,
            model.num_attention_heads,
            model.query_groups,
            model.feed_forward_width,
            "no" if model.untie_embeddings_and_output_weights else "yes",
            f"{parameter_count(model):,} with a vocabulary of {model.vocab_size:,}",
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


def _table(rows: Iterable[Row]) -> str:
    lines = ["| option | takes | default | |", "| --- | --- | --- | --- |"]
    for row in rows:
        text = _markdown(row.text).replace("|", "\\|")
        lines.append(f"| `{row.flag}` | {row.takes} | {row.default} | {text} |")
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _prose(text: str) -> str:
    return _markdown(text).strip() + "\n"


def _markdown(text: str) -> str:
    """A docstring as Markdown: ``<s>`` is a token there, not a tag that strikes out the rest of the page."""
    return text.replace("``", "`").replace("<", "\\<")


def main() -> None:
    """Write the page, or check it."""
    options = tyro.cli(ReferenceOptions, prog=PROGRAM, config=(tyro.conf.FlagCreatePairsOff,))
    page = render_page()
    if not options.check:
        write_text(options.output, page)
    elif not options.output.exists() or options.output.read_text(encoding="utf-8") != page:
        raise InputError(f"{options.output} is not what the code says: run python tools/reference.py")
    sys.stdout.write(f"{options.output}: {'up to date' if options.check else 'written'}\n")


if __name__ == "__main__":
    run_tool(main, PROGRAM)
