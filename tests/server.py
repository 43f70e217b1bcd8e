"""Runs a real ``vllm serve`` process for a test: :class:`Server`, and the models the servers load."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / ".models" / "smollm2-135m"
THIRD_PARTY = Path(__file__).resolve().parent / "third_party"

#: A line of a server's log that says something went wrong.
TROUBLE = re.compile(r"\b(ERROR|CRITICAL)\b|Traceback \(most recent call last\)")


def vllm_command() -> list[str]:
    """The ``vllm`` command of the environment the tests run in, up to and without ``serve``'s arguments."""
    script = Path(sys.executable).parent / "vllm"
    if script.exists():
        return [str(script), "serve"]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment as a vLLM process needs it: no network, a small KV cache, none of our options."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SPECPLUG_")}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return env | changes


@functools.cache
def serve_flags() -> frozenset[str]:
    """Every flag this vLLM's engine arguments know."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return frozenset(AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())._option_string_actions)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """One ``vllm serve`` process. Use as a context manager; it always ends with the process gone.

    Args:
        model: path of the checkpoint.
        log: file that gets the process's stdout and stderr.
        args: further command-line arguments.
        additional_config: passed as ``--additional-config``.
        env: changes to :func:`environment`.
        start_s: deadline for the server to answer ``/health``.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        args: Sequence[str] = (),
        additional_config: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        start_s: float = 180.0,
    ) -> None:
        self.log = log
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start_seconds = 0.0
        self._deadline_s = start_s
        self._env = environment(**(env or {}))
        self._command = [
            *vllm_command(),
            str(model),
            "--served-model-name=model",
            "--host=127.0.0.1",
            f"--port={self.port}",
            *args,
        ]
        if additional_config is not None:
            self._command.append(f"--additional-config={json.dumps(additional_config)}")
        self.process: subprocess.Popen[bytes] | None = None
        self._family: list[psutil.Process] = []

    def __enter__(self) -> Server:
        started = time.monotonic()
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C in the tests must not race with the shutdown below.
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._env, start_new_session=True
            )
        try:
            while not self._healthy():
                if self.process.poll() is not None:
                    raise AssertionError(f"server exited with {self.process.returncode} at start\n{self.tail()}")
                if time.monotonic() - started > self._deadline_s:
                    raise AssertionError(f"server not healthy after {self._deadline_s:.0f} s\n{self.tail()}")
                time.sleep(0.25)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - started
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process is not None and self.process.poll() is not None:
            print(f"server had exited with {self.process.returncode}\n{self.tail()}")
        self.stop()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def family(self) -> list[psutil.Process]:
        """The server's process and all its descendants, as far as they live."""
        if self.process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(self.process.pid)
                seen = {p.pid for p in self._family}
                self._family += [p for p in (root, *root.children(recursive=True)) if p.pid not in seen]
        self._family = [p for p in self._family if _lives(p)]
        return list(self._family)

    def terminate(self, grace_s: float = 30.0) -> tuple[int | None, list[str]]:
        """SIGTERM, then wait.

        Returns:
            The exit code, None if the server is still up after ``grace_s``; and the names of descendants that
            outlived it by more than two seconds.
        """
        assert self.process is not None
        self.family()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            return None, []
        psutil.wait_procs(self._family, timeout=2)
        return code, [f"{p.pid} {p.name()}" for p in self.family()]

    def stop(self) -> None:
        """End the server and every process it started."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.terminate()
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 40) -> str:
        """The end of the log."""
        return f"--- last {lines} lines of {self.log} ---\n" + "\n".join(self.text().splitlines()[-lines:])

    def trouble(self) -> list[str]:
        """Lines of the log that report an error."""
        return [line for line in self.text().splitlines() if TROUBLE.search(line)]

    def client(self, timeout: float = 120.0) -> Any:
        """An ``openai`` client of this server that does not hide failures by trying again."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=timeout)

    def metric(self, name: str, label: str = "") -> float:
        """Sum of one metric of ``/metrics`` over the label sets that contain ``label``, such as ``reason="abort"``.

        Raises:
            KeyError: the server does not report it.
        """
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^{re.escape(name)}(?:\{{([^}}]*)\}})? (\S+)$", text, re.MULTILINE)
        values = [float(value) for labels, value in found if label in labels]
        if not values:
            raise KeyError(f"{name} {label}")
        return sum(values)

    def drafted(self) -> float:
        """Draft tokens verified since the start, by vLLM's own counter."""
        return self.metric("vllm:spec_decode_num_draft_tokens_total")

    def accepted(self) -> float:
        """Draft tokens accepted since the start, by vLLM's own counter."""
        return self.metric("vllm:spec_decode_num_accepted_tokens_total")

    def wait_idle(self, timeout_s: float = 30.0) -> None:
        """Wait until the engine has no running and no waiting request.

        Raises:
            AssertionError: it still has some after ``timeout_s``.
        """
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        deadline = time.monotonic() + timeout_s
        while any(busy := [self.metric(name) for name in names]):
            assert time.monotonic() < deadline, f"running, waiting = {busy} after {timeout_s} s\n{self.tail()}"
            time.sleep(0.2)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def save_tiny_model(path: Path, vocab_size: int = 512) -> Path:
    """Save the small random-weight Llama of :mod:`engines` with a tokenizer whose words are ``w0``, ``w1``, ...:
    word ``w<i>`` is token ``i``."""
    from engines import make_tiny_llama
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make_tiny_llama(path, vocab_size)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)
    return path


def third_party_path() -> str:
    """``PYTHONPATH`` with the distributions of ``tests/third_party`` on it."""
    return os.pathsep.join(filter(None, [str(THIRD_PARTY), os.environ.get("PYTHONPATH")]))
