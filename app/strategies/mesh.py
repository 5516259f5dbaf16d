"""The processes as meshes, and which part of every tensor each of them holds."""

from functools import cached_property

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from app.strategies.layout import Layout
from modules.world import Region


class Meshes:
    """One arrangement of the processes, sliced in the ways that parameters need."""

    def __init__(self, layout: Layout, root: DeviceMesh) -> None:
        self.layout, self._root = layout, root

    def _arranged(self, **degrees: int) -> DeviceMesh:
        return self._root._unflatten(0, tuple(degrees.values()), tuple(degrees))

    @cached_property
    def _dense(self) -> DeviceMesh:
        layout = self.layout
        return self._arranged(dp_replicate=layout.dp_replicate, dp_shard=layout.dp_shard, tp=layout.tp)

    @cached_property
    def _sparse(self) -> DeviceMesh:
        layout = self.layout
        replicas, sharers = layout.dp_replicate, layout.efsdp
        return self._arranged(ep_replicate=replicas, efsdp=sharers, ep=layout.ep, etp=layout.tp)

    @cached_property
    def data(self) -> DeviceMesh:
        """Processes with different samples."""
        return self._arranged(data=self.layout.data_ranks, model=self.layout.tp)["data"]

    @cached_property
    def fsdp(self) -> DeviceMesh:
        """Processes that share out parameters; two dimensions, replicas first, where there are replicas."""
        return self._dense["dp_replicate", "dp_shard"] if self.layout.dp_replicate > 1 else self._dense["dp_shard"]

    @cached_property
    def tp(self) -> DeviceMesh:
        """Processes that share out heads and channels."""
        return self._dense["tp"]

    @cached_property
    def expert_fsdp(self) -> DeviceMesh:
        """Processes that share out the same experts."""
        return self._sparse["ep_replicate", "efsdp"] if self.layout.dp_replicate > 1 else self._sparse["efsdp"]

    @cached_property
    def ep(self) -> DeviceMesh:
        """Processes that hold different experts."""
        return self._sparse["ep"]

    @cached_property
    def experts(self) -> DeviceMesh:
        """Over which expert weights are laid before FSDP: by expert, by channel, or by both."""
        if self.layout.ep == 1:
            return self.tp
        return self._sparse["ep", "etp"] if self.layout.tp > 1 else self.ep


def shard_dim(placement: Placement) -> int | None:
    """The dimension that a placement shares out."""
    return placement.dim if isinstance(placement, (Shard, _StridedShard)) else None


def region(tensor: Tensor) -> Region:
    """Which part of a tensor this process holds.

    Tensor and expert parallelism share a tensor out first, and FSDP what is left: from the last dimension of the mesh
    to the first, in chunks as `torch.chunk` makes them, of which the last may be smaller or empty.
    """
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        for mesh_dim in reversed(range(tensor.device_mesh.ndim)):
            dim = shard_dim(tensor.placements[mesh_dim])
            if dim is not None:
                begin, end = bounds[dim]
                chunk = -(-(end - begin) // tensor.device_mesh.size(mesh_dim))
                start = min(end, begin + coordinate[mesh_dim] * chunk)
                bounds[dim] = (start, min(end, start + chunk))
    return tuple(slice(begin, end) for begin, end in bounds)


def part(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor shared out as `like` is, from all of it, without communication."""
    local = whole[region(like)]
    if not isinstance(like, DTensor):
        return local.to(like).contiguous()
    local = local.to(like.to_local()).contiguous()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def copies(tensor: Tensor, world_size: int) -> int:
    """How many processes hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return world_size
    dims = [mesh_dim for mesh_dim, placement in enumerate(tensor.placements) if shard_dim(placement) is not None]
    holders = 1
    for mesh_dim in dims:
        holders *= tensor.device_mesh.size(mesh_dim)
    return world_size // holders
