"""Real text, where it is: set GROWMOE_DATA to a folder with corpora/{en,zh}/*.parquet and tokenizer_16k.json."""

import os
from pathlib import Path

import pytest

from app.cli import main
from tests.end_to_end import runs

DATA = os.environ.get("GROWMOE_DATA")


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="GROWMOE_DATA is not set: no real corpora to prepare")
def test_prepare_and_train_on_real_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert DATA is not None
    corpora = Path(DATA) / "corpora"
    inputs = [f"en={corpora / 'en' / 'vue_docs.parquet'}", f"zh={corpora / 'zh' / 'vue_docs.parquet'}"]
    tokenizer = str(Path(DATA) / "tokenizer_16k.json")
    output = tmp_path / "corpora"
    options = ["--tokenizer", tokenizer, "--validation_fraction", "0.1", "--output", str(output)]
    main(["prepare", *inputs, *options])
    table = capsys.readouterr().out
    assert "bytes" in table
    rows_told = {tuple(line.replace("│", " ").split()[:3]) for line in table.splitlines()}
    assert {(name, name, split) for name in ("en", "zh") for split in ("train", "validation")} <= rows_told
    config = runs.settings(tmp_path / "run", tmp_path)
    config["trainer"] |= {"max_steps": 40, "val_check_interval": 20}
    config["growth"]["stages"] = [
        {"at_step": 15, "target": {"dim": 24, "num_heads": 3, "num_layers": 3}},
        {"at_step": 30, "target": {"moe": {"num_experts": 4, "top_k": 2, "every": 2}}},
    ]
    config["data"] = {
        "class_path": "datamodules.BilingualText",
        "init_args": {"root": str(output), "weights": {"en": 0.5, "zh": 0.5}, "seq_len": 64, "batch_size": 4},
    }
    rows = runs.metrics(runs.fit(config))
    assert all(
        float(rows[40][f"val/bpb_{language}"]) < float(rows[20][f"val/bpb_{language}"]) for language in ("en", "zh")
    )
