"""Keeps what a proposer has learned in a file, so that a restarted server goes on where it was.

:class:`StateKeeper` loads the file at start, saves now and then, and once more when the engine ends. Between two steps
it only copies, a piece at a time; a thread writes.

The end, in vLLM 0.32: ``vllm serve`` sends its engine process SIGTERM, and at its default of ``--shutdown-timeout 0``
kills it in the same breath (v1/engine/utils.py:CoreEngineProcManager.shutdown). :func:`install_front` has it wait.
An engine process that gets to end leaves its loop, shuts down its runner (the place for :meth:`StateKeeper.close`) and
runs multiprocessing's finalizers; an engine inside the user's own process is shut down when it is dropped or the
interpreter exits. The finalizer made here is for whatever ends without shutting its runner down.
"""

from __future__ import annotations

import logging
import multiprocessing.util
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_specplug import __version__, options
from vllm_specplug.host import patching
from vllm_specplug.proposers import saved_state
from vllm_specplug.proposers.saved_state import Array, StateFileError

logger = logging.getLogger("vllm.specplug")

#: Parts of a state that hold only on the machine and with the settings they were learned with.
MACHINE_PARTS = frozenset({"step_time"})
#: Seconds that an engine process told to end at once is given to save.
GRACE_S = 10.0
# Copying stops for this step when it has taken so long.
_COPY_S = 0.0005


def check_path(path: str) -> None:
    """Raise ``OptionError`` unless a state file can be kept at ``path``."""
    where = f"{options.ROOT}.state_file = {path!r} is not allowed: "
    folder = Path(os.path.realpath(path)).parent
    if not path or Path(path).is_dir():
        raise options.OptionError(f"{where}expected the path of a file.")
    if not folder.is_dir():
        raise options.OptionError(f"{where}there is no directory {folder}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise options.OptionError(f"{where}no file can be made in {folder}.")


def path_for(path: str, rank: int) -> Path:
    """The file of data-parallel engine ``rank``: each has learned its own."""
    return Path(f"{path}.{rank}" if rank else path)


def identity_of(vllm_config: Any, proposer: str) -> dict[str, Any]:
    """What a saved state must have been learned with to be of use in this engine, see :class:`StateKeeper`."""
    import torch
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return {
        "proposer": proposer,
        "model": str(model.model),
        "revision": model.revision,
        "vocab_size": int(model.get_vocab_size()),
        "machine": {
            "device": current_platform.get_device_name(),
            "threads": torch.get_num_threads(),
            "dtype": str(model.dtype),
            "quantization": model.quantization,
            "eager": bool(model.enforce_eager),
            "tensor_parallel": int(parallel.tensor_parallel_size),
            "pipeline_parallel": int(parallel.pipeline_parallel_size),
        },
    }


class StateKeeper:
    """One proposer's state file. All calls from the engine's thread; none of them raises.

    Nothing is saved before :meth:`load`, nor over a file that was not taken over: what a user has is not lost because
    a server was started with another model, or because a disk was damaged.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        source: Callable[[], Mapping[str, Array | Iterator[Array]]],
        every_s: float,
    ) -> None:
        """
        Args:
            identity: JSON values that must be equal in the file; ``machine`` only for :data:`MACHINE_PARTS`.
            source: the proposer's :meth:`~vllm_specplug.proposers.base.Proposer.state`.
            every_s: seconds between saves; 0: only at the end.
        """
        self._path = path
        self._identity = dict(identity)
        self._source = source
        self._every_s = every_s or float("inf")
        self._due = time.monotonic() + self._every_s
        self._saving = False
        self._pieces: dict[str, list[Array]] = {}
        self._copying: Iterator[None] | None = None
        self._writer: threading.Thread | None = None
        self._at_exit = multiprocessing.util.Finalize(None, self.close, exitpriority=1)

    def load(self) -> dict[str, Array] | None:
        """The state in the file, or None; a file that does not fit is named in the log and left as it is."""
        saved_state.remove_leftovers(self._path)
        try:
            about, state = saved_state.read(self._path)
            state = self._fitting(about, state)
        except FileNotFoundError:
            self._saving = True
            return None
        except StateFileError as error:
            self.reject(str(error))
            return None
        self._saving = True
        logger.info("vllm-specplug: read what was learned before from %s.", self._path)
        return state

    def resume(self, restore: Callable[[Mapping[str, Array]], None]) -> bool:
        """Load the file and hand it to ``restore`` (a proposer's). Whether it took it over."""
        state = self.load()
        if state is None:
            return False
        try:
            restore(state)
        except Exception as error:
            self.reject(f"it does not fit this proposer and its options ({error})")
            return False
        return True

    def reject(self, reason: str) -> None:
        """Leave the file alone from now on, and say so."""
        self._saving = False
        logger.warning(
            "vllm-specplug: state file %s is not used: %s. The server starts without what was learned, and leaves the "
            "file as it is: nothing is saved until it is moved away or another one is named.",
            self._path,
            reason,
        )

    def _fitting(self, about: Mapping[str, Any], state: dict[str, Array]) -> dict[str, Array]:
        known = about.get("identity")
        known = known if isinstance(known, dict) else {}
        for name, value in self._identity.items():
            if name != "machine" and known.get(name) != value:
                raise StateFileError(f"it was learned with {name} {known.get(name)!r}, this server has {value!r}")
        if known.get("machine") != self._identity.get("machine"):
            logger.info(
                "vllm-specplug: %s is from another machine or other settings: step times start anew.", self._path
            )
            return {name: array for name, array in state.items() if not MACHINE_PARTS & set(name.split("/"))}
        return state

    def tick(self, now: float) -> None:
        """To be called between steps; ``now`` is ``time.monotonic()``."""
        if self._copying is not None:
            self._copy()
        elif now >= self._due and self._saving and not (self._writer and self._writer.is_alive()):
            self._due = now + self._every_s
            if self._begin():
                self._copy()

    def _begin(self) -> bool:
        self._pieces = {}
        try:
            self._copying = saved_state.take(self._source(), self._pieces)
        except Exception:
            self._failed()
        return self._copying is not None

    def _copy(self) -> None:
        """Go on copying for a moment, and have it written when all is copied."""
        until = time.monotonic() + _COPY_S
        try:
            for _ in self._copying or ():
                if time.monotonic() >= until:
                    return
        except Exception:
            self._copying = None
            self._failed()
            return
        self._copying = None
        self._writer = threading.Thread(
            target=self._write, args=(self._pieces,), name="specplug-state-writer", daemon=True
        )
        self._pieces = {}
        self._writer.start()

    def _write(self, pieces: Mapping[str, list[Array]]) -> None:
        about = {"identity": self._identity, "plugin": __version__, "saved": int(time.time())}
        try:
            start = time.perf_counter()
            size = saved_state.write(self._path, pieces, about)
            logger.debug("vllm-specplug: saved %d bytes in %.2f s.", size, time.perf_counter() - start)
        except Exception:
            self._failed()

    def _failed(self) -> None:
        logger.warning("vllm-specplug: saving to %s failed; the server goes on.", self._path, exc_info=True)

    def close(self) -> None:
        """Save for the last time. Idempotent."""
        self._at_exit.cancel()
        saving, self._saving, self._copying = self._saving, False, None
        if self._writer is not None:
            self._writer.join()
        if saving and self._begin():
            try:
                for _ in self._copying or ():
                    pass
            except Exception:
                self._failed()
            else:
                self._write(self._pieces)
        self._copying, self._pieces = None, {}


def install_front() -> bool:
    """Patch the front process, where a state file is kept: give engine processes the time to save.

    Returns:
        False if this vLLM has no such manager; then only what was saved in between outlives a killed engine.
    """
    try:
        from vllm.v1.engine.utils import CoreEngineProcManager

        patching.wrap(CoreEngineProcManager, "shutdown", _shutdown)
    except (ImportError, patching.HostSymbolMissing):
        return False
    return True


def uninstall_front() -> None:
    """Undo :func:`install_front`."""
    from vllm.v1.engine.utils import CoreEngineProcManager

    patching.unwrap(CoreEngineProcManager, "shutdown")


def _shutdown(original: Callable[..., Any]) -> Callable[..., Any]:
    def shutdown(self: Any, timeout: float | None = None) -> Any:
        """Wait up to GRACE_S for engine processes that were to be killed at once. The one method through which every
        front process ends the engine processes it has started. They still abort their requests at once: that they know
        from their own configuration. Any other timeout is the user's, or vLLM's own, and long enough."""
        return original(self, GRACE_S if timeout == 0 else timeout)

    return shutdown
