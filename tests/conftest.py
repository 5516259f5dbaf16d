"""Settings of the whole test suite: one thread, no network, no W&B, and the tolerances, written once."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}

settings.register_profile(
    "growmoe",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("growmoe")


@pytest.fixture(autouse=True)
def _same_settings() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    assert torch.get_default_dtype() == torch.float32, "a test has left another default type behind"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the worlds of these tests are kept, so that each is made once."""
    return tmp_path_factory.mktemp("worlds")
