"""For all tests. That this file is here also puts this folder on the import path of tests in subfolders."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_environment():
    """No option of whoever runs the tests decides them, and nothing is fetched from a model hub."""
    patch = pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        patch.delenv(name)
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()
