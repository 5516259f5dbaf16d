"""lm-eval tasks on a network: an evaluation that leaves network, random state and gradients as they were.

Importing this file imports lm-eval (seconds): do it where an evaluation begins, not at a program's start.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from lm_eval import evaluator
from torch import nn

from callbacks.evaluation.batching import Plans
from callbacks.evaluation.company import Company, Disagreement, PeerFailed, Stopped
from callbacks.evaluation.model import FEWSHOT_SEED, HarnessLM
from callbacks.evaluation.requests import built_requests, digest, templates_compiled_once
from callbacks.evaluation.results import (
    Outcome,
    chance_levels,
    clean_metrics,
    headline,
    headline_names,
    right_answers,
)
from callbacks.evaluation.samples import examples_of
from callbacks.evaluation.tasks import LoadedTasks, check_limit, preserved_random_state, quiet_harness, seed_everything
from callbacks.evaluation.text_side import TextSide
from modules.layers.transformer import Transformer
from modules.world import ONE_PROCESS, World

Failure = Callable[[str, Exception], None]
"""Told of a task that failed, and of its error."""


class Harness:
    """Evaluates loaded tasks, as often as asked; what they ask is tokenized and batched once.

    Args:
        tasks: from `load_tasks`.
        text: the tokenizer that the network was trained with, and what it expects in front of a text.
        limit: documents per task at most; below 1, a share of them.
        max_batch_tokens: as in `HarnessLM`.
        num_examples: questions of each task that are told with the network's answers.

    Raises:
        InputError: a limit that is not above 0.
    """

    def __init__(
        self,
        tasks: LoadedTasks,
        text: TextSide,
        *,
        limit: int | float | None = None,
        max_batch_tokens: int = 8192,
        num_examples: int = 0,
    ) -> None:
        check_limit(limit)
        self.tasks, self.text, self.limit = tasks, text, limit
        self.max_batch_tokens, self.num_examples = max_batch_tokens, num_examples
        self._plans = Plans()

    def evaluate(
        self,
        network: Transformer,
        world: World = ONE_PROCESS,
        *,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        is_told: Callable[[], bool] = lambda: False,
        on_failure: Failure | None = None,
        on_progress: Callable[[str, float], None] = lambda name, part: None,
    ) -> Outcome:
        """Evaluate a network; all ranks of its world together, and each has the outcome.

        Args:
            network: evaluated in eval mode, on its device and in its type.
            world: the processes that share it out.
            precision: what forward passes run under, such as autocast.
            is_told: whether this process was told to stop; all of them then give up.
            on_failure: called on each process where a task fails on any of them, and the others go on; without it the
                error is raised.
            on_progress: told of a task's name and how much of it is done, from 0 to 1.

        Raises:
            Stopped: some process was told to stop.
        """
        outcome = Outcome.of(self.tasks, self.limit, self.text.tokenizer.sha256, FEWSHOT_SEED)
        with (
            preserved_random_state(),
            quiet_harness(),
            _eval_mode(network),
            torch.compiler.set_stance("force_eager"),  # lengths differ: training would lose its compiled blocks
            torch.no_grad(),
            precision(),
        ):
            company = Company(network, world, is_told)
            try:
                company.agree(_number(list(self.tasks.by_name)))
                for name, entry in self.tasks.by_name.items():
                    told = partial(on_progress, name)
                    model = HarnessLM(network, self.text, self.max_batch_tokens, company, self._plans, told)
                    try:
                        found = self._evaluate_one(model, name, entry)
                        company.finish()  # nobody failed behind its last forward pass
                        outcome.add(found)
                    except Stopped:
                        raise
                    except PeerFailed as error:
                        _report(on_failure, name, error)
                    except Exception as error:
                        if on_failure is not None and not isinstance(error, Disagreement):
                            company.tell_failure()
                        _report(on_failure, name, error)
            finally:
                world.settle(network)
        outcome.versions.update({package: version(package) for package in ("lm_eval", "datasets")})
        return outcome

    def _evaluate_one(self, model: HarnessLM, name: str, entry: dict[str, Any]) -> Outcome:
        """Evaluate what one name stands for: a task, a group or a tag."""
        for task in entry["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)
        with templates_compiled_once(), built_requests(entry["tasks"], self.limit) as requests:
            hashes = {task: digest(asked) for task, asked in requests.items()}
            model.company.agree(_number(hashes))
            seed_everything()
            # no bootstrap: it would start a pool of processes
            output = evaluator.evaluate(model, entry, limit=self.limit, bootstrap_iters=0, log_samples=True)
            chances = {}
            with suppress(Exception):  # of tasks that are unlike any other: their scores count
                chances = chance_levels(entry)
        assert output is not None, "lm-eval believes that there is one process"
        results = {task: clean_metrics(raw) for task, raw in output["results"].items()}
        results = {task: metrics for task, metrics in results.items() if metrics}  # groups without a mean of their own
        for task, chance in chances.items():
            if task in results and chance is not None:
                results[task]["chance"] = chance
        asked_for = [task for task in headline_names(name, entry) if task in results]
        examples: list[dict[str, Any]] = []
        with suppress(Exception):  # likewise
            examples = examples_of(entry, output["samples"], self.num_examples)
        return Outcome(
            results=results,
            headline={task: headline(results[task]) for task in asked_for},
            num_samples={task: output["results"][task]["sample_len"] for task in results},
            num_fewshot=dict(output["n-shot"]),
            versions=dict(output["versions"]),
            hashes={"tasks": hashes},
            groups={group: [task.task_name for task in found.get_all_tasks()] for group, found in _groups(entry)},
            right={task: right_answers(samples) for task, samples in output["samples"].items()},
            examples=examples,
        )


def _number(value: Any) -> int:
    """A number that stands for something plain."""
    return int(hashlib.sha256(repr(value).encode()).hexdigest()[:15], 16)


def _report(on_failure: Failure | None, name: str, error: Exception) -> None:
    if on_failure is None:
        raise error
    on_failure(name, error)


def _groups(entry: dict[str, Any]) -> Any:
    return entry.get("groups", {}).items()


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
