"""The arms of the growth study: what each run begins with, how it grows, and what it is given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SOURCE = {"dim": 96, "num_layers": 2, "num_heads": 2}
TARGET = {"dim": 192, "num_layers": 4, "num_heads": 4}
MOE = {"num_experts": 8, "top_k": 2}
FINE_MOE = {"num_experts": 16, "top_k": 4, "expert_dim": 256}
METHODS: dict[str, dict[str, Any]] = {
    "fpi": {"preset": "fpi"},
    "iso": {"split_noise": 0.1},
    "aki_pro": {"preset": "aki_pro"},
    "sparkling": {"preset": "sparkling"},
}
"""`sparkling` has no noise: with another state than its own it is `iso` whose copies nothing parts."""
STATES = ("asymmetric", "mapped", "reset")
UPCYCLES: dict[str, dict[str, Any]] = {
    "copy": {"target": {"moe": MOE}, "upcycle": "copy"},
    "drop": {"target": {"moe": MOE}, "upcycle": "drop"},
    "virtual group": {"target": {"moe": FINE_MOE}, "preset": "virtual_group"},
}
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Plan:
    """Lengths that all arms share, in optimizer steps.

    Attributes:
        steps: of an arm from scratch.
        grow_at: where an arm that grows leaves its source.
        after: from there to its end.
        longer: of the small model that is trained as long as the large one in seconds, at least.
        decay: steps of the learning rate's decay at the end of every arm; before it the rate is constant.
        every: from one validation to the next.
        batch_size, seq_len: rows and tokens of a step.
    """

    steps: int = 1800
    grow_at: int = 900
    after: int = 1200
    longer: int = 3900
    decay: int = 180
    every: int = 30
    batch_size: int = 4
    seq_len: int = 256

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Arm:
    """One run: the architecture that it begins with, and what it is grown to, if anything."""

    name: str
    start: dict[str, Any]
    stage: dict[str, Any] | None = None
    source: str | None = None
    rival: str = "scratch"
    """the arm from scratch that it is compared with"""
    length: Literal["steps", "grown", "longer"] = "grown"
    """which of the plan's lengths it has"""

    @property
    def end(self) -> dict[str, Any]:
        """The architecture that it ends with."""
        return self.start if self.stage is None else {**self.start, **self.stage["target"]}

    def num_steps(self, plan: Plan) -> int:
        """Of the whole run, its source's part included."""
        return {"steps": plan.steps, "grown": plan.grow_at + plan.after, "longer": plan.longer}[self.length]

    def checkpoint(self, step: int, seed: int, folder: Path) -> Path:
        """Where its state after a step lies."""
        return self.folder(seed, folder) / "checkpoints" / f"step-{step:08d}"

    def folder(self, seed: int, folder: Path) -> Path:
        """Its run directory."""
        return folder / f"seed-{seed}" / self.name.replace(", ", "-").replace(" ", "-")


def all_arms() -> dict[str, Arm]:
    """By name; an arm's source comes before it, and what matters most comes first."""
    arms = [
        Arm("source, continued", SOURCE),
        Arm("scratch", TARGET, length="steps"),
        Arm("MoE, scratch", {**TARGET, "moe": MOE}, rival="MoE, scratch", length="steps"),
        Arm("source, longer", SOURCE, source="source, continued", length="longer"),
    ]
    for name, stage in UPCYCLES.items():
        arms.append(Arm(f"upcycle, {name}", TARGET, stage, "scratch", "MoE, scratch"))
    arms.append(Arm("dense, continued", TARGET, source="scratch", rival="MoE, scratch"))
    for state in STATES:
        for method, options in METHODS.items():
            stage = {"target": TARGET, **options, "optimizer_state": state}
            arms.append(Arm(f"{method}, {state}", SOURCE, stage, "source, continued"))
    return {arm.name: arm for arm in arms}


def configuration(arm: Arm, seed: int, plan: Plan, folder: Path, corpora: Path) -> dict[str, Any]:
    """What `growmoe fit` is given."""
    steps = arm.num_steps(plan)
    stages = [] if arm.stage is None else [{**arm.stage, "at_step": plan.grow_at, "seed": seed}]
    return {
        "seed_everything": seed,
        "trainer": {
            "max_steps": steps,
            "precision": "32-true",  # processors without bfloat16 instructions take fifty times as long in it
            "val_check_interval": plan.every,
            "log_every_n_steps": 10,
            "default_root_dir": str(arm.folder(seed, folder)),
        },
        "model": {
            "class_path": "modules.MoELM" if "moe" in arm.start else "modules.DenseLM",
            "init_args": {
                "architecture": arm.start,
                "optimizer": {"lr": LEARNING_RATE},
                "schedule": {"warmup_steps": plan.steps // 20, "decay_fraction": plan.decay / steps},
            },
        },
        "data": {
            "class_path": "datamodules.BilingualText",
            "init_args": {
                "root": str(corpora),
                "weights": {"en": 0.5, "zh": 0.5},
                "seq_len": plan.seq_len,
                "batch_size": plan.batch_size,
                "val_samples": 32,
                "seed": seed,
            },
        },
        "growth": {"stages": stages},
        "checkpoint": {"every_n_steps": plan.grow_at // 3, "keep_last": 3 if arm.source else 99},
        "evaluation": {"at_end": False, "at_transitions": False},
        "wandb": {"mode": "disabled"},
    }
