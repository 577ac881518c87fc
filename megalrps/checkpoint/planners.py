"""torch.distributed.checkpoint's planners, narrowed to tensors, with nothing ambiguous and nothing left out."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem
from torch.distributed.tensor import DTensor

from megalrps.checkpoint.errors import MissingTensorError, TensorMismatchError
from megalrps.checkpoint.manifest import ITEM_BYTES

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
"""The types a checkpoint can hold, by name."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""The names of these types."""


class TensorSavePlanner(DefaultSavePlanner):
    """Plans a save of tensors (plain or DTensor) by name; of a replicated tensor, one copy is written."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Raises TypeError for an entry the format cannot hold."""
        for name, tensor in state_dict.items():
            _check_entry(name, tensor)
        super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        """What this rank holds, without the empty chunks that an uneven sharding leaves on some ranks."""
        plan = super().create_local_plan()
        return SavePlan([item for item in plan.items if not _is_empty_part(item)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raises ValueError when ranks disagree about a tensor, which removing copies would hide."""
        whole: dict[str, tuple[torch.Size, torch.dtype]] = {}
        boxes: dict[MetadataIndex, torch.Size] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                data = _tensor_data(item)
                agreed = whole.setdefault(item.index.fqn, (data.size, data.properties.dtype)) == (
                    data.size,
                    data.properties.dtype,
                )
                if not agreed or boxes.setdefault(item.index, data.chunk.sizes) != data.chunk.sizes:
                    raise ValueError(f"rank {rank} holds {item.index.fqn} with another shape or type than a lower rank")
        return super().create_global_plan(all_plans)


class TensorLoadPlanner(DefaultLoadPlanner):
    """Plans a load into tensors by name; every element of every one of them must come from the checkpoint."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Raises TypeError for an entry the format cannot hold."""
        for name, tensor in state_dict.items():
            _check_entry(name, tensor)
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        """Raises MissingTensorError or TensorMismatchError, with the tensor named, before anything is read."""
        assert self.metadata is not None, "set_up_planner comes first"
        for name, tensor in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise MissingTensorError(
                    f"the checkpoint holds no tensor {name}: it was saved from another model or optimizer"
                )
            if saved.size != tensor.shape or saved.properties.dtype != tensor.dtype:
                raise TensorMismatchError(
                    f"tensor {name} is {DTYPE_NAMES[saved.properties.dtype]} {list(saved.size)} in the checkpoint and "
                    f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} here: give the options it was saved with"
                )
        plan = super().create_local_plan()
        self._check_filled(plan)
        return plan

    def _check_filled(self, plan: LoadPlan) -> None:
        """The manifest's chunks are disjoint: a tensor is filled when as many elements are read as it has here."""
        planned = dict.fromkeys(self.state_dict, 0)
        for item in plan.items:
            planned[item.dest_index.fqn] += math.prod(item.lengths)
        for name, tensor in self.state_dict.items():
            if planned[name] != _local_elements(tensor):
                raise TensorMismatchError(
                    f"tensor {name}: the checkpoint fills {planned[name]} of {_local_elements(tensor)} elements"
                )


def _check_entry(name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"entry {name!r} is a {type(tensor).__name__}: a checkpoint holds tensors, the rest is for the record"
        )
    if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(
            f"tensor {name}: {tensor.dtype} {tensor.layout} on {tensor.device} is not among what a checkpoint holds"
        )
    if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
        raise TypeError(f"tensor {name} is a DTensor of partial sums: reduce it first")


def _tensor_data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None, "set_up_planner lets only tensors in"
    return item.tensor_data


def _is_empty_part(item: WriteItem) -> bool:
    data = _tensor_data(item)
    return math.prod(data.chunk.sizes) == 0 and math.prod(data.size) > 0


def _local_elements(tensor: torch.Tensor) -> int:
    """The number of elements of ``tensor`` that this rank holds."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().numel() if tensor.device_mesh.get_coordinate() is not None else 0
    if hasattr(tensor, "__create_chunk_list__"):  # the protocol by which other tensor classes say what they hold
        return sum(math.prod(chunk.sizes) for chunk in tensor.__create_chunk_list__())
    return tensor.numel()
