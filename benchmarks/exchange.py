"""A model of the size people bring: import, widen to a ratio that is no integer, upcycle, export; memory and seconds.

    python -m benchmarks.exchange --folder BIG_DISK [--dtype bfloat16] [--layers 22]

from the root of the repository. Makes a Llama-shaped model of random weights (1.1 billion parameters unless told
otherwise) in the folder, runs the four commands as a user would, and prints for each its seconds, the largest memory
of the process (anonymous, which must fit; resident, with the pages of mapped files, which the system may drop), and
what it printed. The folder needs about 45 GB in bfloat16; what a step leaves is deleted when the next has read it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from modules.weights import Spec, Weights, write_safetensors

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
RECIPE = """growth:
  stages:
    - target: {dim: 2560, num_heads: 40, ffn_dim: 7040}
    - target: {moe: {num_experts: 8, top_k: 2}}
      upcycle: copy
"""


def make_llama(folder: Path, layers: int, dtype: torch.dtype) -> None:
    """A directory as transformers would save it: TinyLlama's widths, weights from N(0, 0.02), gains near 1."""
    dim, heads, kv_heads, ffn, vocabulary = 2048, 32, 4, 5632, 32000
    shapes = {"model.embed_tokens.weight": (vocabulary, dim), "lm_head.weight": (vocabulary, dim)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (dim, dim) for p in "qo"}
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (dim // heads * kv_heads, dim) for p in "kv"}
        shapes |= {f"{name}.mlp.{p}_proj.weight": (ffn, dim) for p in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj.weight": (dim, ffn)}
        shapes |= {f"{name}.{p}_layernorm.weight": (dim,) for p in ("input", "post_attention")}
    shapes["model.norm.weight"] = (dim,)
    torch.manual_seed(0)

    def draw(name: str) -> Tensor:
        shape = shapes[name]
        drawn = torch.randn(shape) * 0.02 if len(shape) == 2 else 1 + 0.1 * torch.randn(shape)
        return drawn.to(dtype)

    folder.mkdir(parents=True)
    specs = {name: Spec(dtype, shape) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", Weights(specs, draw), {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))


def watched(*arguments: str) -> None:
    """Run one command of growmoe, and print what it took."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "app", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = {"RssAnon": 0, "VmRSS": 0}
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    seconds = time.perf_counter() - start
    print(f"growmoe {arguments[0]}: {seconds:.0f} s, peak {peak['RssAnon'] / 2**20:.1f} GiB anonymous, ", end="")
    print(f"{peak['VmRSS'] / 2**20:.1f} GiB resident\n  {output.strip().replace(chr(10), chr(10) + '  ')}", flush=True)
    if process.returncode:
        sys.exit(process.returncode)


def _watch(process: subprocess.Popen[str], peak: dict[str, int]) -> None:
    """Keep the largest figures of /proc, in KiB."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            found = dict(line.split(":") for line in status.read_text().splitlines())
        except OSError:
            return
        for key in peak:
            peak[key] = max(peak[key], int(found.get(key, "0 kB").split()[0]))
        time.sleep(0.05)


def main() -> None:
    """Make the model, and take it through."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--folder", type=Path, required=True, help="where the models lie; it must not exist")
    flags.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="numbers of the weights")
    flags.add_argument("--layers", type=int, default=22)
    flags.add_argument("--no-export", action="store_true", help="stop behind the upcycle")
    given = flags.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True)
    make_llama(folder / "llama", given.layers, DTYPES[given.dtype])
    (folder / "recipe.yaml").write_text(RECIPE)
    recipe = ("--config", str(folder / "recipe.yaml"))
    watched("import", str(folder / "llama"), "--output", str(folder / "imported"))
    shutil.rmtree(folder / "llama")
    watched("grow", str(folder / "imported"), *recipe, "--output", str(folder / "wider"), "--verify")
    shutil.rmtree(folder / "imported")
    watched("grow", str(folder / "wider"), *recipe, "--output", str(folder / "mixture"), "--verify")
    shutil.rmtree(folder / "wider")
    if not given.no_export:
        watched("export", str(folder / "mixture"), "--output", str(folder / "exported"))


if __name__ == "__main__":
    main()
