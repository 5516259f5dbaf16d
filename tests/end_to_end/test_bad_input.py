"""Wrong input ends with one line and exit code 2, and nothing is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from app.cli import main
from tests.end_to_end import runs

Change = Callable[[dict[str, Any]], None]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a verb that must be refused; returns its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model.architecture.dmi=16", "did you mean dim?"),
        ("--model.architecture.dim=-16", "dim=-16 must be at least 1"),
        ("--model.architecture.dim=abc", "architecture.dim: Expected a <class 'int'>. Got value: abc"),
        ("--model.architecture.num_heads=3", "dim=16 is not divisible by num_heads=3"),
        ("--model.architecture.moe={num_experts: 4, top_k: 5}", "top_k=5 is more than num_experts=4"),
        ("--model.architecture.vocab_size=600", "vocab_size=600 is not the 512 of the data's tokenizer"),
        ("--model.architecture.moe={num_experts: 4}", "DenseLM got moe"),
        ("--model.architecture.moe={rooter: {kind: gshard}}", "did you mean router?"),
        ("--model.architecture.moe={router: {kind: gshard}}", "router.kind=gshard without capacity"),
        ("--model.architecture.moe={router: {kind: top2}}", "router.kind"),
        ("--model.architecture.moe={capacity: {factor: 0}}", "capacity.factor=0.0 must be a finite number above 0"),
        ("--model.architecture.norm_structure=sandwich", "norm_structure"),
        ("--expert_load.warn_dead_fraction=2", "expert_load.warn_dead_fraction=2"),
        ("--model.optimizer.lr=nan", "optimizer.lr: Expected a <class 'float'>. Got value: nan"),
        ("--model.optimizer.lr=-1", "lr=-1.0 must be a finite number above 0"),
        ("--model.schedule.warmup_steps=16", "warmup_steps=16 is not below the run's 16 steps"),
        ("--model=modules.NoSuchLM", "model: module 'modules' has no attribute 'NoSuchLM'"),
        ("--data.bach_size=3", "did you mean batch_size?"),
        ("--trainer.max_steps=-1", "trainer.max_steps=-1"),
        ("--trainer.no_such_option=1", "no_such_option"),
        ("--trainer.gradient_clip_algorithm=value", "gradient_clip_algorithm"),
        ("--data.batch_size=0", "batch_size=0"),
        ("--data.seq_len=4096", "seq_len=4096 is more than the model's max_seq_len=2048"),
        ("--checkpoint.every_n_steps=0", "checkpoint.every_n_steps=0"),
        ("--checkpoint.keep_last=1", "checkpoint.keep_last=1 must be at least 2"),
        ("--trainer.limit_train_batches=2", "trainer.limit_train_batches=2 is not offered"),
        ("--trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0 must be at least 1"),
        ("--trainer.precision=16-true", "has float16"),
        ("--trainer.enable_checkpointing=false", "trainer.enable_checkpointing=False is not offered"),
        ("--trainer.fast_dev_run=true", "trainer.fast_dev_run=True is not offered"),
        ("--console.every_n_logs=0", "console.every_n_logs=0"),
        ("--evaluation.max_batch_tokens=0", "evaluation.max_batch_tokens=0"),
        ("--ckpt_path=no/such/place", "is not a checkpoint"),
        ("--config=no_such_file.yaml", "no_such_file.yaml"),
    ],
)
def test_flags(flag: str, words: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = runs.settings(tmp_path / "run", world)
    config["growth"]["stages"] = None
    path = runs.write(config, tmp_path / "config.yaml")
    line = refused(capsys, "fit", "--config", str(path), flag)
    assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("ddp", "trainer.strategy=DDPStrategy does not train 2 processes as one"),
        ({"ep": 3}, "ep=3 does not divide dp_shard=2"),
        ({"dp_shard": 3}, "no factorisation of 2 processes; for example dp_shard=2, tp=1; dp_shard=1, tp=2"),
        ({"tp": 2, "compile": True}, "compile=true with tp=2"),
        ({"timeout_minutes": 0}, "timeout_minutes=0 must be at least 1"),
        ({"dp_shards": 2}, "did you mean dp_shard?"),
        ({"activation_checkpointing": "half"}, "'selective', 'full'"),
        ({"ep": 2}, "ep=2 does not divide num_experts=3"),  # of the second stage
        ({"tp": 2}, "tp=2 does not divide num_heads=3"),
    ],
    ids=str,
)
def test_layouts(strategy: Any, words: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All stages are checked, before processes are started."""
    if isinstance(strategy, dict):
        strategy = {"class_path": "app.strategies.ExpertParallelStrategy", "init_args": strategy}
    config = runs.settings(tmp_path / "run", world, devices=2, strategy=strategy)
    config["growth"]["stages"][1]["target"]["moe"] = {"num_experts": 3, "top_k": 1}
    line = refused(capsys, "fit", "--config", str(runs.write(config, tmp_path / "config.yaml")))
    assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            [{"at_step": 4, "target": {"dim": 8}}],
            "growth stage 1: growth target dim=8 is smaller than its source's dim=16",
        ),
        ([{"at_step": 16, "target": {"dim": 24, "num_heads": 3}}], "at_step=16 (step 16) is not below"),
        ([{"target": {"dim": 24}}], "stage 1 does not say when it is due"),
        ([{"at_tokens": 10**9, "target": {"num_layers": 3}}], "at_tokens=1000000000 (step 7812500) is not below"),
        (
            [{"at_step": 4, "target": {"num_layers": 3}, "split_noise": ".inf"}],
            "split_noise=inf must be a finite number",
        ),
        (
            [{"at_step": 9, "target": {"num_layers": 3}}, {"at_step": 5, "target": {"num_layers": 4}}],
            "stages must come in order",
        ),
        (
            [
                {"at_step": 4, "target": {"num_layers": 3}},
                {"at_step": 8, "target": {"moe": {"num_experts": 2, "top_k": 3}}},
            ],
            "top_k=3 is more than num_experts=2",
        ),
        ([{"at_step": 4, "target": {"dimm": 24}}], "dimm"),
        (
            [{"at_step": 4, "target": {"moe": {"num_experts": 2, "capacity": {"group_size": 48}}}, "upcycle": "copy"}],
            "capacity.group_size=48 does not divide the 128 tokens of a micro-batch",
        ),
        (
            [{"at_step": 4, "target": {"moe": {"num_experts": 2, "num_shared_experts": 1}}}],
            "hidden neurons that the feed-forward's 48 leave beside shared_size=48",
        ),
    ],
)
def test_recipes(
    stages: list[Any], words: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.settings(tmp_path / "run", world)
    config["growth"]["stages"] = stages
    path = runs.write(config, tmp_path / "config.yaml")
    assert words in refused(capsys, "fit", "--config", str(path))
    assert not (tmp_path / "run").exists()


def test_a_used_run_directory_is_left_alone(
    grown_run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in grown_run.rglob("*")}
    path = runs.write(runs.settings(grown_run, world), tmp_path / "config.yaml")
    assert "already holds a run" in refused(capsys, "fit", "--config", str(path))
    assert {path: path.stat().st_mtime_ns for path in grown_run.rglob("*")} == before


def test_checkpoint_of_another_architecture(
    grown_run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(grown_run / "checkpoints" / "step-00000016")
    path = runs.write(runs.settings(tmp_path / "run", world), tmp_path / "config.yaml")
    line = refused(capsys, "fit", "--config", str(path), "--model.architecture.num_layers=5", "--ckpt_path", checkpoint)
    assert "num_layers 2 / 5" in line
    assert not (tmp_path / "run").exists()


def test_recipe_that_differs_from_what_was_applied(
    grown_run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.settings(tmp_path / "run", world)
    config["growth"]["stages"] = [{**runs.RECIPE[0], "at_step": 7}, runs.RECIPE[1]]
    path = runs.write(config, tmp_path / "config.yaml")
    checkpoint = str(grown_run / "checkpoints" / "step-00000006-stage-1")
    assert "has gone through the transitions" in refused(
        capsys, "fit", "--config", str(path), "--ckpt_path", checkpoint
    )


def test_damaged_checkpoint(grown_run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "step-00000003"
    shutil.copytree(grown_run / "checkpoints" / "step-00000003", copy)
    (copy / "state.pt").write_bytes((copy / "state.pt").read_bytes()[:-10])
    path = runs.write(runs.settings(tmp_path / "run", world), tmp_path / "config.yaml")
    assert "is damaged: state.pt has" in refused(capsys, "fit", "--config", str(path), "--ckpt_path", str(copy))


def bilingual(tmp_path: Path, world: Path) -> dict[str, Any]:
    """The world's prepared folder, used as a corpus of its own."""
    source = next(path for path in world.iterdir() if (path / "manifest.json").is_file())
    shutil.copytree(source, tmp_path / "corpus")
    config = runs.settings(tmp_path / "run", world)
    config["growth"]["stages"] = None
    config["data"] = {
        "class_path": "datamodules.BilingualText",
        "init_args": {"root": str(tmp_path / "corpus"), "seq_len": 32, "batch_size": 4},
    }
    return config


def test_token_beyond_the_vocabulary(
    grown_run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = bilingual(tmp_path, world)
    shard = next((tmp_path / "corpus" / "en" / "train").glob("*.arrow"))
    with pa.ipc.open_stream(shard.read_bytes()) as reader:
        ids = reader.read_all().column(0).chunk(0).values.to_numpy(zero_copy_only=False)
    content = shard.read_bytes()
    place = content.index(ids[:8].tobytes())
    shard.write_bytes(content[:place] + np.uint16(60000).tobytes() + content[place + 2 :])
    line = refused(capsys, "fit", "--config", str(runs.write(config, tmp_path / "config.yaml")))
    assert "token id 60000 >= vocabulary 512" in line and shard.name in line
    assert not (tmp_path / "run").exists()


def test_empty_corpus(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    line = refused(
        capsys,
        "prepare",
        f"en={tmp_path / 'empty.txt'}",
        "--train_tokenizer",
        "512",
        "--output",
        str(tmp_path / "out"),
    )
    assert "empty" in line or "no document" in line
    assert not (tmp_path / "out").exists()


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean validate" in refused(capsys, "valdate")
