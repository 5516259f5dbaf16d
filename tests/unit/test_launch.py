"""What is in configs/launch, as far as it can be tried without a cluster, and what docs/launching.md says of it."""

import importlib.util
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from app.cli import COMMANDS, TRAINER_VERBS
from callbacks.safety import StopOnSignal

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "configs" / "launch"
DOCS = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_names_what_there_is() -> None:
    for name in re.findall(r"configs/launch/[\w.]+", DOCS):
        assert (ROOT / name).is_file(), name
    assert {path.name for path in LAUNCH.iterdir() if path.is_file()} == set(
        re.findall(r"configs/launch/([\w.]+)", DOCS)
    )
    for verb in re.findall(r"(?:growmoe|-m app) (\w+)", DOCS):
        assert verb in {**COMMANDS, **TRAINER_VERBS}, verb


def test_options_of_torchrun_exist() -> None:
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True)
    words = " ".join(re.findall(r"^torchrun (.*?) -m app", DOCS.replace("\\\n", " "), re.MULTILINE))
    assert "--master_addr" in words
    for option in re.findall(r"--[\w]+", words):
        assert option.replace("_", "-") in done.stdout or option in done.stdout, option


# -- Kubernetes --------------------------------------------------------------------------------------------------------


def test_kubernetes_manifest_agrees_with_itself() -> None:
    found = {d["kind"]: d for d in yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))}
    service, job = found["Service"], found["Job"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    options = dict(word.removeprefix("--").split("=", 1) for word in container["args"] if "=" in word)
    name = found["Job"]["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert pod["subdomain"] == service["metadata"]["name"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert variables["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert variables["MASTER_PORT"] == str(container["ports"][0]["containerPort"]) and "NODE_RANK" in variables
    nodes, gpus = {str(job["completions"]), str(job["parallelism"])}, container["resources"]["limits"]["nvidia.com/gpu"]
    assert nodes == {options["trainer.num_nodes"]} and str(gpus) == options["trainer.devices"]
    named = {r["onExitCodes"]["containerName"] for r in job["podFailurePolicy"]["rules"] if "onExitCodes" in r}
    assert named == {container["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (claim,) = (v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v)
    assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
    assert (ROOT / options["config"]).is_file() and options["ckpt_path"] == "auto"


# -- Slurm -------------------------------------------------------------------------------------------------------------


def slurm(tmp_path: Path, fit: str, number: int | None) -> tuple[int, str]:
    """Run the script with stand-ins for srun and scontrol; send a signal to it; its code, and what they were told."""
    log, bin_dir = tmp_path / "log", tmp_path / "bin"
    bin_dir.mkdir()
    programs = {
        "srun": f'echo "srun $*" >> {log}\ncase "$*" in *doctor*) exit 0;; esac\n{fit}',
        "scontrol": f'echo "scontrol $*" >> {log}',
    }
    for name, text in programs.items():
        (bin_dir / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_dir / name).chmod((bin_dir / name).stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    environment |= {"SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "2"}
    script = subprocess.Popen(["bash", str(LAUNCH / "slurm.sh"), "--config", "a b.yaml"], cwd=tmp_path, env=environment)
    if number is not None:
        deadline = time.monotonic() + 20
        while not (tmp_path / "trains").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        script.send_signal(number)
    return script.wait(timeout=30), log.read_text()


STOPS = "trap 'sleep 0.2; exit 143' TERM\ntouch trains\nfor i in $(seq 200); do sleep 0.05; done"


@pytest.mark.parametrize(
    ("fit", "number", "code", "requeues"),
    [
        (STOPS, signal.SIGUSR1, 143, True),
        (STOPS, signal.SIGTERM, 143, False),
        ("exit 0", None, 0, False),
        ("exit 2", None, 2, False),
        ("trap 'exit 0' TERM\ntouch trains\nfor i in $(seq 200); do sleep 0.05; done", signal.SIGUSR1, 0, False),
    ],
    ids=["time is over", "cancelled", "done", "wrong input", "done in time"],
)
def test_slurm_script(fit: str, number: int | None, code: int, requeues: bool, tmp_path: Path) -> None:
    found, log = slurm(tmp_path, fit, number)
    assert found == code and ("scontrol requeue 77" in log) == requeues, log
    assert "growmoe fit --config a b.yaml --ckpt_path auto --trainer.devices 8 --trainer.num_nodes 2" in log


def test_slurm_script_is_sound() -> None:
    text = (LAUNCH / "slurm.sh").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sh")], check=True)
    assert "#SBATCH --requeue" in text and re.search(r"#SBATCH --signal=B:USR1@\d+", text)


# -- Ray ---------------------------------------------------------------------------------------------------------------


class Recorded:
    """Stands for a class of Ray's: keeps its arguments."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.args, self.settings = args, settings


class FakeTrainer(Recorded):
    """Runs the function of each worker here, one after the other, with the variables that Ray sets."""

    def fit(self) -> None:
        count = self.settings["scaling_config"].settings["num_workers"]
        for rank in range(count):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "NODE_RANK": str(rank // 2)}
            os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": "2"}
            self.args[0](self.settings["train_loop_config"])


@pytest.fixture
def ray_train(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with stand-ins for the names of Ray that it uses."""
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # given back behind the test
    train, torch = ModuleType("ray.train"), ModuleType("ray.train.torch")
    train.FailureConfig = train.RunConfig = train.ScalingConfig = Recorded  # type: ignore[attr-defined]
    torch.TorchTrainer = FakeTrainer  # type: ignore[attr-defined]
    for name, module in {"ray": ModuleType("ray"), "ray.train": train, "ray.train.torch": torch}.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("ray_train", LAUNCH / "ray_train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ray_runs_the_command_line_on_each_worker(ray_train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("app.cli.main", lambda arguments: seen.append(arguments))
    monkeypatch.setattr(sys, "argv", ["ray_train.py", "--num_workers", "4", "fit", "--config", "a.yaml"])
    ray_train.launch()
    topology = ["--trainer.devices", "2", "--trainer.num_nodes", "2", "--ckpt_path", "auto"]
    assert seen == [["fit", "--config", "a.yaml", *topology]] * 4


def test_ray_hears_of_failures(ray_train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cli.main", lambda arguments: sys.exit(2))
    monkeypatch.setattr(sys, "argv", ["ray_train.py", "--num_workers", "2", "fit"])
    with pytest.raises(RuntimeError, match="ended with 2 on rank 0"):
        ray_train.launch()
    monkeypatch.setattr(sys, "argv", ["ray_train.py", "--num_workers", "3", "fit"])
    with pytest.raises(ValueError, match="not spread evenly"):
        ray_train.launch()


# -- signals -----------------------------------------------------------------------------------------------------------


def test_a_signal_while_processes_ask_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither lost nor acted upon by the one process that knows of it."""
    stopper, comes = StopOnSignal(), [True, False]

    def all_reduce(tensor: torch.Tensor, operation: object) -> None:
        if comes.pop(0):
            stopper._note(signal.SIGTERM, None)

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    trainer, module = SimpleNamespace(world_size=2), SimpleNamespace(device="cpu")
    try:
        assert not stopper._is_told(trainer, module) and stopper.received == signal.SIGTERM
        assert stopper._is_told(trainer, module)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
