"""Evaluation by our adapter and by lm-eval's own for transformers: the same model, requests and machine, in turns.

    python -m benchmarks.evaluation --data_mirror MIRROR --tokenizer tokenizer.json [--limit 50] [--tasks arc_easy piqa]

from the root of the repository, with transformers and accelerate installed (`pip install .[dev]`). The model is a dense
decoder of Llama's shape with random weights. A turn is all requests of a task, tokenizing included; requests are built
before. Answers are compared before anything is timed. lm-eval's model gets the best of several batch sizes, each tried
once. The tokens of a task are those of its distinct rows, and those that our adapter computes.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.loading import LoadedModel, load_model, text_side
from benchmarks import timing
from callbacks.evaluation.batching import distinct_rows, plan_batches
from callbacks.evaluation.model import FEWSHOT_SEED, HarnessLM
from callbacks.evaluation.requests import templates_compiled_once
from callbacks.evaluation.suites import Suite
from callbacks.evaluation.tasks import Source, load_tasks
from callbacks.evaluation.text_side import TextSide

SHOTS = {
    "arc_easy": 0,
    "hellaswag": 0,
    "piqa": 0,
    "mmlu_anatomy": 5,
    "cmmlu_agronomy": 5,
    "triviaqa": 1,
}
FOLDERS = ("arc", "hellaswag", "piqa", "mmlu", "cmmlu", "triviaqa")
BATCH_SIZES = (8, 16, 32)


def write_model(folder: Path, tokenizer_file: str, flags: argparse.Namespace) -> None:
    """A directory of transformers."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<|eos|>", pad_token="<|pad|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=flags.dim,
        intermediate_size=flags.dim * 8 // 3,
        num_hidden_layers=flags.layers,
        num_attention_heads=flags.dim // 64,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(flags.seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tasks(flags: argparse.Namespace) -> dict[str, list[Any]]:
    """The requests of each task."""
    names = tuple(flags.tasks or SHOTS)
    suite = Suite("benchmark", names, {name: SHOTS[name] for name in names}, folders=FOLDERS)
    found = {}
    with templates_compiled_once():
        for name, entry in load_tasks(suite, Source(mirror=flags.data_mirror)).by_name.items():
            task = entry["tasks"][name]
            task.set_fewshot_seed(FEWSHOT_SEED)
            task.build_all_requests(limit=flags.limit, rank=0, world_size=1)
            found[name] = task.instances
    return found


def ours(model: LoadedModel, text: TextSide, flags: argparse.Namespace, requests: list[Any]) -> list[Any]:
    """Our answers, by an adapter that knows nothing of former turns."""
    adapter = HarnessLM(model.network, text, flags.max_batch_tokens)
    with torch.no_grad():
        return getattr(adapter, requests[0].request_type)(requests)


def theirs(model: Any, batch_size: int, requests: list[Any]) -> list[Any]:
    """lm-eval's answers."""
    model.batch_size_per_gpu = batch_size
    return getattr(model, requests[0].request_type)(requests, disable_tqdm=True)


def check(name: str, mine: list[Any], other: list[Any]) -> None:
    """Raise SystemExit where answers differ: texts at all, log-likelihoods by more than float32 rounds."""
    if isinstance(mine[0], str):
        if mine != other:
            differing = sum(a != b for a, b in zip(mine, other, strict=True))
            raise SystemExit(f"{name}: {differing} of {len(mine)} texts differ")
        return
    worst = max(abs(a - b) / max(1.0, abs(b)) for (a, _), (b, _) in zip(mine, other, strict=True))
    if worst > 1e-5:
        raise SystemExit(f"{name}: log-likelihoods differ by {worst:.1e} of their size")


def tokens_of(adapter: HarnessLM, requests: list[Any]) -> str:
    """Inputs of distinct rows, and inputs that are computed."""
    if requests[0].request_type != "loglikelihood":
        return ""
    rows = distinct_rows(adapter._encode_pairs([request.args for request in requests]), adapter.max_length)
    batches = plan_batches(rows, adapter.max_batch_tokens)
    return f"{sum(len(row.inputs) for row in rows):,} / {sum(batch.num_tokens for batch in batches):,}"


def main() -> None:
    """Compare on each task, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_mirror", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--tasks", nargs="+", choices=tuple(SHOTS))
    for name, default in {"limit": 50, "dim": 256, "layers": 8, "max_batch_tokens": 8192}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    timing.add_common_flags(parser, rounds=5, repeats=1, warm_up=0)
    flags = parser.parse_args()
    flags.data_mirror = flags.data_mirror.absolute()
    timing.set_up(flags)
    from lm_eval.models.huggingface import HFLM

    tasks = build_tasks(flags)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), flags.tokenizer, flags)
        model = load_model(Path(folder))
        model.network.to(flags.device)
        text = text_side(model, Path(folder))
        peer = HFLM(pretrained=folder, dtype="float32", batch_size=8, device=flags.device)
    rows = []
    for name, requests in tasks.items():
        tried = {size: timing.time_once(partial(theirs, peer, size, requests), flags.device) for size in BATCH_SIZES}
        best = min(tried, key=lambda size: tried[size])
        check(name, ours(model, text, flags, requests), theirs(peer, best, requests))
        runs: dict[str, Callable[[], object]] = {
            "ours": partial(ours, model, text, flags, requests),
            "lm-eval": partial(theirs, peer, best, requests),
        }
        turns = timing.interleave(runs, flags, lambda: None, settle=False)
        medians = [f"{statistics.median(turns.seconds[who]):.2f}" for who in runs]
        ratio = timing.spread(timing.ratios(turns.seconds["lm-eval"], turns.seconds["ours"]))
        counted = tokens_of(HarnessLM(model.network, text, flags.max_batch_tokens), requests)
        print(f"{name}: {ratio} times as fast", flush=True)
        rows.append((name, str(len(requests)), counted, *medians, str(best), ratio))
    header = ("task", "requests", "tokens of rows / computed", "ours, s", "lm-eval, s", "its batch", "times as fast")
    timing.print_table(f"dense, D {flags.dim}, {flags.layers} layers, limit {flags.limit}", header, rows)


if __name__ == "__main__":
    main()
