"""Lightning strategy for one or many devices: data, expert and tensor parallelism on FSDP2."""

import copy
import logging
from collections.abc import Mapping
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from app import checkpoint as store
from app.checkpoint_io import DirectoryCheckpointIO
from app.launcher import Launcher
from app.strategies.layout import Degree, Layout, resolve_layout
from app.strategies.parallelize import Gathers, Recomputation, Wrapping
from app.strategies.saving import PartSaver, Publish, split_checkpoint
from app.strategies.world import MeshWorld
from modules.config import ModelConfig
from modules.errors import InputError, require_positive
from modules.language_model import LanguageModel
from modules.world import fill

Checkpoints = Literal["async", "sync", "gathered"]


class ExpertParallelStrategy(ModelParallelStrategy):
    """Shares a model out over processes, experts by number, everything else by FSDP2; grows and resumes as one does.

    Processes = dp_replicate x dp_shard x tp. Training is that of one process with all samples: gradients are sums over
    processes, losses are divided by what all have together. Checkpoints fit any layout, and one process.

    Args:
        dp_replicate: copies of the model (HSDP).
        dp_shard: processes that share out each copy; `auto` takes all that the other degrees leave.
        ep: of these, how many share out experts; `auto` takes as many as divide both dp_shard and the experts, anew
            for each stage of growth.
        tp: processes that share out attention heads, feed-forward channels and vocabulary.
        activation_checkpointing: none, selective (attention is computed again) or full (only inputs of blocks stay).
        compile: compile attention and dense feed-forwards; not together with tp.
        reshard_after_forward: gather parameters again in the backward pass, rather than keep them.
        gathers: bfloat16: weights of attention, feed-forwards and experts are gathered in it: half of the bytes, and no
            casts are kept for the backward pass. For trainer.precision bf16-mixed, whose results it does not change.
        checkpoints: async: every process writes its part while training goes on; sync: ... while training waits;
            gathered: the first process collects all, and writes it in one file.
        process_group_backend: empty: nccl on GPUs, gloo on CPUs.
        timeout_minutes: how long processes wait for each other before they give up.
    """

    def __init__(
        self,
        dp_replicate: Degree = 1,
        dp_shard: Degree = "auto",
        ep: Degree = 1,
        tp: Degree = 1,
        activation_checkpointing: Recomputation = "none",
        compile: bool = False,
        reshard_after_forward: bool = True,
        gathers: Gathers = "float32",
        checkpoints: Checkpoints = "async",
        process_group_backend: str | None = None,
        timeout_minutes: int = 60,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.timeout_minutes = timeout_minutes
        self.degrees: dict[str, Degree] = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "ep": ep, "tp": tp}
        self.wrapping = Wrapping(activation_checkpointing, compile, reshard_after_forward, gathers)
        self.checkpoints = checkpoints
        self.saver: PartSaver | None = None

    def check(self) -> None:
        """Raise `InputError` for options that contradict each other or the number of processes.

        Compiled blocks under tensor parallelism trained to other weights (torch 2.13, docs/log.md).
        """
        require_positive(**{"strategy timeout_minutes": self.timeout_minutes})
        layout = self.layout_of()
        if self.wrapping.compile and layout.tp > 1:
            raise InputError(
                f"strategy compile=true with tp={layout.tp} trains to wrong weights; choose tp=1, or compile=false"
            )
        precision = self.precision_plugin.precision
        if self.wrapping.gathers == "bfloat16" and precision != "bf16-mixed":
            raise InputError(
                f"strategy gathers=bfloat16 is for products in bfloat16, and trainer.precision={precision} has others; "
                "set trainer.precision=bf16-mixed, or leave gathers out"
            )

    def layout_of(self, config: ModelConfig | None = None) -> Layout:
        """The layout of the processes at hand for a model; raises `InputError` where there is none."""
        layout = resolve_layout(self.world_size, **self.degrees, config=config)
        if config is not None:
            layout.check(config)
        return layout

    @cached_property
    def world(self) -> MeshWorld:
        """Who holds what."""
        return MeshWorld(self.layout_of, self.global_rank, self.wrapping)

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Let the processes meet."""
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self._setup_distributed()
        self.world.meet(self.root_device.type)
        if self.checkpoints != "gathered":
            self.saver = PartSaver(self.global_rank, timedelta(minutes=self.timeout_minutes), self.root_device)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which samples are this process's."""
        return {"num_replicas": self.world.data_ranks, "rank": self.world.data_rank}

    def pre_backward(self, closure_loss: Tensor) -> None:
        """While micro-batches accumulate, gradients stay where they are: they are summed over processes once a step."""
        loop = self._trainer_of_module.fit_loop.epoch_loop
        self._network.set_requires_gradient_sync(not loop._should_accumulate())

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning gives the state back by `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All weights: where they are, or gathered on the CPU of the first process."""
        assert self.lightning_module is not None
        self.world.settle(self._network)
        weights = self.lightning_module.state_dict()
        return self._gathered(weights) if self.saver is None else weights

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state: where it is, or gathered on the CPU of the first process."""
        saved = getattr(optimizer, "_optimizer", optimizer).state_dict()
        if self.saver is not None:
            return saved
        return {**saved, "state": {number: self._gathered(entries) for number, entries in saved["state"].items()}}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Begin to write a checkpoint; unless that is to happen in the background, wait until it is there."""
        if self.saver is None:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            return
        path = Path(filepath)
        tensors, state = split_checkpoint(checkpoint)
        self.saver.start(path, tensors, self._publisher(path, checkpoint, state))
        if self.checkpoints == "sync":
            self.saver.finish()

    def _publisher(self, path: Path, checkpoint: dict[str, Any], state: dict[str, Any]) -> Publish:
        """What completes a checkpoint: all of it as it is now."""
        if not self.is_global_zero:
            return lambda *parts: None
        assert isinstance(self.checkpoint_io, DirectoryCheckpointIO)
        rest = copy.deepcopy({"state": move_data_to_device(state, "cpu"), **self.checkpoint_io.describe(checkpoint)})
        return lambda aside, files, index: store.publish_parts(aside, path, files=files, index=index, **rest)

    def finish_saving(self) -> None:
        """Wait until the checkpoint that is being written is complete; raises where it could not be."""
        if self.saver is not None:
            self.saver.finish()

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint was begun that is not complete."""
        return self.saver is not None and self.saver.is_busy

    def teardown(self) -> None:
        """Leave when nothing is being written, also behind an error elsewhere."""
        if self.saver is not None:
            self.saver.close()
        super().teardown()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's part of all weights."""
        weights = {name.removeprefix("network."): tensor for name, tensor in checkpoint["state_dict"].items()}
        fill(self.world, self._network, weights.items())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of the optimizer's state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: self._shared_out(entries, parameters[number]) for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; of its tensors each process reads the part that it holds.

        Raises:
            InputError: processes have chosen different ones, as where a directory is not seen alike by all machines.
        """
        path = Path(checkpoint_path)
        chosen: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(chosen, (str(path), store.digest(path)))
        other = next((rank for rank, one in enumerate(chosen) if one[1] != chosen[0][1]), None)
        if other is not None:
            raise InputError(
                f"processes would continue from different checkpoints: rank 0 from {chosen[0][0]}, rank {other} from "
                f"{chosen[other][0]}; name one with --ckpt_path that all of them see"
            )
        return store.load_state(path, lazy=True)

    # -- parts ---------------------------------------------------------------------------------------------------------

    @property
    def _network(self) -> Any:
        module = self.lightning_module
        assert isinstance(module, LanguageModel) and isinstance(module.network, FSDPModule)
        return module.network

    @property
    def _trainer_of_module(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _gathered(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Entries with whole tensors, one after the other; every process takes part, the first keeps them."""
        gathered = {}
        for name, value in entries.items():
            whole = self.world.whole(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                gathered[name] = whole.detach().cpu() if isinstance(whole, Tensor) else whole
        return gathered

    def _shared_out(self, entries: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        return {
            name: self.world.part(value, parameter)
            if getattr(value, "shape", None) == parameter.shape and name != "step"
            else value
            for name, value in entries.items()
        }
