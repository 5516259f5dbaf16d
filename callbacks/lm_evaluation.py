"""lm-eval tasks during training: a callback that never changes what is trained."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.cadence import finished_step, tokens_seen
from callbacks.eval_tasks import Suite, choose_suite, load_suite, load_tasks, preserved_random_state
from modules.config import ModelConfig
from modules.errors import InputError, require_positive
from modules.files import replace_file
from modules.language_model import LanguageModel, log_metrics


class LMEvaluation(pl.Callback):
    """Evaluates lm-eval tasks between optimizer steps, at the start, at the end, and behind transitions.

    Results go to `<default_root_dir>/eval/step-NNNNNNNN.json` and, as `eval/<task>`, to the loggers. Training with and
    without evaluation is bit-equal: random state and training mode are restored, and gradients are not touched. A task
    that fails gives a warning, and training goes on; a task that cannot be loaded is an `InputError` before it begins.

    Args:
        suite: a suite of `configs/eval`. When `tasks` are not given either, `synthetic` if the data are the embedded
            world, and no evaluation beside other data.
        tasks: names of lm-eval tasks, in the place of a suite.
        every_n_steps: evaluate whenever so many optimizer steps are finished; not at all when left out.
        at_start: evaluate before the first step of a fresh run.
        at_end: evaluate when training has reached its last step.
        at_transitions: evaluate the grown network behind each transition.
        limit: documents per task at most; below 1, a share of them.
        max_batch_tokens: tokens of one forward pass, padding included.
    """

    def __init__(
        self,
        suite: str | None = None,
        tasks: list[str] | None = None,
        every_n_steps: int | None = None,
        at_start: bool = False,
        at_end: bool = True,
        at_transitions: bool = True,
        limit: int | float | None = None,
        max_batch_tokens: int = 8192,
    ) -> None:
        super().__init__()
        if suite is not None and tasks is not None:
            raise InputError(f"suite={suite!r} and tasks={tasks} are both given; choose one of the two")
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(
                f"every_n_steps={every_n_steps} must be at least 1; leave it out for no regular evaluation"
            )
        if limit is not None and not limit > 0:
            raise InputError(f"limit={limit} must be above 0 documents; leave it out to evaluate all")
        require_positive(**{"evaluation.max_batch_tokens": max_batch_tokens})
        self.suite: Suite | None = None
        if suite is not None or tasks is not None:
            self.suite = load_suite(suite) if suite is not None else choose_suite(tasks or [])
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self.at_transitions = at_transitions
        self.limit = limit
        self.max_batch_tokens = max_batch_tokens
        self.latest: dict[str, Any] | None = None
        """the newest record, as written to its file; for whoever shows it"""
        self.latest_metrics: dict[str, float] = {}
        """the newest `eval/<task>`"""
        self._tasks: dict[str, dict[str, Any]] | None = None  # None: off
        self._prepared_for: Any = None

    def prepare(self, datamodule: Any, architectures: Sequence[ModelConfig] = ()) -> None:
        """Load the tasks and their data sets; what is wrong with them shows here, before a run writes anything.

        Without lm-eval on this machine, a warning, and evaluation is off.

        Args:
            datamodule: prepared and set up; `task_dir` is the folder of its world's tasks.
            architectures: those that the run goes through.

        Raises:
            InputError: unknown tasks, data that cannot be loaded, tasks of the embedded world beside other data, an
                architecture whose outputs depend on later tokens.
        """
        self._prepared_for, self._tasks = datamodule, None
        folder = getattr(datamodule, "task_dir", None)
        if self.suite is None and folder is not None:
            self.suite = load_suite("synthetic")
        wanted = self.at_start or self.at_end or self.at_transitions or self.every_n_steps is not None
        if self.suite is None or not wanted or not _is_installed():
            return
        if self.suite.embedded and folder is None:
            raise InputError(
                f"evaluation suite {self.suite.name!r} asks about the embedded world, which "
                f"{type(datamodule).__name__} does not hold; train on SyntheticWorld, or choose other tasks"
            )
        if any(config.looks_ahead for config in architectures):
            raise InputError(
                f"evaluation suite {self.suite.name!r} with router.kind=expert_choice: its experts choose among later "
                "tokens too, so scores would not be those of a language model; set evaluation.at_end=false and "
                "evaluation.at_transitions=false, or use another router"
            )
        self._tasks = load_tasks(self.suite, folder)

    def setup(self, trainer: pl.Trainer, pl_module: LanguageModel, stage: str) -> None:
        """Load the tasks, unless `prepare` has been called with this data already."""
        if stage == "fit" and self._prepared_for is not trainer.datamodule:
            self.prepare(trainer.datamodule)

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Evaluate the untrained network when asked to; a resumed run has been past this."""
        if self.at_start and trainer.global_step == 0:
            self.evaluate_now(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate behind every n-th optimizer step, never inside an accumulation."""
        is_due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if is_due and finished_step(trainer) and not trainer.should_stop:
            self.evaluate_now(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Evaluate the trained network, unless its last step was evaluated already; a run that is stopped stops now."""
        has_finished = trainer.max_steps < 0 or trainer.global_step >= trainer.max_steps
        is_new = self.latest is None or self.latest["step"] != trainer.global_step
        if self.at_end and has_finished and is_new:
            self.evaluate_now(trainer, pl_module)

    def on_transition(self, trainer: pl.Trainer, pl_module: LanguageModel, record: Mapping[str, Any]) -> None:
        """Evaluate the network that a transition has just put in the place of the former one."""
        if self.at_transitions:
            self.evaluate_now(trainer, pl_module, record)

    def evaluate_now(
        self, trainer: pl.Trainer, pl_module: LanguageModel, transition: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Evaluate the present network, write and log the results, and return their record.

        Nothing that goes wrong here ends training: it becomes a warning. None when evaluation is off or no task worked.

        Args:
            trainer: the running trainer.
            pl_module: holds the `network`.
            transition: the record of a transition at this very step. Results of the step from before it are kept in the
                same file under `before_transition`.
        """
        if self._tasks is None:
            return None
        try:
            return self._evaluate(trainer, pl_module, self._tasks, transition)
        except Exception as error:
            _warn(trainer, "evaluation", error)
            return None

    def state_dict(self) -> dict[str, Any]:
        """The newest record, so that a resumed run can show it and does not repeat it."""
        return {"latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.latest = state_dict["latest"]

    def _evaluate(
        self,
        trainer: pl.Trainer,
        pl_module: LanguageModel,
        tasks: dict[str, dict[str, Any]],
        transition: Mapping[str, Any] | None,
    ) -> dict[str, Any] | None:
        from callbacks.harness import evaluate_tasks

        assert pl_module.network is not None
        start = time.perf_counter()
        found = evaluate_tasks(
            pl_module.network,
            trainer.datamodule.tokenizer,
            tasks,
            limit=self.limit,
            max_batch_tokens=self.max_batch_tokens,
            on_failure=lambda task, error: _warn(trainer, f"evaluation of {task}", error),
        )
        if not found["results"]:
            return None
        headline = found.pop("headline")
        record = {
            "step": trainer.global_step,
            "tokens": tokens_seen(trainer),
            "suite": self.suite.name if self.suite else "",
            "limit": self.limit,
            **found,
            "seconds": round(time.perf_counter() - start, 3),
        }
        path = Path(trainer.default_root_dir) / "eval" / f"step-{trainer.global_step:08d}.json"
        if transition is not None:
            record |= _beside_transition(path, transition)
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False).encode())
        self.latest = record
        self.latest_metrics = {f"eval/{task}": value for task, value in headline.items() if value is not None}
        log_metrics(trainer, self.latest_metrics)
        return record


def _is_installed() -> bool:
    """Whether lm-eval can be imported; warns when it cannot."""
    try:
        with preserved_random_state():
            import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        rank_zero_warn(f"lm-eval cannot be imported ({error}), so evaluation is off; install lm-eval to switch it on")
        return False
    return True


def _beside_transition(path: Path, transition: Mapping[str, Any]) -> dict[str, Any]:
    """The transition's id, and what was found at this step before it; a repeated transition keeps the first answer."""
    fields: dict[str, Any] = {"transition": transition.get("id")}
    if path.exists():
        former = json.loads(path.read_text(encoding="utf-8"))
        repeated = "transition" in former and former["transition"] == fields["transition"]
        before = former.get("before_transition") if repeated else former
        if before is not None:
            fields["before_transition"] = before
    return fields


def _warn(trainer: pl.Trainer, what: str, error: Exception) -> None:
    """Tell, and go on; but of several processes, which answer together, one cannot go on alone."""
    if trainer.world_size > 1:
        raise error
    rank_zero_warn(
        f"{what} at step {trainer.global_step} failed, and training goes on ({type(error).__name__}: {error})"
    )
