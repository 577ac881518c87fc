"""The typed tree of options: the one place where defaults, presets, YAML files and flags meet.

Each room defines its own frozen dataclass and takes only that; this module gathers them and turns them into the
command line (tyro). What is said later wins: defaults, then ``--preset``, then ``--config FILE.yaml``, then flags.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import tyro
import yaml

from megalrps.data.options import DataOptions
from megalrps.errors import InputError
from megalrps.kernels.options import KernelOptions
from megalrps.model.activation_options import ActivationOptions
from megalrps.model.config import ModelConfig
from megalrps.model.presets import PRESETS
from megalrps.parallel.options import ParallelOptions
from megalrps.paths.options import PlanOptions
from megalrps.training.options import (
    CheckpointOptions,
    LoggingOptions,
    LossScaleOptions,
    OptimizerOptions,
    RuntimeOptions,
    StabilityOptions,
    TrainingOptions,
)


def _no_model() -> ModelConfig:
    """No shape at all: it takes a --preset, or the three flags that have no default."""
    missing: Any = tyro.MISSING
    return ModelConfig(num_layers=missing, hidden_size=missing, num_attention_heads=missing)


@dataclass(frozen=True)
class Config:
    """Pretrain a model through its version updates: one path at the maximal learning rate, a branch per release."""

    config: str | None = None
    """YAML file of these same options (sections as in this help, or none); flags win over it."""

    preset: str | None = None
    """Model shape to start from, such as llama-1.2b (megalrps/model/presets.py); the shape's flags win over it."""

    dry_run: bool = False
    """Print the resolved options, the plan, parameters, FLOPs and memory; train nothing and write nothing."""

    json: bool = False
    """With --dry-run: print one JSON object instead of text."""

    world_size: int | None = None
    """With --dry-run: describe a launch of so many ranks; unset: torchrun's, or without it the layout's fewest."""

    model: ModelConfig = field(default_factory=_no_model)
    plan: PlanOptions = field(default_factory=PlanOptions)
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    activations: ActivationOptions = field(default_factory=ActivationOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    kernels: KernelOptions = field(default_factory=KernelOptions)
    scaling: LossScaleOptions = field(default_factory=LossScaleOptions)
    stability: StabilityOptions = field(default_factory=StabilityOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)

    def check(self, world_size: int) -> None:
        """Raise InputError, naming the flag, for options that no run can use; nothing has been read or written yet."""
        self.data.check()
        if self.world_size is not None and not self.dry_run:
            raise InputError("--world-size is for --dry-run: a launch has the ranks that torchrun starts")
        if self.world_size is not None and self.world_size < 1:
            raise InputError(f"--world-size {self.world_size}: must be at least 1")
        layout = self.parallel.layout(world_size)
        self.parallel.check(self.data.seq_length)
        self._check_documents(layout.cp)
        self.parallel.check_reduction(layout.dp, self.training.micro_batch_size, self.kernels.optimizer_backend)
        self.activations.check()
        self.training.check(layout.dp)
        self.optimizer.check()
        self.scaling.check(self.training.fp16)
        self.stability.check()
        self.logging.check()
        self.runtime.check()
        if self.checkpoint.save or not self.dry_run:
            self.checkpoint.check()

    def _check_documents(self, context_ranks: int) -> None:
        """Raise InputError where a rank holds runs of a sequence only, of which no attention knows the documents."""
        flags = {
            "--reset-attention-mask": self.data.reset_attention_mask,
            "--reset-position-ids": self.data.reset_position_ids,
        }
        for flag, given in flags.items():
            if given and context_ranks > 1:
                raise InputError(
                    f"{flag} does not go with --context-parallel-size {context_ranks}: attention and positions within "
                    "documents are of whole sequences; leave one of them out (--tensor-model-parallel-size and "
                    "--recompute-granularity save activations too)"
                )

    def to_json(self) -> dict[str, Any]:
        """The resolved options by section, as stored in every checkpoint; :func:`to_yaml` is what --config reads."""
        return {name: _plain(asdict(getattr(self, name))) for name in _sections()}

    def to_yaml(self) -> str:
        """The resolved options as a file for ``--config``."""
        sections = {name: {_flag(key): value for key, value in body.items()} for name, body in self.to_json().items()}
        return yaml.safe_dump(sections, sort_keys=False, width=120)


def parse_config(arguments: Sequence[str], program: str = "pretrain_gpt.py") -> Config:
    """The options of a command line.

    Exits with status 2 (and the nearest known name) for an unknown flag, with 0 for ``--help``. Raises InputError for
    a file that cannot be read, an unknown key in it, or an unknown preset.
    """
    file = _option(arguments, "config")
    from_file = _read_yaml(Path(file)) if file else {}
    preset = _option(arguments, "preset") or from_file.get("preset")
    default = Config() if preset is None else replace(Config(), preset=preset, model=_preset(preset))
    # The file's options go before the flags, and what is said later wins: both are typed and checked by one parser.
    said = [*(_as_arguments(Path(file), from_file) if file else ()), *arguments]
    return tyro.cli(tyro.conf.OmitArgPrefixes[Config], args=said, default=default, prog=program)


def _option(arguments: Sequence[str], name: str) -> str | None:
    """The value of ``--name`` before the real parse: it decides the defaults that the real parse starts from."""
    value = None
    for position, argument in enumerate(arguments):
        if argument == f"--{name}" and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value


def _preset(name: str) -> ModelConfig:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1) or sorted(PRESETS)
        raise InputError(f"--preset {name} is unknown; did you mean {near[0]}? Known: {', '.join(PRESETS)}")
    return PRESETS[name]


def _sections() -> dict[str, type]:
    """Section name -> the dataclass of its options, in the order of the help."""
    default = Config()
    return {each.name: type(value) for each in fields(Config) if is_dataclass(value := getattr(default, each.name))}


def _keys() -> dict[str, str]:
    """Option (underscored) -> its section, "" for those at the top."""
    sections = _sections()
    keys = {each.name: "" for each in fields(Config) if each.name not in sections}
    keys.update({each.name: name for name, kind in sections.items() for each in fields(kind)})
    return keys


def _read_yaml(file: Path) -> dict[str, Any]:
    """The options in ``file``, flat, names underscored, sections dissolved; every key is known and given once."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config {file} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"--config {file}: expected 'option: value' lines, found {type(content).__name__}")
    known, sections = _keys(), _sections()
    flat: dict[str, Any] = {}
    for key, value in content.items():
        section = str(key) if str(key) in sections and isinstance(value, dict) else None
        for name, item in value.items() if section else ((key, value),):
            option = str(name).replace("-", "_")
            _refuse_unknown(file, str(name), option, section, known)
            if option in flat:
                raise InputError(f"--config {file}: {name} is given twice")
            flat[option] = item
    return flat


def _refuse_unknown(file: Path, name: str, option: str, section: str | None, known: Mapping[str, str]) -> None:
    if option == "config":
        raise InputError(f"--config {file}: a file cannot name another with 'config'")
    if option not in known:
        near = difflib.get_close_matches(option, known, n=1)
        hint = f"; did you mean {_flag(near[0])}?" if near else "; --help lists the options"
        raise InputError(f"--config {file}: unknown option {name!r}{hint}")
    if section is not None and known[option] != section:
        raise InputError(f"--config {file}: {name} belongs to section {known[option] or '(none)'}, not {section}")


def _as_arguments(file: Path, options: Mapping[str, Any]) -> list[str]:
    """The options as a command line."""
    arguments: list[str] = []
    for option, value in options.items():
        flag = f"--{_flag(option)}"
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{_flag(option)}")
        elif isinstance(value, dict):
            raise InputError(f"--config {file}: {option} is not a section and takes no nested options")
        else:
            arguments.append(flag)
            items = value if isinstance(value, list) else [value]
            arguments += [str(item) for item in items]
    return arguments


def _flag(option: str) -> str:
    return option.replace("_", "-")


def _plain(value: Any) -> Any:
    """``value`` as JSON and YAML hold it: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
