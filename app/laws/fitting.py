"""Fitting a law to runs of one's own, with bootstrap intervals.

The forms are Chinchilla's, L = E + A/N^alpha + B/D^beta (Hoffmann et al., arXiv 2203.15556), and for mixtures that of
Yun et al. (arXiv 2404.02852, equation 4), log L = log(A/N^alpha + B/Ê^beta + C/D^gamma + F) + d log N log Ê. As there,
the Huber loss of log L is minimized by L-BFGS from several starts, the best ones of a grid.
"""

import csv
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from app.laws.law import Domain, Law
from app.laws.printed import CLARK_CONSTANTS, saturated
from modules.errors import InputError

Form = Literal["dense", "mixture"]
HUBER_DELTA = 1e-3
NUM_STARTS = 12
_UNTIL = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 30}
EXPERTS_START, EXPERTS_MOST = CLARK_CONSTANTS["S-BASE"][-2:]
"""how experts saturate: too few runs of one's own tell it"""
COLUMNS = {"dense": ("parameters", "tokens", "loss"), "mixture": ("parameters", "tokens", "experts", "loss")}
CONSTANTS = {
    "dense": ("log A", "alpha", "log B", "beta", "log E"),
    "mixture": ("log A", "alpha", "log B", "beta", "log C", "gamma", "log F", "d"),
}
_GRIDS: dict[str, list[tuple[float, ...]]] = {
    "dense": [(0, 5, 10, 15), (0.2, 0.5, 0.8), (0, 5, 10, 15), (0.2, 0.5, 0.8), (-0.5, 0.5)],
    "mixture": [(2, 8), (0.2, 0.6), (0, 2), (0.2, 1.0), (2, 8), (0.2, 0.6), (0.0,), (0.0,)],
}


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        form: which.
        constants: by name, value and the limits of the interval.
        rmse: root mean square of the errors of log L.
        law: for plans.
    """

    form: Form
    constants: dict[str, tuple[float, float, float]]
    rmse: float
    law: Law


def read_runs(path: Path, form: Form) -> np.ndarray:
    """Rows of a CSV file with a header, in the order of `COLUMNS`.

    Raises:
        InputError: a file or a column that is missing; a value that is no number above 0.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS[form] if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path} has no column {missing[0]!r}; it needs {', '.join(COLUMNS[form])}")
            rows = [
                [_number(row[name], f"{path} line {reader.line_num}", name) for name in COLUMNS[form]] for row in reader
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a CSV file of runs") from None
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(COLUMNS[form]))


def fit(rows: np.ndarray, form: Form, num_bootstrap: int = 200, seed: int = 0, confidence: float = 0.9) -> Fit:
    """Fit a law to runs.

    Args:
        rows: one for each run, in the order of `COLUMNS`.
        form: dense or mixture.
        num_bootstrap: samples of the runs, drawn with replacement, whose fits give the intervals.
        seed: of these draws.
        confidence: share of the fits that lie inside of an interval.

    Raises:
        InputError: fewer runs than constants and one more.
    """
    least = len(CONSTANTS[form]) + 1
    if len(rows) < least:
        raise InputError(f"{len(rows)} runs cannot tell {least - 1} constants; give at least {least}")
    data = torch.tensor(rows)
    grid = [np.array(start) for start in itertools.product(*_GRIDS[form])]
    starts = sorted(grid, key=lambda start: _loss(form, torch.tensor(start), data).item())[:NUM_STARTS]
    best, _ = min((_minimize(form, start, data) for start in starts), key=lambda found: found[1])
    random = np.random.default_rng(seed)
    samples = [torch.tensor(rows[random.integers(0, len(rows), len(rows))]) for _ in range(num_bootstrap)]
    drawn = [best, *(_minimize(form, best, sample)[0] for sample in samples)]
    low, high = np.percentile(drawn, (50 * (1 - confidence), 50 * (1 + confidence)), axis=0)
    constants = {name: (float(best[i]), float(low[i]), float(high[i])) for i, name in enumerate(CONSTANTS[form])}
    errors = _predicted(form, torch.tensor(best), data) - data[:, -1].log()
    return Fit(form, constants, errors.square().mean().sqrt().item(), _law(best, rows, form))


def _loss(form: Form, constants: Tensor, rows: Tensor) -> Tensor:
    errors = _predicted(form, constants, rows) - rows[:, -1].log()
    return torch.nn.functional.huber_loss(errors, torch.zeros_like(errors), delta=HUBER_DELTA) / HUBER_DELTA


def _minimize(form: Form, start: np.ndarray, rows: Tensor) -> tuple[np.ndarray, float]:
    """Constants, and the loss that they have."""
    from scipy.optimize import minimize

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        constants = torch.tensor(theta, requires_grad=True)
        loss = _loss(form, constants, rows)
        (slope,) = torch.autograd.grad(loss, constants)
        return loss.item(), slope.numpy()

    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=_UNTIL)
    return found.x, float(found.fun) if math.isfinite(found.fun) else math.inf


def _predicted(form: Form, constants: Tensor, rows: Tensor) -> Tensor:
    """log L of each run."""
    log_n, log_d = rows[:, 0].log(), rows[:, 1].log()
    if form == "dense":
        a, alpha, b, beta, e = constants
        return torch.stack((a - alpha * log_n, b - beta * log_d, e.expand_as(log_n))).logsumexp(dim=0)
    a, alpha, b, beta, c, gamma, f, d = constants
    log_e = saturated(rows[:, 2], EXPERTS_START, EXPERTS_MOST).log()
    parts = (a - alpha * log_n, b - beta * log_e, c - gamma * log_d, f.expand_as(log_n))
    return torch.stack(parts).logsumexp(dim=0) + d * log_n * log_e


def _law(theta: np.ndarray, rows: np.ndarray, form: Form) -> Law:
    constants = torch.tensor(theta)

    def loss(parameters: float, tokens: float, experts: float = 1.0) -> float:
        values = [parameters, tokens, 0.0] if form == "dense" else [parameters, tokens, experts, 0.0]
        return float(_predicted(form, constants, torch.tensor([values], dtype=torch.float64)).exp())

    ranges = {
        name: (float(column.min()), float(column.max()))
        for name, column in zip(COLUMNS[form][:-1], rows.T, strict=False)
    }
    return Law("your own runs", f"{len(rows)} runs", "parameters as in the file", loss, Domain(ranges))


def _number(text: str | None, where: str, name: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{where}: {name}={text!r} is no number above 0; correct it")
    return value
