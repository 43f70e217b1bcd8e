"""The state file while a server runs: saved now and then and at the end, and nothing that happens to it stops one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learned import assert_equal, make, teach
from vllm_specplug.proposers import saved_state
from vllm_specplug.proposers.saved_state import whole

from vllm_specplug import options
from vllm_specplug.host import patching, state_file
from vllm_specplug.host.state_file import StateKeeper

IDENTITY = {"proposer": "fused", "model": "m", "vocab_size": 50, "machine": {"threads": 2}}


class Source:
    """A proposer's ``state``, in pieces."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None

    def __call__(self) -> dict[str, Any]:
        self.calls += 1
        if self.error:
            raise self.error
        number = self.calls
        return {
            "x": np.array([number]),
            "many": (np.full(2, number) for _ in range(50)),
            "times/step_time/t": np.ones(1),
        }


def keeper(path: Path, source: Any = None, every_s: float = 0.0, **identity: Any) -> StateKeeper:
    return StateKeeper(path, IDENTITY | identity, source or Source(), every_s)


def settle(kept: StateKeeper) -> None:
    """Let the keeper copy everything and its thread write it."""
    now = time.monotonic()
    for _ in range(200):
        kept.tick(now)
    assert kept._writer is not None
    kept._writer.join()


def test_learned_state_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = make()
    kept = keeper(path, first.state)
    assert kept.resume(first.restore) is False and not path.exists()
    teach(first)
    kept.close()
    second = make()
    again = keeper(path, second.state)
    assert again.resume(second.restore) is True
    assert_equal(whole(first.state()), whole(second.state()))
    again.close()
    about, _ = saved_state.read(path)
    assert about["identity"] == IDENTITY and about["plugin"]


def test_saves_now_and_then_between_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "_COPY_S", -1.0)  # one piece a step
    path, source = tmp_path / "state", Source()
    kept = keeper(path, source, every_s=100.0)
    start = time.monotonic()
    kept.tick(start + 1000)
    assert source.calls == 0  # not before the file has been looked at
    kept.load()
    kept.tick(start + 50)
    assert source.calls == 0
    for number in range(52):
        assert not path.exists() and source.calls == min(number, 1) and kept._writer is None
        kept.tick(start + 101 + number)
    kept.tick(start + 160)
    assert kept._writer is not None and kept._writer.name != threading.current_thread().name
    kept._writer.join()
    _, state = saved_state.read(path)
    assert state["x"].tolist() == [1] and state["many"].tolist() == [1] * 100
    for number in range(60):
        kept.tick(start + 210 + number)
    kept._writer.join()
    assert saved_state.read(path)[1]["x"].tolist() == [2]
    kept.close()
    assert saved_state.read(path)[1]["x"].tolist() == [3]
    kept.close()
    kept.tick(start + 10_000)
    assert source.calls == 3


def test_saves_at_the_end_only(tmp_path: Path) -> None:
    source = Source()
    kept = keeper(tmp_path / "state", source, every_s=0.0)
    kept.load()
    kept.tick(time.monotonic() + 1e9)
    assert source.calls == 0
    kept.close()
    assert source.calls == 1 and (tmp_path / "state").exists()


def test_end_in_the_middle_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "_COPY_S", -1.0)
    source = Source()
    kept = keeper(tmp_path / "state", source, every_s=1.0)
    kept.load()
    for _ in range(5):
        kept.tick(time.monotonic() + 10)
    kept.close()
    assert saved_state.read(tmp_path / "state")[1]["many"].tolist() == [2] * 100


def test_file_that_does_not_fit_is_named_and_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, source = tmp_path / "state", Source()
    kept = keeper(path)
    kept.load()
    kept.close()
    sound = path.read_bytes()
    for content, identity, reason in (
        (sound, {"model": "other"}, "learned with model 'm', this server has 'other'"),
        (sound, {"vocab_size": 51}, "vocab_size"),
        (sound[:100], {}, "damaged or no state file"),
        (b"my thesis", {}, "damaged or no state file"),
    ):
        path.write_bytes(content)
        caplog.clear()
        kept = keeper(path, source, 0.001, **identity)
        assert kept.load() is None
        assert len(caplog.records) == 1 and reason in caplog.text and str(path) in caplog.text
        kept.tick(time.monotonic() + 10)
        kept.close()
        assert path.read_bytes() == content and source.calls == 0
    path.write_bytes(sound)
    caplog.clear()
    kept = keeper(path, source)

    def restore(state: object) -> None:
        raise ValueError("saved weights are too heavy")

    assert kept.resume(restore) is False and "too heavy" in caplog.text
    kept.close()
    assert path.read_bytes() == sound and source.calls == 0


def test_step_times_of_another_machine_are_not_taken_over(tmp_path: Path) -> None:
    kept = keeper(tmp_path / "state")
    kept.load()
    kept.close()
    same, other = keeper(tmp_path / "state"), keeper(tmp_path / "state", machine={"threads": 64})
    assert set(same.load() or ()) == {"x", "many", "times/step_time/t"}
    assert set(other.load() or ()) == {"x", "many"}
    same.close()
    other.close()
    assert saved_state.read(tmp_path / "state")[0]["identity"]["machine"] == {"threads": 64}


def test_errors_cost_the_save_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    source = Source()
    kept = keeper(folder / "state", source, every_s=0.001)
    kept.load()
    source.error = RuntimeError("cannot be copied")
    kept.tick(time.monotonic() + 1)
    assert "cannot be copied" in caplog.text
    source.error = None
    folder.rmdir()
    caplog.clear()
    time.sleep(0.002)
    kept._due = 0.0
    settle(kept)
    assert "failed; the server goes on" in caplog.text
    folder.mkdir()
    kept._due = 0.0
    settle(kept)
    assert saved_state.read(folder / "state")[1]["x"].tolist() == [source.calls]
    source.error = RuntimeError("cannot be copied")
    kept.close()
    assert saved_state.read(folder / "state")[1]["x"].tolist() == [source.calls - 1]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".state.abc.tmp").write_bytes(b"half")
    (tmp_path / ".other.abc.tmp").write_bytes(b"not ours")
    kept = keeper(tmp_path / "state")
    kept.load()
    kept.close()
    assert {p.name for p in tmp_path.iterdir()} == {"state", ".other.abc.tmp"}


_PROGRAM = """
import multiprocessing, os, sys
from pathlib import Path
import numpy as np
from vllm_specplug.host.state_file import StateKeeper

def run(end):
    kept = StateKeeper(Path(sys.argv[1]), {}, lambda: {"x": np.arange(3)}, 0.0)
    kept.load()
    if end == "raise":
        sys.exit(3)

if sys.argv[2] == "here":
    run("")
else:
    process = multiprocessing.get_context(sys.argv[2]).Process(target=run, args=("raise",))
    process.start()
    process.join()
    assert process.exitcode == 3
"""


@pytest.mark.parametrize("where", ["here", "fork"])
def test_saves_when_the_process_ends(tmp_path: Path, where: str) -> None:
    """As an engine in the user's own process, and as vLLM's engine process, which leaves by SystemExit."""
    subprocess.run([sys.executable, "-c", _PROGRAM, str(tmp_path / "state"), where], check=True, timeout=60)
    assert saved_state.read(tmp_path / "state")[1]["x"].tolist() == [0, 1, 2]


def test_paths_are_checked_at_start(tmp_path: Path) -> None:
    state_file.check_path(str(tmp_path / "state"))
    for path, reason in (
        ("", "expected the path of a file"),
        (str(tmp_path), "expected the path of a file"),
        (str(tmp_path / "none" / "state"), "there is no directory"),
    ):
        with pytest.raises(options.OptionError, match=f"specplug.state_file = .*{reason}"):
            state_file.check_path(path)
    assert state_file.path_for("a/state", 0) == Path("a/state") != state_file.path_for("a/state", 1)


def test_engine_processes_get_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    class Manager:
        def shutdown(self, timeout: float | None = None) -> float | None:
            return timeout

    module = types.ModuleType("vllm.v1.engine.utils")
    module.CoreEngineProcManager = Manager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert state_file.install_front() and state_file.install_front()
    assert [Manager().shutdown(timeout) for timeout in (0, None, 3.0)] == [state_file.GRACE_S, None, 3.0]
    state_file.uninstall_front()
    assert Manager().shutdown(0) == 0 and not patching.is_wrapped(Manager, "shutdown")
    del module.CoreEngineProcManager  # type: ignore[attr-defined]
    assert not state_file.install_front()
