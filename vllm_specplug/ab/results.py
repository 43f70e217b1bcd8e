"""What a comparison of servers found, as plain data: written by the run, read by the verdict and the reports.

A folder of results holds ``plan.json`` (:class:`Plan`), ``cells.jsonl``, one :class:`Cell` a line, and where fidelity
was measured ``fidelity.jsonl``, one :class:`Probe` a line; each is written as soon as it is known: whatever
ends a run, what it has is on disk.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

PLAN, CELLS, FIDELITY = "plan.json", "cells.jsonl", "fidelity.jsonl"
Row = TypeVar("Row")
#: Log-probability by token id.
Top = Mapping[int, float]


@dataclass(frozen=True)
class Arm:
    """One server under comparison.

    Attributes:
        name: short, unique in a run.
        flags: what was added to the ``vllm serve`` command line; empty for a server that already ran.
        url: of a server that already ran; empty for one the run starts.
    """

    name: str
    flags: list[str] = field(default_factory=list)
    url: str = ""


@dataclass(frozen=True)
class Load:
    """How requests arrive.

    Attributes:
        concurrency: requests at once; 0: as they arrive.
        rate: arrivals per second (Poisson); 0: as fast as ``concurrency`` allows.
    """

    concurrency: int = 0
    rate: float = 0.0

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}" if self.concurrency else f"{self.rate:g} requests/s"


@dataclass(frozen=True)
class Reply:
    """What a server did with one request; times in seconds.

    Attributes:
        index: of the workload's request.
        task: its task.
        sent_s: since the cell's start.
        first_s: from sending to the first token.
        total_s: from sending to the last token.
        gaps_s: between chunks of the stream; several tokens may come in one.
        prompt_tokens, output_tokens: counts.
        tokens: ids of the output, where the server tells them.
        text: the output.
        error: what went wrong; empty: nothing.
    """

    index: int
    task: str
    sent_s: float
    first_s: float
    total_s: float
    gaps_s: list[float]
    prompt_tokens: int
    output_tokens: int
    tokens: list[int] | None
    text: str
    error: str = ""


@dataclass(frozen=True)
class Cell:
    """One block of requests given to one arm under one load.

    Attributes:
        arm: its name.
        load: how the requests arrived.
        block: which part of the workload; blocks with the same number hold the same requests for all arms.
        repeat: how often the block was given before, under this load.
        seconds: from the first request sent to the last token.
        cpu_busy: share of the machine's processors that processes outside the run used meanwhile; None if unknown.
        counters: increase of the server's counters during the cell, by ``name`` or ``name{label="value",...}`` (labels
            in alphabetical order, without ``_total``, summed over engines; those that did not increase are left out):
            vLLM's ``vllm:spec_decode_*``, ``vllm:generation_tokens``, ``vllm:prompt_tokens*`` and
            ``vllm:iteration_tokens_total_count`` (engine steps), and this plugin's ``vllm_specplug:*``, which lag by
            up to a second: what is missing at the end of a cell is in the arm's next one.
        memory_bytes: peak resident memory of the server's processes until then; None for servers by URL.
        replies: per request, in the order they were sent.
        failure: why there is none or not all of it; empty: nothing.
    """

    arm: str
    load: Load
    block: int
    repeat: int
    seconds: float
    cpu_busy: float | None
    counters: dict[str, float]
    memory_bytes: int | None
    replies: list[Reply]
    failure: str = ""


@dataclass(frozen=True)
class Probe:
    """One output of an arm, with two models' log-probabilities at each of its tokens' prefixes.

    Attributes:
        arm: whose output.
        index, task: of the workload's request.
        tokens: ids of the output.
        own: per token, what the arm gave the likeliest tokens when it generated.
        exact: per token, what the control gives the likeliest tokens, and this one. Natural logarithms both.
    """

    arm: str
    index: int
    task: str
    tokens: list[int]
    own: Sequence[Top]
    exact: Sequence[Top]


@dataclass(frozen=True)
class Plan:
    """What was compared.

    Attributes:
        arms: the first is the control.
        loads: in turn.
        model: path or name.
        workload: name; ``requests``: how many in all; ``tasks``: their tasks, in order of appearance.
        output_tokens: most per request.
        temperature: 0: greedy.
        repeats: of every block under every load.
        seed: of sampling, order and arrivals.
        failures: arm: why it was left out, with the last lines of its log.
        facts: versions, machine, date, as :mod:`.environment` finds them; ``approximate``: arms that are known to be;
            ``fidelity``: what :mod:`.fidelity_run` says of its pass.
    """

    arms: list[Arm]
    loads: list[Load]
    model: str
    workload: str
    requests: int
    tasks: list[str]
    output_tokens: int
    temperature: float
    repeats: int
    seed: int
    failures: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def write_plan(folder: Path, plan: Plan) -> None:
    """Write or replace ``plan.json``. Raises ``OSError``."""
    place = folder / PLAN
    new = place.with_suffix(".new")
    new.write_text(json.dumps(dataclasses.asdict(plan), indent=2) + "\n", encoding="utf-8")
    os.replace(new, place)


def add_cell(folder: Path, cell: Cell) -> None:
    """Append a cell. Raises ``OSError``; then the file ends as it did before, or in a line that reading leaves out."""
    _add(folder / CELLS, cell)


def add_probe(folder: Path, probe: Probe) -> None:
    """Append a probe, as :func:`add_cell`."""
    _add(folder / FIDELITY, probe)


def _add(place: Path, row: Cell | Probe) -> None:
    line = json.dumps(dataclasses.asdict(row)) + "\n"
    with place.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()


def read(folder: Path) -> tuple[Plan, list[Cell]]:
    """A run's plan and all its whole cells.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        raw = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        arms, loads = [Arm(**a) for a in raw.pop("arms")], [Load(**x) for x in raw.pop("loads")]
        plan = Plan(arms=arms, loads=loads, **raw)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / PLAN}: no plan of a comparison: {error}") from error
    return plan, _rows(folder / CELLS, "cell", _cell)


def read_probes(folder: Path) -> list[Probe]:
    """All whole probes of a run; none where fidelity was not measured. Raises ``ValueError`` as :func:`read`."""
    return _rows(folder / FIDELITY, "probe", _probe)


def _rows(place: Path, what: str, make: Callable[[dict[str, Any]], Row]) -> list[Row]:
    found = []
    lines = place.read_text(encoding="utf-8").split("\n") if place.exists() else [""]
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line end was cut short
        try:
            found.append(make(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{place}, line {number}: no {what} of a comparison: {error}") from error
    return found


def _cell(raw: dict[str, Any]) -> Cell:
    load, replies = Load(**raw.pop("load")), [Reply(**r) for r in raw.pop("replies")]
    return Cell(load=load, replies=replies, **raw)


def _probe(raw: dict[str, Any]) -> Probe:
    # JSON has made text of the token ids.
    own, exact = ([{int(k): float(v) for k, v in top.items()} for top in raw.pop(key)] for key in ("own", "exact"))
    return Probe(own=own, exact=exact, **raw)
