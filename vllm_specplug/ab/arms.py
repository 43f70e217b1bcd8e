"""Arms of a comparison: what each is, its engine process, and running the same prompts through all of them.

An arm is one way to speculate (or none). Every arm's engine stays up during the run where memory allows, and each
block of prompts goes to every arm in turn, one busy at a time: what disturbs the machine for a while then disturbs
all arms alike.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from vllm_specplug.ab import environment

WARM_UP_PROMPTS = (
    "Repeat this line three times: the kettle is on the hob.",
    "Name four kinds of bread and say one thing about each.",
)


@dataclass(frozen=True)
class Arm:
    """One way to speculate.

    Attributes:
        name: short, unique in a run.
        title: for people, with the settings that matter.
        speculative_config: vLLM's ``speculative_config``; None for no speculation.
        additional_config: vLLM's ``additional_config``.
        env: extra environment of its engine.
    """

    name: str
    title: str
    speculative_config: Mapping[str, Any] | None = None
    additional_config: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


def no_speculation() -> Arm:
    """The base line."""
    return Arm("none", "no speculation")


def ngram(tokens: int = 5, low: int = 2, high: int = 4) -> Arm:
    """vLLM's own prompt lookup."""
    return Arm(
        "ngram",
        f"vLLM ngram (K={tokens}, {low}-{high})",
        {"method": "ngram", "num_speculative_tokens": tokens, "prompt_lookup_min": low, "prompt_lookup_max": high},
    )


def suffix(tokens: int, factor: float | None = None) -> Arm:
    """vLLM's suffix decoding (needs arctic-inference); ``factor`` None leaves vLLM's default."""
    config: dict[str, Any] = {"method": "suffix", "num_speculative_tokens": tokens}
    title = f"vLLM suffix (K={tokens})"
    if factor is not None:
        config["suffix_decoding_max_spec_factor"] = factor
        title = f"vLLM suffix (K={tokens}, factor {factor:g})"
    return Arm(f"suffix{tokens}", title, config)


def specplug(proposer: str, tokens: int = 8, options: Mapping[str, Any] | None = None) -> Arm:
    """A proposer of this plugin, or one registered with it."""
    return Arm(
        proposer.lower(),
        f"specplug {proposer} (K={tokens})",
        {"method": "custom_class", "model": f"vllm_specplug.{proposer}", "num_speculative_tokens": tokens},
        {"specplug": dict(options)} if options else {},
    )


@dataclass(frozen=True)
class EngineSettings:
    """What all arms of a run share.

    Attributes:
        threads: of each engine; None: ``OMP_NUM_THREADS`` if set, else all usable processors but one, which is what
            a vLLM server on this machine would take (it leaves one to its front end). More threads than free
            processors wait for each other actively, and a busy machine then slows an engine many times over.
        cpus: processors to stay on; empty: any.
    """

    model: str
    dtype: str = "bfloat16"
    max_model_len: int = 4096
    eager: bool = True
    kv_gib: int = 1
    seed: int = 0
    threads: int | None = None
    cpus: tuple[int, ...] = ()
    start_timeout_s: float = 1200.0
    block_timeout_s: float = 1200.0

    def environment(self) -> dict[str, str]:
        """Environment of an arm's engine process."""
        threads = self.threads or os.environ.get("OMP_NUM_THREADS") or max(1, environment.cpu_count() - 1)
        return {
            "OMP_NUM_THREADS": str(threads),
            # numba shares torch's OpenMP runtime and would set it to all processors in the arms that use numba.
            "NUMBA_NUM_THREADS": str(threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_gib),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


@dataclass(frozen=True)
class Work:
    """One block of prompts for every arm.

    Attributes:
        prompts: user messages, or token ids that are sent as they are.
        max_tokens: most tokens of each output.
        after: per prompt, how many tokens the first one has emitted when it is sent; empty: all are sent at once.
        temperature: of sampling; 0: greedy. The samples of a block have fixed seeds.
        ignore_eos: every output has its most tokens.
    """

    prompts: Sequence[str | Sequence[int]]
    max_tokens: Sequence[int]
    after: Sequence[int] = ()
    temperature: float = 0.0
    ignore_eos: bool = False


@dataclass(frozen=True)
class Block:
    """What one arm did with one block of prompts.

    Attributes:
        outputs, texts: per prompt, its tokens and their text.
        first_s: from sending to the block's first token.
        waits: per prompt, seconds from sending it to its first token.
        timeline: per engine step that emitted tokens, seconds since the first prompt was sent, tokens emitted, and
            prompts that had a token before the step and are not finished before it.
        seconds: from the block's first token to its last.
        cpu_seconds: processor time that the engine's process used meanwhile, all its threads together.
        timed_tokens: tokens emitted in ``seconds``.
        decoded: tokens after each request's first.
        steps: decode steps summed over requests; ``decoded / steps`` is the mean number of tokens per step (MAT).
        drafted, accepted: draft tokens verified and accepted, from vLLM's own counters.
        stats: this plugin's counters since the engine started; empty where it drafts nothing.
    """

    outputs: list[list[int]]
    texts: list[str]
    first_s: float
    seconds: float
    cpu_seconds: float
    timed_tokens: int
    decoded: int
    steps: int
    drafted: int
    accepted: int
    waits: list[float] = field(default_factory=list)
    timeline: list[tuple[float, int, int]] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)


class ArmFailed(Exception):
    """An arm's engine could not start or stopped; the message says why."""


class ArmProcess:
    """The engine of one arm, in its own process."""

    def __init__(self, arm: Arm, settings: EngineSettings, log_dir: Path) -> None:
        """Begin starting the engine; :meth:`wait_ready` waits for it."""
        from vllm_specplug.ab import engine

        self.arm = arm
        self.facts: dict[str, Any] = {}
        self.log = log_dir / f"{arm.name}.log"
        self._settings = settings
        # spawn: a forked engine would inherit threads and locks of this process.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=engine.serve, args=(theirs, arm, settings, str(self.log)), name=f"arm-{arm.name}"
        )
        self._process.start()
        theirs.close()  # so that its end shows as EOF here

    def wait_ready(self) -> None:
        """Wait until the engine serves.

        Raises:
            ArmFailed: it did not start.
        """
        self.facts = self._reply(self._settings.start_timeout_s, "start")

    def generate(self, work: Work) -> Block:
        """Send the prompts and wait for all of them.

        Raises:
            ArmFailed: the engine stopped.
        """
        try:
            self._connection.send(("generate", work))
        except OSError:
            raise ArmFailed(f"its engine process ended with code {self._exit_code()}") from None
        return self._reply(self._settings.block_timeout_s, "answer")

    def _reply(self, timeout: float, what: str) -> Any:
        try:
            if not self._connection.poll(timeout):
                raise ArmFailed(f"did not {what} within {timeout:.0f} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise ArmFailed(f"its engine process ended with code {self._exit_code()}") from None
        if kind == "failed":
            raise ArmFailed(value)
        return value

    def _exit_code(self) -> int | None:
        self._process.join(5)
        return self._process.exitcode

    def close(self, grace_s: float = 10.0) -> None:
        """End the engine process: hang up, and kill it if it has not ended ``grace_s`` later. Safe to call twice."""
        self._connection.close()
        self._process.join(grace_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@dataclass
class ArmResult:
    """An arm's blocks, in the order of the run's blocks; ``failure`` says why there are none."""

    arm: Arm
    blocks: list[Block] = field(default_factory=list)
    failure: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


Progress = Callable[[str, str, int], None]


def available_gib() -> float:
    """Memory that could be used now, in GiB; 0 where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0.0
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields.get("MemAvailable", "0").split()[0]) / 2**20


def run(
    arms: Sequence[Arm],
    settings: EngineSettings,
    blocks: Sequence[Work],
    log_dir: Path,
    *,
    together: bool,
    progress: Progress = lambda arm, state, done: None,
) -> list[ArmResult]:
    """Give every block of work to every arm, after two warm-up prompts, and collect what they did.

    Args:
        together: keep all engines up and give each block to every arm in turn; otherwise one arm after another.
        progress: called with the arm's name, ``starting`` / ``running`` / ``done`` / ``failed``, and how many blocks
            it has answered.

    An arm that fails is left out from then on and says why; the others go on.
    """
    results = [ArmResult(arm) for arm in arms]
    groups = [results] if together else [[result] for result in results]
    for group in groups:
        live: dict[str, ArmProcess] = {}
        try:
            _start(group, live, settings, log_dir, progress)
            for done, work in enumerate(blocks, 1):
                # Another arm begins with each block, so that none is always the one after a pause.
                turn = done % len(group)
                for result in [*group[turn:], *group[:turn]]:
                    name = result.arm.name
                    if name not in live:
                        continue
                    try:
                        result.blocks.append(live[name].generate(work))
                        progress(name, "done" if done == len(blocks) else "running", done)
                    except ArmFailed as error:
                        _give_up(result, live, error, progress)
        except BaseException:
            for process in live.values():  # interrupted: an engine amid a block would not notice for a while
                process.close(grace_s=0)
            raise
        for process in live.values():
            process.close()
    return results


def _start(
    group: Sequence[ArmResult],
    live: dict[str, ArmProcess],
    settings: EngineSettings,
    log_dir: Path,
    progress: Progress,
) -> None:
    """Start and warm up the arms of ``group`` into ``live``.

    Eager engines start side by side. Compiled ones start one after another: the first fills vLLM's compile cache.
    """
    for side_by_side in [group] if settings.eager else [[result] for result in group]:
        for result in side_by_side:
            live[result.arm.name] = ArmProcess(result.arm, settings, log_dir)
            progress(result.arm.name, "starting", 0)
        for result in side_by_side:
            try:
                process = live[result.arm.name]
                process.wait_ready()
                result.facts = process.facts
            except ArmFailed as error:
                _give_up(result, live, error, progress)
    for result in group:
        if result.arm.name in live:
            try:
                for prompt in WARM_UP_PROMPTS:
                    live[result.arm.name].generate(Work([prompt], [32]))
                progress(result.arm.name, "running", 0)
            except ArmFailed as error:
                _give_up(result, live, error, progress)


def _give_up(result: ArmResult, live: dict[str, ArmProcess], error: ArmFailed, progress: Progress) -> None:
    result.failure = str(error)
    live.pop(result.arm.name).close()
    progress(result.arm.name, "failed", len(result.blocks))
