"""lm-eval tasks during training: a callback that never changes what is trained."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from callbacks.cadence import finished_step, observers, tokens_seen
from callbacks.evaluation.company import Stopped
from callbacks.evaluation.results import counts_errors, headline_names
from callbacks.evaluation.suites import Suite, choose_suite, load_suite, load_suites
from callbacks.evaluation.tasks import LoadedTasks, Missing, Source, check_limit, load_tasks
from callbacks.evaluation.trainer_side import (
    beside_transition,
    has_tables,
    lm_eval_is_installed,
    log_examples,
    trainer_precision,
    write_record,
)
from callbacks.safety import StopOnSignal
from callbacks.warning import warn
from modules.config import ModelConfig
from modules.errors import InputError, require_not_negative, require_positive
from modules.language_model import LanguageModel, log_metrics
from modules.world import world_of

if TYPE_CHECKING:
    from callbacks.evaluation.harness import Harness


class LMEvaluation(pl.Callback):
    """Evaluates lm-eval tasks between optimizer steps, at the start, at the end, and behind transitions.

    Results go to `<default_root_dir>/eval/step-NNNNNNNN.json` and, as `eval/<task>`, to the loggers and to Lightning's
    callback metrics; W&B also gets a table of examples. They are the same on any number of processes, which share the
    questions out. Training with and without evaluation is bit-equal: random state and training mode are restored, and
    gradients are not touched. A task that fails gives a warning, and training goes on; one that cannot be loaded is an
    `InputError` before it begins. Forward passes run in the trainer's precision.

    Args:
        suite: a suite of `configs/eval`, or several with commas between them. When `tasks` are not given either,
            `synthetic` if the data are the embedded world, and no evaluation beside other data.
        tasks: names of suites and of lm-eval tasks, in the place of a suite.
        every_n_steps: evaluate whenever so many optimizer steps are finished; not at all when left out.
        every_n_tokens: evaluate whenever so many more tokens were trained on; likewise.
        at_start: evaluate before the first step of a fresh run.
        at_end: evaluate when training has reached its last step.
        at_transitions: evaluate the grown network behind each transition.
        limit: documents per task at most, the first ones; below 1, a share of them.
        max_batch_tokens: tokens of one forward pass; less needs less memory.
        data_mirror: a folder that holds data sets of the hub as <org>/<name>; nothing is then asked of the hub.
        missing: what to do about tasks whose data are not at hand: error names them before training starts, skip warns
            and goes on with the others.
        examples: questions of each task that the table of W&B shows.
        output: for validate, which writes nothing else: a file for the results, which must not exist yet.
    """

    def __init__(
        self,
        suite: str | None = None,
        tasks: list[str] | None = None,
        every_n_steps: int | None = None,
        every_n_tokens: int | None = None,
        at_start: bool = False,
        at_end: bool = True,
        at_transitions: bool = True,
        limit: int | float | None = None,
        max_batch_tokens: int = 8192,
        data_mirror: Path | None = None,
        missing: Missing = "error",
        examples: int = 3,
        output: Path | None = None,
    ) -> None:
        super().__init__()
        if suite is not None and tasks is not None:
            raise InputError(f"suite={suite!r} and tasks={tasks} are both given; choose one of the two")
        for name, value in {"every_n_steps": every_n_steps, "every_n_tokens": every_n_tokens}.items():
            if value is not None and value < 1:
                raise InputError(
                    f"evaluation.{name}={value} must be at least 1; leave it out for no regular evaluation"
                )
        check_limit(limit)
        require_positive(**{"evaluation.max_batch_tokens": max_batch_tokens})
        require_not_negative(**{"evaluation.examples": examples})
        self.suite: Suite | None = None
        if suite is not None:
            self.suite = load_suites(suite)
        elif tasks is not None:
            self.suite = choose_suite(tasks)
        self.every_n_steps, self.every_n_tokens = every_n_steps, every_n_tokens
        self.at_start = at_start
        self.at_end = at_end
        self.at_transitions = at_transitions
        self.limit = limit
        self.max_batch_tokens = max_batch_tokens
        self.data_mirror, self.missing = data_mirror, missing
        self.examples = examples
        self.output = output
        self.failures: list[str] = []
        """what has failed so far"""
        self.about: dict[str, Any] = {}
        """what a record says of the network instead of the trainer's step and tokens"""
        self.latest: dict[str, Any] | None = None
        """the newest record, as written to its file; for whoever shows it"""
        self.latest_metrics: dict[str, float] = {}
        """the newest `eval/<task>`"""
        self._tasks: LoadedTasks | None = None  # None: off
        self._harness: Harness | None = None
        self._prepared_for: Any = None
        self._tokens_before = 0

    @property
    def is_wanted(self) -> bool:
        """Whether anything asks for an evaluation."""
        regular = self.every_n_steps is not None or self.every_n_tokens is not None
        return self.at_start or self.at_end or self.at_transitions or regular

    @property
    def metric_names(self) -> set[str]:
        """The metrics that are going to be logged, once `prepare` has loaded the tasks."""
        if self._tasks is None:
            return set()
        return {f"eval/{name}" for entry in self._tasks.by_name.items() for name in headline_names(*entry)}

    @property
    def error_names(self) -> set[str]:
        """Those of these of which less is better."""
        if self._tasks is None:
            return set()
        named = (
            (f"eval/{name}", entry) for key, entry in self._tasks.by_name.items() for name in headline_names(key, entry)
        )
        return {name for name, entry in named if counts_errors(entry)}

    def refuse_output(self) -> None:
        """Raise `InputError` for a file that `fit` would not write."""
        if self.output is not None:
            raise InputError(
                f"evaluation.output={self.output} is for validate; fit writes eval/step-*.json: leave it out"
            )

    def prepare(self, datamodule: Any, architectures: Sequence[ModelConfig] = (), is_asked: bool = False) -> None:
        """Load the tasks and their data sets; what is wrong with them shows here, before a run writes anything.

        Without lm-eval on this machine, a warning, and evaluation is off.

        Args:
            datamodule: prepared and set up; `task_dir` is the folder of its world's tasks.
            architectures: those that the run goes through.
            is_asked: load them also where no time of a run is given to evaluate.

        Raises:
            InputError: unknown tasks, data that cannot be loaded, tasks of the embedded world beside other data, an
                architecture whose outputs depend on later tokens.
        """
        self._prepared_for, self._tasks, self._harness = datamodule, None, None
        folder = getattr(datamodule, "task_dir", None)
        if self.suite is None and folder is not None:
            self.suite = load_suite("synthetic")
        if self.suite is None or not (self.is_wanted or is_asked) or not lm_eval_is_installed():
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
        self._tasks = load_tasks(self.suite, Source(folder, self.data_mirror, self.missing))
        if self._tasks.missing:
            names = ", ".join(self._tasks.missing)
            warn(f"evaluation suite {self.suite.name!r} goes without {names}, whose data are not at hand")

    def setup(self, trainer: pl.Trainer, pl_module: LanguageModel, stage: str) -> None:
        """Load the tasks, unless `prepare` has been called with this data already."""
        if stage == "fit" and self._prepared_for is not trainer.datamodule:
            self.prepare(trainer.datamodule)

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Evaluate the untrained network when asked to; a resumed run has been past this."""
        self._tokens_before = tokens_seen(trainer)
        if self.at_start and trainer.global_step == 0:
            self.evaluate_now(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate behind optimizer steps whose turn it is, never inside an accumulation."""
        if not finished_step(trainer):
            return
        before, self._tokens_before = self._tokens_before, tokens_seen(trainer)
        by_steps = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        by_tokens = (
            self.every_n_tokens is not None
            and before // self.every_n_tokens < self._tokens_before // self.every_n_tokens
        )
        if (by_steps or by_tokens) and not trainer.should_stop:
            self.evaluate_now(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Evaluate the trained network, unless its last step was evaluated already; a run that is stopped stops now."""
        has_finished = trainer.max_steps < 0 or trainer.global_step >= trainer.max_steps
        is_new = self.latest is None or self.latest["step"] != trainer.global_step
        if self.at_end and has_finished and is_new:
            self.evaluate_now(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Under `growmoe validate`, evaluate too when tasks are named."""
        if trainer.state.fn == "validate":
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
            record = self._evaluate(trainer, pl_module, transition)
        except Stopped:
            warn(f"evaluation at step {trainer.global_step} was given up for a signal to stop")
            return None
        except Exception as error:
            self._note_failure(trainer, "evaluation", error)
            return None
        if record is not None:
            for callback in observers(trainer, "on_evaluation"):
                callback.on_evaluation(trainer, pl_module, self.latest_metrics, transition)
        return record

    def state_dict(self) -> dict[str, Any]:
        """The newest record, so that a resumed run can show it and does not repeat it."""
        return {"latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.latest = state_dict["latest"]

    def _evaluate(
        self, trainer: pl.Trainer, pl_module: LanguageModel, transition: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        assert pl_module.network is not None
        began = time.perf_counter()
        stopper = next((one for one in trainer.callbacks if isinstance(one, StopOnSignal)), None)
        outcome = self._ready_harness(trainer).evaluate(
            pl_module.network,
            world_of(trainer),
            precision=partial(trainer_precision, trainer),
            is_told=lambda: stopper is not None and stopper.received is not None,
            on_failure=lambda task, error: self._note_failure(trainer, f"evaluation of {task}", error),
        )
        if not outcome.results:
            return None
        when = {"step": trainer.global_step, "tokens": tokens_seen(trainer), **self.about}
        record = {**when, "precision": str(trainer.precision), **outcome.record()}
        path = self.output
        if trainer.state.fn == "fit":
            path = Path(trainer.default_root_dir) / "eval" / f"step-{trainer.global_step:08d}.json"
        self.latest = record
        self.latest_metrics = {f"eval/{task}": value for task, value in outcome.headline.items() if value is not None}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.latest_metrics.items()})
        try:  # whatever goes wrong here goes wrong on the first process alone
            log_metrics(trainer, {**self.latest_metrics, "perf/eval_s": time.perf_counter() - began})
            if trainer.is_global_zero and path is not None:
                if transition is not None:
                    record |= beside_transition(path, transition)
                write_record(path, record)
                log_examples(trainer, outcome.examples)
        except Exception as error:
            self._note_failure(trainer, "writing the evaluation", error)
        return record

    def _note_failure(self, trainer: pl.Trainer, what: str, error: Exception) -> None:
        """Nothing that goes wrong here ends a run."""
        self.failures.append(what)
        warn(f"{what} at step {trainer.global_step} failed, and the run goes on ({type(error).__name__}: {error})")

    def _ready_harness(self, trainer: pl.Trainer) -> "Harness":
        """Made once: what tasks ask is tokenized in the first evaluation."""
        if self._harness is None:
            from callbacks.evaluation.harness import Harness
            from callbacks.evaluation.text_side import TextSide

            assert self._tasks is not None
            self._harness = Harness(
                self._tasks,
                TextSide(trainer.datamodule.tokenizer),
                limit=self.limit,
                max_batch_tokens=self.max_batch_tokens,
                num_examples=self.examples if has_tables(trainer) else 0,
            )
        return self._harness
