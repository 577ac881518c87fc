#!/usr/bin/env python3
"""Look at what a run has trained, check every byte of it; keep, give up, collect and copy checkpoints.

tools/lineage.py list --run runs/quickstart          the tree of checkpoints, and what refers to each
tools/lineage.py verify --run runs/quickstart        read all of it; for a nightly job: the status says what is wrong
tools/lineage.py pin main-00012000 --as before-the-spike --run runs/quickstart
tools/lineage.py gc --run runs/quickstart            what nothing needs any more; --apply moves it to RUN/trash
"""

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megalrps.checkpoint.describe import describe_checkpoint, describe_lineage, set_aside
from megalrps.checkpoint.draw import draw_leases, draw_lineage, draw_set_aside
from megalrps.checkpoint.errors import CorruptCheckpointError, MissingCheckpointError
from megalrps.checkpoint.export import copy_checkpoint
from megalrps.checkpoint.garbage import DAY, GRACE_DAYS, Verdict, collect
from megalrps.checkpoint.keeping import forget, pin, trained_again, unpin
from megalrps.checkpoint.leases import Leases
from megalrps.checkpoint.lineage import read_lineage
from megalrps.checkpoint.names import check_name
from megalrps.checkpoint.references import References
from megalrps.checkpoint.scrub import scrub
from megalrps.commandline import run_tool
from megalrps.errors import InputError
from megalrps.paths.plan import Plan
from megalrps.training.run_directory import RunDirectory

PROGRAM = "lineage.py"


class Parser(argparse.ArgumentParser):
    """The command line; its help is that of all its commands, one after the other."""

    commands: "argparse._SubParsersAction[argparse.ArgumentParser]"

    def format_help(self) -> str:
        """What the tool does, then each command with its options."""
        of_commands = (command.format_help() for command in self.commands.choices.values())
        return "\n".join([super().format_help(), *of_commands])


def parser() -> Parser:
    """The command line; tools/reference.py documents it."""
    made = Parser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.commands = made.add_subparsers(metavar="COMMAND", required=True, parser_class=argparse.ArgumentParser)
    _add(made, "list", list_).add_argument("--json", action="store_true", help="print one JSON object")
    command = _add(made, "show", show)
    command.add_argument("name", metavar="NAME", help="the checkpoint")
    command.add_argument("--json", action="store_true", help="print one JSON object, with the whole configuration")
    command = _add(made, "verify", verify)
    command.add_argument("name", metavar="NAME", nargs="*", help="checkpoints; without any, everything")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command = _add(made, "pin", pin_)
    command.add_argument("name", metavar="NAME", help="the checkpoint")
    command.add_argument("--as", dest="label", metavar="LABEL", help="name of the pin [that of the checkpoint]")
    command.add_argument("--note", metavar="TEXT", default="", help="why, for whoever finds it")
    _add(made, "unpin", unpin_).add_argument("label", metavar="LABEL", help="name of the pin")
    command = _add(made, "forget", forget_)
    command.add_argument(
        "reference", metavar="KIND/NAME", help="the reference, as `list` shows it: forks/main-00012000"
    )
    command.add_argument("--yes", action="store_true", help="also one whose checkpoint is whole")
    command = _add(made, "gc", gc)
    command.add_argument("--apply", action="store_true", help="do it; without, only say what would be done")
    command.add_argument("--keep", type=int, default=2, metavar="N", help="periodic checkpoints kept of each path")
    command.add_argument(
        "--grace", type=float, default=GRACE_DAYS, metavar="DAYS", help="nothing younger goes, into the trash or out"
    )
    command.add_argument("--verbose", action="store_true", help="also say why each other thing stays")
    command = _add(made, "export", export)
    command.add_argument("name", metavar="NAME", help="the checkpoint")
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="store that gets a copy, or new Hugging Face folder"
    )
    command.add_argument("--format", choices=("checkpoint", "huggingface"), default="checkpoint", help="what to write")
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="type of Hugging Face's weights")
    return made


def _add(made: Parser, name: str, act: Callable[..., None]) -> argparse.ArgumentParser:
    text = inspect.getdoc(act) or ""
    formatter = argparse.RawDescriptionHelpFormatter
    command = made.commands.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=formatter)
    command.add_argument("--run", type=Path, required=True, metavar="RUN", help="directory of the run")
    command.set_defaults(act=act)
    return command


def main() -> None:
    """Do what the command line asks for."""
    options = parser().parse_args()
    run = RunDirectory(options.run)
    if not run.checkpoints.is_dir():
        raise InputError(f"--run {run.root} is not the directory of a run: there is no {run.checkpoints}")
    options.act(options, run, References(run.lineage))


def list_(options: argparse.Namespace, run: RunDirectory, references: References) -> None:
    """Show the tree of checkpoints and what refers to each, who trains, and what is damaged or was set aside."""
    lineage = read_lineage(run.checkpoints)
    if options.json:
        print(json.dumps(describe_lineage(run.checkpoints, lineage, references), indent=1))
        return
    print(draw_lineage(lineage, references.readable()))
    others = *draw_leases(Leases(references).held()), *draw_set_aside(set_aside(run.checkpoints))
    for line in (*others, *references.damaged()):
        print(line)


def show(options: argparse.Namespace, run: RunDirectory, references: References) -> None:
    """Show all that is known of a checkpoint: parents, samples, layout, versions, allowed changes, size, digest."""
    lineage = read_lineage(run.checkpoints)
    name = check_name(options.name)
    if name in lineage.refused:
        raise CorruptCheckpointError(lineage.refused[name])
    if name not in lineage.records:
        raise MissingCheckpointError(f"no checkpoint {name} in {run.checkpoints}: the command list shows what there is")
    found = describe_checkpoint(run.checkpoints, lineage, references.readable(), name)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    del found["config"]  # as long as all the rest: --json has it
    for key, value in found.items():
        for place, line in enumerate(_lines(value)):
            print(f"{'' if place else key:<20}{line}".rstrip())


def verify(options: argparse.Namespace, run: RunDirectory, references: References) -> None:
    """Read every byte of every checkpoint and look up what references and parents promise; nothing is changed.

    Every complaint is a line. The status is 0, or that of the worst complaint: 22 damaged, 23 lost, 24 a format of
    another version.
    """
    found = scrub(run.root, references, [check_name(name) for name in options.name], _meter())
    told = [{"place": str(each.place), "text": each.text, "status": each.status} for each in found.complaints]
    if options.json:
        counts = {"checkpoints": found.checkpoints, "files": found.files, "bytes": found.bytes}
        print(json.dumps(counts | {"seconds": round(found.seconds, 3), "complaints": told}, indent=1))
    else:
        for each in told:
            print(f"BAD {each['place']}: {each['text']}")
        print(
            f"{found.checkpoints} checkpoints, {found.files} files, {_size(found.bytes)} in {found.seconds:.1f} s: "
            f"{len(told) or 'no'} complaints",
            flush=True,
        )
    if error := found.error():
        raise error


def pin_(options: argparse.Namespace, run: RunDirectory, references: References) -> None:
    """Keep a checkpoint, whatever is pruned or collected, until it is unpinned."""
    name = check_name(options.name)
    made = pin(run.checkpoints, references, name, check_name(options.label or name), options.note)
    print(f"{made.title} keeps {made.checkpoint}")


def unpin_(options: argparse.Namespace, run: RunDirectory, references: References) -> None:
    """Drop a pin; the checkpoint stays until pruning or gc finds that nothing else needs it."""
    found = unpin(references, check_name(options.label))
    print(f"{found.title}, which kept {found.checkpoint}, is gone")


def forget_(options: argparse.Namespace, run: RunDirectory, references: References) -> None:
    """Give up a reference whose checkpoint is damaged or gone, so that the next launch trains what it needs again.

    A damaged checkpoint is set aside, not removed. Where there is a copy of it, restore that instead.
    """
    kind, _, name = options.reference.partition("/")
    found = forget(run.checkpoints, references, kind, check_name(name), whole_too=options.yes)
    print(f"forgotten: {', '.join(found.references)}")
    if found.set_aside is not None:
        print(f"set aside: {found.set_aside}")
    if found.checkpoint is not None:
        print(_what_comes_of_it(run, found.checkpoint))


def gc(options: argparse.Namespace, run: RunDirectory, references: References) -> None:
    """Find what nothing needs any more, and say why; with --apply, move it to RUN/trash, and delete what is old there.

    Needed is what references name, what launches hold or read, what is younger than the grace period, the newest
    periodic checkpoints of each path, and all that any of these descends from.
    """
    if options.keep < 0:
        raise InputError(f"--keep {options.keep}: must not be negative")
    if not 0 <= options.grace < float("inf"):
        raise InputError(f"--grace {options.grace}: must be finite and not negative")
    if not references.directory.is_dir():
        raise InputError(f"--run {run.root} has no references yet: start its command once, with this version")
    grace = options.grace * DAY
    verdicts = collect(run.root, references, keep=options.keep, grace=grace, now=time.time(), apply=options.apply)
    for verdict in verdicts:
        if verdict.goes or options.verbose:
            print(_judged(verdict, run))
    going = [verdict.found for verdict in verdicts if verdict.goes]
    moved = [found for found in going if found.kind != "trash"]
    deleted = [found for found in going if found.kind == "trash"]
    for what, place, things in (("moved", "to", moved), ("deleted", "from", deleted)):
        did = what if options.apply else f"to be {what}"
        print(f"{did} {place} {run.root / 'trash'}: {len(things)}, {_size(sum(found.bytes for found in things))}")
    if going and not options.apply:
        print("nothing was changed: --apply does it")


def export(options: argparse.Namespace, run: RunDirectory, references: References) -> None:
    """Copy a checkpoint, verified while it is read: for another store, or as a folder for Hugging Face's libraries."""
    name = check_name(options.name)
    if options.format == "checkpoint":
        if options.dtype != "fp32":
            raise InputError(f"--dtype {options.dtype} is for --format huggingface: a checkpoint is copied as it is")
        manifest = copy_checkpoint(run.checkpoints, name, options.output)
        print(f"{options.output / name}: {_size(sum(shard.bytes for shard in manifest.shards))}, verified")
        return
    import torch  # the one command that needs it

    from megalrps.checkpoint.store import Store
    from megalrps.model.export import export_huggingface

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    exported = export_huggingface(Store(run.checkpoints), name, options.output, dtype)
    tokenizer = f"with {', '.join(exported.tokenizer)}" if exported.tokenizer else "without a tokenizer: none is known"
    print(f"{options.output}: {_size(exported.weights_bytes)} of weights, {tokenizer}")


def _what_comes_of_it(run: RunDirectory, checkpoint: str) -> str:
    if not run.plan.exists():
        return f"what the plan still needs of {checkpoint} is trained again by the next launch"
    plan = Plan.from_json(json.loads(run.plan.read_text()), str(run.plan))
    again = trained_again(plan, run.checkpoints, checkpoint)
    if again is None:
        return (
            f"no end of a segment of {run.plan.name} is lost: nothing is trained again for it but since the last save"
        )
    segment, steps = again
    return (
        f"the next launch trains path {segment.path} again from step {segment.end - steps:,} to {segment.end:,}, "
        f"{steps:,} {'step' if steps == 1 else 'steps'}; what was trained from {checkpoint} stays as it is"
    )


def _judged(verdict: Verdict, run: RunDirectory) -> str:
    found = verdict.found
    return (
        f"{'goes ' if verdict.goes else 'stays'} {found.place.relative_to(run.root)}  {found.kind}, "
        f"{_size(found.bytes)}: {verdict.why}"
    )


def _lines(value: Any) -> Iterator[str]:
    """A value of `show`, for a person."""
    if isinstance(value, Mapping):
        yield from (f"{key}: {json.dumps(member)}" for key, member in value.items())
    elif isinstance(value, list):
        for member in value:
            yield " ".join(map(str, filter(None, member.values()))) if isinstance(member, dict) else str(member)
    else:
        yield "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    if value in ({}, []):
        yield ""


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.2f} MB"


def _meter() -> Callable[[int, int], None]:
    """Shows on a terminal how far the reading is; says nothing anywhere else."""
    started = time.monotonic()

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            rate = done / 1e6 / max(time.monotonic() - started, 1e-9)
            sys.stderr.write(f"\r{_size(done)} of {_size(total)}, {rate:,.0f} MB/s\x1b[K{chr(10) * (done == total)}")
            sys.stderr.flush()

    return show


if __name__ == "__main__":
    run_tool(main, PROGRAM)
