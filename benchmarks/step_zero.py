"""The validation loss right behind a growth, by method: does it have the order that AquilaMoE reports?

    python -m benchmarks.step_zero CHECKPOINT --config FIT_YAML [--config ...] [--ratio 2.0] [--layers 12]

from the root of the repository, on a trained dense checkpoint and the configuration (data, trainer) of its run. Each
method is a recipe of one stage for `growmoe grow`, and its loss is what `growmoe validate --model.start_from` prints:
AquilaMoE (arXiv 2408.06567) has random > AKI + stack > AKI-Pro > FPI + stack > FPI + interpolation > FPI in width only,
which for a whole ratio is the source. The last line says whether that order was found.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from app.checkpoint import read_metadata, read_tokenizer_json, write_checkpoint
from modules.config import ModelConfig
from modules.layers.transformer import Transformer
from modules.weights import Weights

ROOT = Path(__file__).resolve().parents[1]
METHODS: dict[str, dict[str, Any]] = {
    "AKI + stack": {"preset": "aki"},
    "AKI-Pro": {"preset": "aki_pro"},
    "FPI + stack": {"preset": "fpi"},
    "FPI + interpolation": {"width": "fpi", "depth": "interpolate"},
    "FPI, width alone": {"width": "fpi"},
    "iso, width alone": {"width": "iso"},
    "iso + zero blocks": {"width": "iso", "depth": "zero_block"},
}
ORDER = ("random", "AKI + stack", "AKI-Pro", "FPI + stack", "FPI + interpolation", "FPI, width alone")
WIDTH_ALONE = ("FPI, width alone", "iso, width alone")


def growmoe(*arguments: str) -> str:
    """Run a verb; returns what it printed."""
    done = subprocess.run([sys.executable, "-m", "app", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def validation_loss(configs: list[str], *model: str) -> float:
    """Nats per token over all languages."""
    flags = [word for config in configs for word in ("--config", config)]
    lines = growmoe("validate", *flags, *model).splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("val/loss")))


def write_random(source: Path, grown: Path, output: Path) -> None:
    """A checkpoint of the grown model's shape with fresh weights, and the source's tokenizer."""
    metadata = read_metadata(grown)
    torch.manual_seed(0)
    network = Transformer(ModelConfig.from_dict(metadata["architecture"]))
    tokenizer_json = read_tokenizer_json(source)
    write_checkpoint(output, weights=Weights.of(network.state_dict()), metadata=metadata, tokenizer_json=tokenizer_json)


def target(source: dict[str, Any], ratio: float, layers: int | None) -> dict[str, int]:
    """The larger architecture; heads keep their channels."""
    heads = source["num_heads"]
    grown_heads = round(heads * ratio)
    ffn = source["ffn_dim"] or -(-source["dim"] // 3) * 8
    sizes = {
        "dim": source["dim"] // heads * grown_heads,
        "num_heads": grown_heads,
        "ffn_dim": round(ffn * ratio / 8) * 8,
    }
    if source["num_kv_heads"]:
        sizes["num_kv_heads"] = source["num_kv_heads"]
    return sizes | ({"num_layers": layers} if layers else {})


def main() -> None:
    """Grow by each method, and measure."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("checkpoint", type=Path)
    about_data = "for `growmoe validate`: the data, without model.architecture"
    flags.add_argument("--config", action="append", required=True, help=about_data)
    flags.add_argument("--ratio", type=float, default=2.0, help="of the widths")
    flags.add_argument("--layers", type=int, default=12)
    given = flags.parse_args()
    source = json.loads((given.checkpoint / "manifest.json").read_text())["metadata"]["architecture"]
    losses = {"source": validation_loss(given.config, "--model.start_from", str(given.checkpoint))}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in METHODS.items():
            wanted = target(source, given.ratio, None if name in WIDTH_ALONE else given.layers)
            recipe, grown = Path(folder) / "recipe.yaml", Path(folder) / name.replace(" ", "-")
            recipe.write_text(yaml.safe_dump({"growth": {"stages": [{"target": wanted, **options}]}}))
            print(growmoe("grow", str(given.checkpoint), "--config", str(recipe), "--output", str(grown)), end="")
            losses[name] = validation_loss(given.config, "--model.start_from", str(grown))
        write_random(given.checkpoint, grown, Path(folder) / "random")
        losses["random"] = validation_loss(given.config, "--model.start_from", str(Path(folder) / "random"))
    print("\n| method | validation loss, nats per token |\n|---|---|")
    for name, loss in sorted(losses.items(), key=lambda item: -item[1]):
        print(f"| {name} | {loss:.4f} |")
    found = [losses[name] for name in ORDER]
    print(f"order of the paper: {'found' if found == sorted(found, reverse=True) else 'not found'}")


if __name__ == "__main__":
    main()
