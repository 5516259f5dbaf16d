"""`modules.world.World` of many processes."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from app.strategies.layout import Layout
from app.strategies.mesh import Meshes, copies, part, region
from app.strategies.parallelize import Wrapping, parallelize
from modules.config import ModelConfig
from modules.layers.transformer import Transformer
from modules.world import Region


class MeshWorld:
    """Processes in a layout.

    Args:
        layout_of: the layout for a model, which may share out another number of experts at each stage of growth.
        rank: the number of this process.
        wrapping: what is done to blocks.
    """

    def __init__(self, layout_of: Callable[[ModelConfig | None], Layout], rank: int, wrapping: Wrapping) -> None:
        self.layout_of, self.rank, self.wrapping = layout_of, rank, wrapping
        self._base = layout_of(None)
        self._root: DeviceMesh | None = None
        self._arranged: dict[Layout, Meshes] = {}

    def meet(self, device_type: str) -> None:
        """Make the groups of processes that communicate; the process group is there."""
        self._root = init_device_mesh(device_type, (self._base.world_size,), mesh_dim_names=("world",))

    @property
    def data_ranks(self) -> int:
        """How many processes train on different samples."""
        return self._base.data_ranks

    @property
    def data_rank(self) -> int:
        """The number of this process among them."""
        return self.rank // self._base.tp

    def share(self, amount: int, like: Tensor) -> Tensor:
        """What part this process has of something that all count."""
        counted = torch.tensor(float(amount), dtype=like.dtype).to(like.device, non_blocking=True)
        return counted / self.sum_over_data(counted)

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """The sum over processes with different samples."""
        summed = tensor.clone()
        dist.all_reduce(summed, group=self._data_group)
        return summed

    def largest(self, number: int) -> int:
        """The largest of the numbers that all processes give."""
        assert self._root is not None, "the processes have not met: setup_environment comes first"
        heard = torch.tensor(number, device=self._root.device_type)
        dist.all_reduce(heard, dist.ReduceOp.MAX)
        return int(heard)

    def place(self, network: Transformer, device: torch.device) -> None:
        """Share a network on the meta device out, and give memory to the part of it that this process holds."""
        parallelize(network, self._meshes_of(self.layout_of(network.config)), self.wrapping)
        network.to_empty(device=device)

    def settle(self, network: Transformer) -> None:
        """Drop what a forward pass has gathered of parameters and no backward pass has dropped."""
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def region(self, tensor: Tensor) -> Region:
        """Which part of a parameter this process holds."""
        return region(tensor)

    def local(self, tensor: Tensor) -> Tensor:
        """This process's part, in the same memory."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """All of it, on every process."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """A tensor shared out like a parameter, from all of it."""
        return part(whole, like)

    def product_dtype(self, weights: torch.dtype) -> torch.dtype:
        """That in which weights are gathered."""
        return torch.bfloat16 if self.wrapping.gathers == "bfloat16" else weights

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients: squares of what each process holds, divided by how many hold the same."""
        norms = torch.stack([torch.linalg.vector_norm(self.local(gradient)) for gradient in gradients])
        shares = [1.0 / copies(gradient, self._base.world_size) for gradient in gradients]
        total = norms.double().square() @ torch.tensor(shares, dtype=torch.float64).to(norms.device, non_blocking=True)
        dist.all_reduce(total)
        return total.sqrt().to(norms.dtype)

    @cached_property
    def _data_group(self) -> dist.ProcessGroup:
        return self._meshes_of(self._base).data.get_group()

    def _meshes_of(self, layout: Layout) -> Meshes:
        """Groups are made once for each layout: making them takes time and, on GPUs, memory."""
        assert self._root is not None, "the processes have not met: setup_environment comes first"
        if layout not in self._arranged:
            self._arranged[layout] = Meshes(layout, self._root)
        return self._arranged[layout]
