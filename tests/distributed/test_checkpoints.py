"""Checkpoints in parts: any layout reads any other's bit for bit, nothing half-written counts, and readers of whole
checkpoints read them too."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from app import checkpoint as store
from app.checkpoint_folder import list_checkpoints, newest_valid
from app.checkpoint_parts import INDEX, MOMENTS, PartedTensors
from app.cli import main
from app.strategies import saving
from app.strategies.layout import Layout
from app.strategies.saving import PartSaver
from modules.errors import InputError
from modules.optim import build_optimizer
from modules.world import fill
from tests.distributed.ranks import together
from tests.distributed.test_growing import assert_same, fit, settings
from tests.distributed.test_sharing import SEVEN, UNEVEN, are_equal
from tests.distributed.training import gather, module_in, train, world_in
from tests.end_to_end.runs import write

PATIENCE = timedelta(seconds=60)
ARCHITECTURE = {"architecture": {}}


def publish_as(path: Path) -> Any:
    """What completes a checkpoint of tensors alone."""

    def publish(aside: Path, files: dict[str, Any], index: Any) -> None:
        rest = {"metadata": ARCHITECTURE, "state": {}, "tokenizer_json": "{}"}
        store.publish_parts(aside, path, files=files, index=index, **rest)

    return publish


def tensors_of(network: Any, optimizer: Any) -> dict[str, Tensor]:
    """Weights and moments, as each process holds them."""
    tensors = dict(network.state_dict())
    for name, parameter in network.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"{MOMENTS}{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return tensors


def save(saver: PartSaver, path: Path, network: Any, optimizer: Any) -> None:
    """Begin to write weights and moments."""
    saver.start(path, tensors_of(network, optimizer), publish_as(path))


# -- every layout to every other ---------------------------------------------------------------------------------------


def by_disk(folder: Path) -> None:
    """Save in each layout, and read in each other: count the pairs that are equal."""
    dist.init_process_group("gloo")
    saver, pairs = PartSaver(dist.get_rank(), PATIENCE), 0
    for number, layout in enumerate(SEVEN):
        path = folder / f"step-{number:08d}"
        before = train(world_in(layout), UNEVEN, partial(save, saver, path))
        saver.finish()
        dist.barrier()
        stored: dict[str, Any] = dict(PartedTensors(path).tensors)
        for other in SEVEN:
            world = world_in(other)
            network: Any = module_in(world, UNEVEN).network
            fill(world, network, [(n, t) for n, t in stored.items() if not n.startswith(MOMENTS)])
            optimizer = build_optimizer(network, UNEVEN.optimizer, {}, world)
            for name, parameter in network.named_parameters():
                moments = {key: stored[f"{MOMENTS}{name}.{key}"] for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {key: world.part(value, parameter) for key, value in moments.items()}
                optimizer.state[parameter]["step"] = before.state[name]["step"]
            pairs += are_equal(before, gather(world, network, optimizer, [], []))
        if dist.get_rank() == 0:
            whole = store.open_weights(path)
            assert all(torch.equal(whole.read(name), weight) for name, weight in before.weights.items())
            assert_stock_reader_agrees(path, stored)
    if dist.get_rank() == 0:
        (folder / "pairs").write_text(str(pairs))
    saver.close()
    dist.destroy_process_group()


def assert_stock_reader_agrees(path: Path, stored: dict[str, Any]) -> None:
    """Torch's own reader of such files."""
    found = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in stored.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    assert all(torch.equal(found[name], tensor.whole()) for name, tensor in stored.items())


def test_forty_nine_pairs_of_layouts_hand_over_by_the_disk(tmp_path: Path) -> None:
    together(4, tmp_path / "ranks", by_disk, tmp_path)
    assert int((tmp_path / "pairs").read_text()) == 49


# -- in the background -------------------------------------------------------------------------------------------------


def slow_or_broken(folder: Path) -> None:
    """A save whose writer is slow, while values change; then one whose writer fails on the second process."""
    dist.init_process_group("gloo")
    rank, write = dist.get_rank(), HuggingFaceStorageWriter.write_data
    saver = PartSaver(rank, PATIENCE)
    network: Any = module_in(world_in(Layout(1, 2)), UNEVEN).network
    before = {name: tensor.full_tensor().clone() for name, tensor in network.state_dict().items()}

    def slowly(*arguments: Any) -> Any:
        time.sleep(1)
        return write(*arguments)

    def not_at_all(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    good, bad = folder / "step-00000001", folder / "step-00000002"
    with patch.object(HuggingFaceStorageWriter, "write_data", slowly):
        saver.start(good, network.state_dict(), publish_as(good))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.to_local().fill_(7.0)
        assert saver.is_busy and not good.exists()
        saver.finish()
    assert not saver.is_busy
    weights = PartedTensors(good).tensors
    assert all(torch.equal(weights[name].whole(), tensor) for name, tensor in before.items())

    with patch.object(HuggingFaceStorageWriter, "write_data", not_at_all if rank else write):
        saver.start(bad, network.state_dict(), publish_as(bad))
        with pytest.raises(OSError, match="No space left on device"):
            saver.finish()
    assert not bad.exists()
    dist.barrier()
    assert [path.name for path in folder.glob("step-*")] == ["step-00000001"]
    store.verify(good)
    saver.close()
    dist.destroy_process_group()


def test_a_save_keeps_its_values_and_a_failure_reaches_every_process(tmp_path: Path) -> None:
    together(2, tmp_path / "ranks", slow_or_broken, tmp_path)


def apart(folder: Path) -> None:
    """Processes whose storage is not the same: the second one sees none of the directories of the first."""
    dist.init_process_group("gloo")
    rank, seen = dist.get_rank(), Path.is_dir
    saver = PartSaver(rank, PATIENCE)
    tensors = module_in(world_in(Layout(1, 2)), UNEVEN).network.state_dict()
    path = folder / "step-00000001"
    with (
        patch.object(Path, "is_dir", lambda self: False if rank and ".tmp-" in self.name else seen(self)),
        pytest.raises(OSError, match=r"process 1: .* storage that their machines share"),
    ):
        saver.start(path, tensors, publish_as(path))
    saver.start(path, tensors, publish_as(path))
    saver.finish()
    with pytest.raises(OSError, match="exists already"):
        saver.start(path, tensors, publish_as(path))
    saver.close()
    dist.destroy_process_group()


def test_storage_that_is_not_shared_and_names_that_are_taken_are_refused(tmp_path: Path) -> None:
    together(2, tmp_path / "ranks", apart, tmp_path)
    (path,) = tmp_path.glob("step-*")
    store.verify(path)


def test_parts_that_the_first_process_does_not_see_are_never_published(tmp_path: Path) -> None:
    aside, path = tmp_path / "step-00000001.tmp-01234567", tmp_path / "step-00000001"
    aside.mkdir()
    (aside / "shard-1").write_bytes(b"1234")
    for files in ({"shard-2": {"bytes": 4, "sha256": ""}}, {"shard-1": {"bytes": 5, "sha256": ""}}):
        with pytest.raises(OSError, match="the first process sees"):
            publish_as(path)(aside, files, {})
    assert not path.exists()


def test_files_are_of_a_limited_size(tmp_path: Path) -> None:
    names = [f"w{number}" for number in range(5)] + [f"{MOMENTS}w{number}.exp_avg" for number in range(5)]
    tensors = {name: torch.zeros(10) for name in names}
    with patch.object(saving, "FILE_BYTES", 100):  # two tensors of 40 bytes
        numbers = saving._numbers_of_files(tensors)
    assert list(numbers.values()) == [1, 1, 2, 2, 3, 4, 4, 5, 5, 6]
    assert set(saving._numbers_of_files(tensors).values()) == {1, 2}


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same growing run on two processes, with its checkpoints in parts and gathered."""
    found = {}
    for kind in ("async", "gathered"):
        config = settings(tmp_path_factory.mktemp(kind) / "run", world, 2, 2, dp_shard=2, ep="auto", checkpoints=kind)
        config["checkpoint"] = {"every_n_steps": 3, "keep_last": 2}
        found[kind] = fit(config, 2)
    return found


def test_checkpoints_in_parts_hold_what_gathered_ones_hold(runs: dict[str, Path]) -> None:
    folders = {kind: run / "checkpoints" for kind, run in runs.items()}
    names = {kind: [path.name for path in list_checkpoints(folder)] for kind, folder in folders.items()}
    assert names["async"] == names["gathered"]
    assert [name for name in names["async"] if "stage" not in name] == ["step-00000012", "step-00000014"]
    for name in names["async"]:
        parted, whole = (store.load_state(folders[kind] / name) for kind in ("async", "gathered"))
        assert (folders["async"] / name / INDEX).is_file() and not (folders["gathered"] / name / INDEX).is_file()
        assert all(torch.equal(parted["state_dict"][key], tensor) for key, tensor in whole["state_dict"].items())
        states = [state["optimizer_states"][0]["state"] for state in (parted, whole)]
        for number, entries in states[1].items():
            assert entries.keys() == states[0][number].keys()
            for key, value in entries.items():
                other = states[0][number][key]
                assert torch.equal(other, value) if isinstance(value, Tensor) else other == value
    manifests = [json.loads((folder / names["async"][-1] / store.MANIFEST).read_text()) for folder in folders.values()]
    for key in ("step", "tokens", "stage", "architecture", "data_position", "factors"):
        assert manifests[0]["metadata"][key] == manifests[1]["metadata"][key]


def test_a_checkpoint_in_parts_is_exported_and_goes_on_alone(
    runs: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    exported = {}
    for kind, run in runs.items():
        main(["export", str(run / "checkpoints" / "step-00000014"), "--output", str(tmp_path / kind)])
        exported[kind] = (tmp_path / kind / "model.safetensors").read_bytes()
    assert exported["async"] == exported["gathered"]
    start = str(runs["async"] / "checkpoints" / "step-00000012")
    assert_same(runs["async"], fit(settings(tmp_path / "alone", world), 1, "--ckpt_path", start))


def test_damage_to_any_file_is_found(runs: dict[str, Path]) -> None:
    path = runs["async"] / "checkpoints" / "step-00000012"
    files = sorted(file for file in path.iterdir() if file.name != store.MANIFEST)
    assert len(files) == 7
    for file in files:
        content = file.read_bytes()
        for torn in (content[:-1], bytes([content[0] ^ 1]) + content[1:]):
            file.write_bytes(torn)
            with pytest.raises(InputError, match=f"damaged: {file.name}"):
                store.load_state(path)
        file.write_bytes(content)
    store.verify(path)
    manifest = path / store.MANIFEST
    text = manifest.read_text()
    files = json.loads(text)["files"]
    part = next(name for name in files if name.startswith("shard-00002"))
    manifest.write_text(json.dumps(json.loads(text) | {"files": {k: v for k, v in files.items() if k != part}}))
    newest, _ = newest_valid(path.parent)
    assert newest != path and newest is not None
    with pytest.raises(InputError, match=f"{part} is missing"):
        store.verify(path)
    manifest.write_text(text)


@pytest.mark.slow
def test_killed_again_and_again_it_loses_nothing(world: Path, tmp_path: Path) -> None:
    """Both processes, soon after a save begins: every committed checkpoint is sound, and the end is the same."""
    config = settings(tmp_path / "run", world, 2, 2, dp_shard=2, ep="auto")
    config["checkpoint"] = {"every_n_steps": 1, "keep_last": 2}
    undisturbed = settings(tmp_path / "undisturbed", world, 2, 2, dp_shard=2, ep="auto")
    folder, instants = tmp_path / "run" / "checkpoints", random.Random(5)
    file = write(config, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "app", "fit", "--config", str(file), "--ckpt_path", "auto"]
    kills = 0
    for _ in range(30):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        seen = set(folder.glob("*")) if folder.is_dir() else set()
        while process.poll() is None and len(set(folder.glob("*")) - seen) < 3:
            time.sleep(0.01)
        time.sleep(instants.uniform(0, 0.3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
        for path in list_checkpoints(folder):
            store.verify(path)
    assert process.returncode == 0 and kills >= 3
    assert_same(fit(undisturbed, 2), tmp_path / "run")
