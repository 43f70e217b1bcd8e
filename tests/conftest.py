"""For all tests. That this file is here also puts this folder on the import path of tests in subfolders."""

from __future__ import annotations

import contextlib
import os

import interpreted
import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: its own functions are made for the interpreter or not when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_environment():
    """No option of whoever runs the tests decides them, and nothing is fetched from a model hub."""
    patch = pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        patch.delenv(name)
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    """Kernels are interpreted in half of the time."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        with contextlib.suppress(ImportError):
            interpreted.hasten()


@pytest.fixture(scope="session")
def prompts():
    """96 chat prompts of 8 kinds as token ids of the real model."""
    from engines import MODEL, encode
    from prompts import chat_prompts
    from transformers import AutoTokenizer

    class Holder:
        def get_tokenizer(self):
            return AutoTokenizer.from_pretrained(MODEL)

    return encode(Holder(), chat_prompts(96))
