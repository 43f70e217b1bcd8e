"""How long a server's steps take, for replaying: learned from the trace's own steps, or given.

Learned: the model that servers use themselves (:mod:`vllm_specplug.proposers.step_time`) sees the recorded steps in
order, and is then scaled so that all of them together take as long as they took. Replayed steps take exactly what it
says. To draw what recorded steps took beside their predictions for each step anew was tried: on a busy machine the
outliers, which come in bursts there and were everywhere then, made budgets pause in one of four replays, which cost
7% of the predicted tokens per second; without noise these were within 2% of the measured ones.
"""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_specplug.proposers import saved_state
from vllm_specplug.proposers.base import StepLoad
from vllm_specplug.proposers.step_time import StepTimeModel

from .files import Recorded, TraceError

Float64Array = npt.NDArray[np.float64]

#: Fewer recorded steps tell nothing, and so do steps that all have equally many draft rows per request.
LEAST_STEPS = 32
#: Of steps with another number of draft rows than the most frequent one.
LEAST_OTHERS = 8
_STATE = "step_time"


class StepTimes(ABC):
    """Seconds of a step by its load.

    Attributes:
        source: where they are from, for people.
        host_s: seconds per step that drafts which the host takes beside the proposer; 0 where it is not known.
        most_requests: in one of the steps that it is from.
    """

    def __init__(self, source: str, host_s: float = 0.0, most_requests: int = 1 << 30) -> None:
        self.source = source
        self.host_s = host_s
        self.most_requests = most_requests

    @abstractmethod
    def predict(self, load: StepLoad) -> float:
        """Seconds of a step of decoding requests, without drafting."""


class GivenTimes(StepTimes):
    """Straight lines between given numbers of rows, the last one going on."""

    def __init__(self, rows: Iterable[int], seconds: Iterable[float]) -> None:
        super().__init__("given")
        self._rows, self._seconds = list(rows), list(seconds)

    def predict(self, load: StepLoad) -> float:
        """See :meth:`StepTimes.predict`; only its rows matter."""
        rows, seconds = self._rows, self._seconds
        if load.rows > rows[-1] and len(rows) > 1:
            slope = max((seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2]), 0.0)
            return seconds[-1] + slope * (load.rows - rows[-1])
        return float(np.interp(load.rows, rows, seconds))


class LearnedTimes(StepTimes):
    """A step-time model's predictions, times a factor."""

    def __init__(
        self,
        model: StepTimeModel,
        source: str,
        factor: float = 1.0,
        host_s: float = 0.0,
        most_requests: int = 1 << 30,
    ) -> None:
        super().__init__(source, host_s, most_requests)
        self._model, self._factor = model, factor

    def predict(self, load: StepLoad) -> float:
        """See :meth:`StepTimes.predict`."""
        return self._factor * self._model.predict(load)


def parse(text: str) -> StepTimes:
    """Step times as a user gives them: ``ROWS:MS,...``, rising in rows, or the path of a server's state file.

    Raises:
        TraceError: saying what is wrong.
    """
    what = f"step times {text!r}: "
    if not re.match(r"^\s*\d+\s*:", text):
        return _from_state(Path(text), what)
    pairs = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+\.?\d*|\.\d+)\s*", part)
        if match is None or int(match[1]) < 1 or not 0.0 < float(match[2]) < 1e7:
            raise TraceError(f"{what}expected ROWS:MILLISECONDS,... such as 1:31,2:31.5,8:40, got {part.strip()!r}")
        pairs.append((int(match[1]), float(match[2]) * 1e-3))
    if any(a >= b for (a, _), (b, _) in itertools.pairwise(pairs)):
        raise TraceError(f"{what}expected rising numbers of rows")
    return GivenTimes(*zip(*pairs, strict=True))


def _from_state(path: Path, what: str) -> StepTimes:
    try:
        _, state = saved_state.read(path)
    except FileNotFoundError:
        raise TraceError(f"{what}expected ROWS:MILLISECONDS,... or a state file, and there is no file {path}") from None
    except saved_state.StateFileError as error:
        raise TraceError(f"{what}expected ROWS:MILLISECONDS,... or a state file, but {error}") from None
    ours = {name.rpartition("/")[2]: array for name, array in state.items() if _STATE in name.split("/")[:-1]}
    model = StepTimeModel()
    try:
        model.restore(ours)
    except ValueError as error:
        raise TraceError(f"{what}the file holds none ({error})") from None
    return LearnedTimes(model, f"as learned in {path.name}")


class _Measured(NamedTuple):
    """Recorded steps of decoding requests, in order, each once."""

    loads: list[StepLoad]
    seconds: Float64Array  # without drafting
    host_s: Float64Array  # of the steps that drafted


def measured_steps(requests: Iterable[Recorded]) -> _Measured:
    """Steps without prefill whose time is known."""
    found: dict[tuple[str, int], tuple[StepLoad, float, float]] = {}
    for request in requests:
        steps = request.steps
        if steps is None:
            continue
        server = f"{request.server.get('started')} {request.server.get('engine')}"
        rows = (steps.number, steps.loads, steps.us, steps.drafting_us, steps.proposer_us, steps.paused)
        for number, load, us, drafting, proposer, paused in zip(*(x.tolist() for x in rows), strict=True):
            own = 0.0 if paused else drafting
            if load[4] or not load[1] or not us - own > 0.0:  # a prompt was computed in it, or NaN
                continue
            host = np.nan if paused or proposer <= 0.0 else (drafting - proposer) * 1e-6
            found[server, number] = StepLoad(*load), (us - own) * 1e-6, host
    ordered = [found[key] for key in sorted(found)]
    host_s = np.array([h for _, _, h in ordered])
    return _Measured([load for load, _, _ in ordered], np.array([s for _, s, _ in ordered]), host_s[host_s == host_s])


def learn(requests: Iterable[Recorded]) -> StepTimes:
    """Step times of the server that recorded.

    Raises:
        TraceError: the trace does not tell, and why.
    """
    loads, seconds, host_s = measured_steps(requests)
    if len(loads) < LEAST_STEPS:
        raise TraceError(f"the trace has the times of {len(loads)} steps, where {LEAST_STEPS} are needed")
    rows = np.array([(load.rows - load.requests) / load.requests for load in loads])
    _, counts = np.unique(rows, return_counts=True)
    if len(loads) - counts.max() < LEAST_OTHERS:
        raise TraceError("the trace's steps all have as many draft tokens: it does not tell what one costs")
    model = StepTimeModel()
    for load, taken in zip(loads, seconds, strict=True):
        model.observe(load, taken)
    predicted = np.array([model.predict(load) for load in loads])
    factor = float(seconds.sum() / predicted.sum())
    source = f"measured in {len(loads)} recorded steps"
    host = float(np.median(host_s)) if len(host_s) else 0.0
    most = max(load.requests for load in loads)
    return LearnedTimes(model, source, factor, max(host, 0.0), most)
