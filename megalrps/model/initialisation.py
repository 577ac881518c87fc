"""Initial values: a function of (seed, global name, global shape) alone.

Neither the order of construction, nor the stage or the shard that holds a parameter, nor its device changes its values:
every layout starts from the same model.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megalrps.model.config import ModelConfig
from megalrps.model.parameters import ParameterSpec, Role, parameter_specs
from megalrps.parallel.buffers import FlatBuffers
from megalrps.parallel.placement import WHOLE, Placement


def initial_value(spec: ParameterSpec, config: ModelConfig, seed: int) -> Tensor:
    """The whole parameter in fp32 on the CPU: ones for norms, else normal around 0.

    The standard deviation is ``init_method_std``, divided by sqrt(2 x layers) for the two maps of every layer that
    write to the residual stream (Radford et al. 2019, GPT-2, section 2.3; Megatron does the same).
    """
    if spec.role is Role.NORM:
        return torch.ones(spec.shape)
    scale = (2 * config.num_layers) ** -0.5 if spec.role is Role.OUTPUT_PROJECTION else 1.0
    return torch.empty(spec.shape).normal_(std=config.init_method_std * scale, generator=_generator(seed, spec.name))


@torch.no_grad()
def initialise_(
    model: nn.Module, config: ModelConfig, seed: int, placements: Mapping[str, Placement] | None = None
) -> None:
    """Fill every parameter of ``model`` (whole or a stage) in place, rounding to the parameter's type.

    ``placements`` says which part of a parameter the model holds; of one that is not in it, all.
    """
    specs = parameter_specs(config)
    for name, parameter in model.named_parameters():
        value = initial_value(specs[name], config, seed)
        parameter.copy_((placements or {}).get(name, WHOLE).part(value))


def initialise_buffers_(buffers: FlatBuffers, config: ModelConfig, seed: int) -> None:
    """Fill this rank's shards of the masters, and what is computed with from those of all replicas. Collective.

    The values are those of :func:`initialise_`; only what a shard has a part of is drawn.
    """
    specs = parameter_specs(config)
    for name in buffers.names:
        if buffers.holds(name):
            value = initial_value(specs[name], config, seed)
            buffers.assign(name, buffers.placements.get(name, WHOLE).part(value))
    buffers.refresh()


def _generator(seed: int, name: str) -> torch.Generator:
    """A stream of its own for each parameter. Torch's CPU generator uses only 32 bits of a seed."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
