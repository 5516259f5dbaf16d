"""lm-eval tasks on a network: one call, which leaves network, random state and gradients as they were.

Importing this file imports lm-eval (seconds): do it where an evaluation begins, not at a program's start.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluator
from torch import nn

from callbacks.eval_results import chance_levels, clean_metrics, headline
from callbacks.eval_tasks import Suite, load_tasks, preserved_random_state, quiet_harness, seed_everything
from callbacks.harness_lm import FEWSHOT_SEED, HarnessLM
from modules.errors import InputError
from modules.layers.transformer import Transformer


def evaluate_tasks(
    network: Transformer,
    tokenizer: Any,
    tasks: Suite | Sequence[str] | dict[str, dict[str, Any]],
    *,
    include_path: Path | None = None,
    limit: int | float | None = None,
    max_batch_tokens: int = 8192,
    begin_id: int | None = None,
    end_ids: Sequence[int] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Any]:
    """Run lm-eval tasks on a network, and leave network, random state and gradients as they were.

    Args:
        network: the model; it is evaluated in eval mode, on its device and in its type.
        tokenizer: the tokenizer that the model was trained with.
        tasks: a suite, task names, or tasks that `load_tasks` has loaded (to evaluate them many times).
        include_path: a folder with task YAMLs, when `tasks` are names.
        limit: documents per task at most; below 1, a share of them.
        max_batch_tokens: tokens of one forward pass.
        begin_id, end_ids: as in `HarnessLM`.
        on_failure: called with a task's name and the error, and the others go on; without it the error is raised.

    Returns:
        `results`: for every task and group its metrics (accuracies in 0..1) by name, with the standard error of
        accuracies as `<metric>_stderr`, and `chance`, the accuracy of guessing, where it is known; `headline`: the one
        figure of each task that was asked for; `num_samples` and `num_fewshot`: documents and shots by task;
        `versions`: of lm-eval, datasets and the tasks.

    Raises:
        InputError: unknown tasks, data that cannot be loaded, a limit that is not above 0.
    """
    if limit is not None and not limit > 0:
        raise InputError(f"limit={limit} must be above 0 documents; leave it out to evaluate all")
    if not isinstance(tasks, dict):
        suite = tasks if isinstance(tasks, Suite) else Suite(name=",".join(tasks), tasks=tuple(tasks))
        tasks = load_tasks(suite, include_path)
    record: dict[str, Any] = {key: {} for key in ("results", "headline", "num_samples", "num_fewshot", "versions")}
    with preserved_random_state(), quiet_harness(), _eval_mode(network), torch.no_grad():
        model = HarnessLM(network, tokenizer, max_batch_tokens, begin_id, end_ids)
        for name, loaded in tasks.items():
            try:
                _evaluate_one(model, name, loaded, limit, record)
            except Exception as error:
                if on_failure is None:
                    raise
                on_failure(name, error)
    record["versions"].update({name: version(name) for name in ("lm_eval", "datasets")})
    return record


def _evaluate_one(
    model: HarnessLM,
    name: str,
    loaded: dict[str, Any],
    limit: int | float | None,
    record: dict[str, Any],
) -> None:
    """Evaluate what one name stands for (a task, a group or a tag) and add it to `record`."""
    seed_everything()
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    # no bootstrap: it would start a pool of processes; no request cache: its key knows neither the data nor a version
    output = evaluator.evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=False, cache_requests=False)
    results = {task: clean_metrics(raw) for task, raw in output["results"].items()}
    results = {task: metrics for task, metrics in results.items() if metrics}  # groups without a mean of their own
    for task, chance in chance_levels(loaded).items():
        if task in results and chance is not None:
            results[task]["chance"] = chance
    record["results"].update(results)
    record["num_samples"].update({task: output["results"][task]["sample_len"] for task in results})
    record["versions"].update(output["versions"])
    record["num_fewshot"].update(output["n-shot"])
    asked = [name] if name in results else [task for task in loaded["tasks"] if task in results]
    record["headline"].update({task: headline(results[task]) for task in asked})
    for task in loaded["tasks"].values():
        task._instances = None  # built anew each time; MMLU's hold 250 MB of prompts


@contextmanager
def _eval_mode(network: nn.Module) -> Iterator[None]:
    """Evaluate, then give every submodule back the mode that it had."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
