"""One growing run that several tests look at."""

from pathlib import Path

import pytest

from tests.end_to_end import runs


@pytest.fixture(scope="session")
def grown_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run through both transitions, with every checkpoint kept."""
    config = runs.settings(tmp_path_factory.mktemp("runs") / "grown", world)
    config["checkpoint"] = {"every_n_steps": 3, "keep_last": 99}
    config["evaluation"] = {"every_n_steps": 5, "limit": 4}  # the resumed runs have none, and must not differ
    return runs.fit(config)
