"""A checkpoint as the folder that Hugging Face's libraries load: config.json, model.safetensors, the tokenizer."""

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megalrps.checkpoint.store import Store
from megalrps.errors import InputError
from megalrps.files import sync_directory, sync_file, write_json
from megalrps.model.config import ModelConfig
from megalrps.model.huggingface import to_huggingface
from megalrps.model.parameters import parameter_specs

WEIGHTS_FILE = "model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


@dataclass(frozen=True)
class Exported:
    """What lies in an exported folder; ``tokenizer`` is empty where its files are not known."""

    weights_bytes: int
    tokenizer: tuple[str, ...]


def export_huggingface(store: Store, name: str, output: Path, dtype: torch.dtype) -> Exported:
    """Write the weights of the checkpoint ``name``, verified while loaded, to the new folder ``output`` in ``dtype``.

    Whole or absent, and durable. The weights in a checkpoint are the fp32 masters. Raises InputError where there is
    something at ``output`` or the checkpoint is none of a model of ours, and as
    :meth:`megalrps.checkpoint.store.Store.load`.
    """
    _refuse_existing(output)
    recorded = store.manifest(name).record.get("config")
    if not isinstance(recorded, Mapping) or not {"model", "data"} <= recorded.keys():
        raise InputError(
            f"checkpoint {name} does not say which model it is: only those of a training run can be exported"
        )
    config = _model_config(recorded["model"], name)
    weights = {each: torch.empty(spec.shape, dtype=torch.float32) for each, spec in parameter_specs(config).items()}
    store.load(name, {f"model.{each}": weight for each, weight in weights.items()})
    converted = {each: weight.to(dtype) for each, weight in weights.items()}
    model = to_huggingface(converted, config, max_position_embeddings=recorded["data"]["seq_length"])
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.{secrets.token_hex(8)}.partial"
    partial.mkdir()
    try:
        save_file(model.weights, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / WEIGHTS_FILE).chmod(0o644)
        write_json(partial / "config.json", model.config)
        tokenizer = _copy_tokenizer(recorded["data"].get("tokenizer_model"), partial)
        for file in partial.iterdir():
            sync_file(file)
        sync_directory(partial)
        size = (partial / WEIGHTS_FILE).stat().st_size
        _refuse_existing(output)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(output.parent)
    return Exported(size, tokenizer)


def _model_config(recorded: Mapping[str, Any], name: str) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    if unknown := sorted(recorded.keys() - known):
        raise InputError(f"checkpoint {name} is of a model with {', '.join(unknown)}, which this version does not know")
    config = ModelConfig(**recorded)
    config.validate()
    return config


def _copy_tokenizer(model: str | None, target: Path) -> tuple[str, ...]:
    """Copy what is still there of the tokenizer that the run was given, under the names that transformers looks for."""
    if model is None or not Path(model).exists():
        return ()
    source = Path(model)
    if source.is_dir():
        found = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
        for file in found:
            shutil.copyfile(file, target / file.name)
        return tuple(file.name for file in found)
    name = "tokenizer.json" if source.suffix == ".json" else "tokenizer.model"
    shutil.copyfile(source, target / name)
    return (name,)


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise InputError(f"--output {output} exists: nothing is ever written over it; name another")
