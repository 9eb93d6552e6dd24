"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_speech() -> Path:
    """The folder of real recordings beside the checkout; a user's clone does not have it."""
    folder = REPOSITORY.parent / "shared" / "data" / "speech"
    if not folder.is_dir():
        pytest.skip(f"the real recordings are not here ({folder.relative_to(REPOSITORY.parent)} beside the checkout)")
    return folder
