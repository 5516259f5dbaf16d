"""`growmoe measure` on several processes: the parts of a step, what is communicated among them."""

import json
from pathlib import Path

import pytest

from app.cli import main
from tests.distributed.ranks import together
from tests.end_to_end.runs import settings, write


def measure(config: str, output: str) -> None:
    """One process of several."""
    words = ["--measure.warmup", "1", "--measure.steps", "2", "--measure.parts", "1"]
    main(["measure", "--config", config, "--output", output, *words])


@pytest.mark.parametrize("strategy", [{"dp_shard": 2}, {"dp_shard": 2, "ep": 2}, {"dp_shard": 1, "tp": 2}])
def test_communication_is_a_part_of_a_step(strategy: dict[str, int], tmp_path: Path, world: Path) -> None:
    config = settings(tmp_path / "run", world)
    config["data"]["init_args"]["num_workers"] = 0
    config["trainer"]["devices"] = 2
    config["trainer"]["strategy"] = {
        "class_path": "app.strategies.ExpertParallelStrategy",
        "init_args": {**strategy, "process_group_backend": "gloo"},
    }
    config["growth"] = {"stages": [{"at_step": 6, "target": {"moe": {"num_experts": 4, "top_k": 2, "every": 2}}}]}
    path = write(config, tmp_path / "measure.yaml")
    together(2, tmp_path / "ranks", measure, str(path), str(tmp_path / "measured.json"))
    record = json.loads((tmp_path / "measured.json").read_text())
    assert record["machine"]["devices"] == 2
    assert f"dp_shard {strategy['dp_shard']}" in record["layout"]
    assert record["tokens_per_step"] == 4 * 32 * strategy["dp_shard"]
    for stage in record["stages"]:
        parts = stage["parts_s"]
        assert sum(parts.values()) == pytest.approx(stage["step_s"], rel=1e-6)
        assert parts["communication"] > 0 and parts["attention"] > 0 and parts["optimizer"] > 0
    assert record["stages"][1]["parts_s"]["expert products"] > 0
