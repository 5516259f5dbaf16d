"""A worker as Ray runs it: the processes have met, and the function of configs/launch/ray_train.py runs in a thread."""

import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist


def load_script() -> Any:
    """configs/launch/ray_train.py, without Ray."""
    train, torch = ModuleType("ray.train"), ModuleType("ray.train.torch")
    train.FailureConfig = train.RunConfig = train.ScalingConfig = object  # type: ignore[attr-defined]
    torch.TorchTrainer = object  # type: ignore[attr-defined]
    sys.modules |= {"ray": ModuleType("ray"), "ray.train": train, "ray.train.torch": torch}
    path = Path(__file__).resolve().parents[2] / "configs" / "launch" / "ray_train.py"
    spec = importlib.util.spec_from_file_location("ray_train", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Leave with 1 where the function raises."""
    finished = []

    def work() -> None:
        load_script().train({"arguments": sys.argv[1:]})
        finished.append(True)

    dist.init_process_group("gloo")
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    dist.barrier()  # the group is still Ray's
    dist.destroy_process_group()
    sys.exit(0 if finished else 1)


if __name__ == "__main__":
    main()
