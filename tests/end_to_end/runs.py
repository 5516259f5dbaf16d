"""Whole runs through the command line, in this process, on a world of a few people."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import yaml

from app.cli import main

RECIPE = [
    {"at_step": 6, "target": {"dim": 24, "num_heads": 3, "num_layers": 3}, "split_noise": 0.1},
    {"at_step": 12, "target": {"moe": {"num_experts": 4, "top_k": 2, "every": 2}}, "upcycle": "drop"},
]


def settings(run_dir: Path, world: Path, **trainer: Any) -> dict[str, Any]:
    """A configuration that grows from 2 layers of 16 to a mixture in 16 steps."""
    return {
        "trainer": {
            "max_steps": 16,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "val_check_interval": 4,
            "default_root_dir": str(run_dir),
            **trainer,
        },
        "model": {
            "class_path": "modules.DenseLM",
            "init_args": {
                "architecture": {"dim": 16, "num_layers": 2, "num_heads": 2},
                "optimizer": {"lr": 0.01},
                "schedule": {"warmup_steps": 2},
            },
        },
        "data": {
            "class_path": "datamodules.SyntheticWorld",
            "init_args": {
                "root": str(world),
                "num_people": 32,
                "num_documents": 200,
                "vocab_size": 512,
                "seq_len": 32,
                "batch_size": 4,
                "val_samples": 4,
            },
        },
        "growth": {"stages": copy.deepcopy(RECIPE)},
        "evaluation": {"at_end": False, "at_transitions": False},
        "checkpoint": {"every_n_steps": 5, "keep_last": 2},
        "wandb": {"mode": "disabled"},
    }


def write(config: dict[str, Any], path: Path) -> Path:
    """Write a configuration as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def fit(config: dict[str, Any], *arguments: str) -> Path:
    """Run `growmoe fit`; returns the run directory."""
    run_dir = Path(config["trainer"]["default_root_dir"])
    main(["fit", "--config", str(write(config, run_dir.with_suffix(".yaml"))), *arguments])
    return run_dir


def metrics(run_dir: Path) -> dict[int, dict[str, str]]:
    """The rows of metrics.csv by step, as text: equal text is equal bits."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return {int(row.pop("step")): row for row in csv.DictReader(file)}


def losses(run_dir: Path) -> dict[int, str]:
    """Training losses by step."""
    return {step: row["train/loss"] for step, row in metrics(run_dir).items() if row.get("train/loss")}


def transitions(run_dir: Path) -> list[dict[str, Any]]:
    """The records of transitions.jsonl."""
    return [json.loads(line) for line in (run_dir / "transitions.jsonl").read_text().splitlines()]
