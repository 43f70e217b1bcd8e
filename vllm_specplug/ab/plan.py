"""What a comparison of servers is asked to do: arms, loads and numbers, from the command line and from a YAML file.

Both write the same things, so both go through the same checks: an option of the command line is the YAML key of the
same name, with dashes or underscores. A value of the command line wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_specplug import options, registry
from vllm_specplug.ab import environment
from vllm_specplug.ab.results import Arm, Load

#: The arms compared where none are named; ``suffix`` only where vLLM has what it needs for it.
DEFAULT_ARMS = ("none", "ngram", "suffix", "auto")
#: What vLLM's suffix decoding imports.
SUFFIX_MODULE = "arctic_inference"
APIS = ("chat", "completions")
#: The name of the requests that come with this package.
BUNDLED = "bundled"
#: As many requests are taken from a larger file if their number is not asked for.
MOST_REQUESTS = 64
#: Requests of the workload that fidelity is measured on.
FIDELITY_REQUESTS = 32
#: What an arm's flags say where its output is approximate; also where it is only held, or set to exact values.
_APPROXIMATE = re.compile(r"SparseVerify|sparse_verify")
#: Set by the run for every server it starts.
_RESERVED = ("--host", "--port", "--uds")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


class UsageError(ValueError):
    """What was asked for cannot be done. The message is one line for the user: what, where, what is allowed."""


@dataclass(frozen=True)
class Settings:
    """A checked request for a comparison.

    Attributes:
        arms: the first is the control.
        loads: in turn.
        model: path or name, as ``vllm serve`` takes it; empty if all arms are servers that already run.
        workload: file of requests; None: the bundled one.
        requests: how many of them; 0: all, at most :data:`MOST_REQUESTS`.
        output_tokens: most per request.
        temperature: of sampling; 0: greedy.
        repeats: passes over the workload under every load.
        blocks: most parts that a pass is cut in.
        seed: of the choice and order of requests, of arrivals and of sampling.
        ignore_eos: every output has ``output_tokens``.
        api: ``chat`` or ``completions``, for prompts that are text; token ids are always sent as completions.
        serve_args: further flags of every server that the run starts.
        together: all servers up at once; False: one after another; None: as memory allows.
        keep_servers: do not start them anew for each pass.
        port: of the first server, the next ones follow; 0: any free ones.
        timeout_s: for one request.
        start_timeout_s: for a server to answer.
        out: folder of the results; None: one named after the time.
        fidelity: arms whose fidelity is measured.
        fidelity_requests: on so many requests; 0: it is not.
    """

    arms: tuple[Arm, ...]
    loads: tuple[Load, ...]
    model: str = ""
    workload: Path | None = None
    requests: int = 0
    output_tokens: int = 96
    temperature: float = 0.0
    repeats: int = 3
    blocks: int = 8
    seed: int = 0
    ignore_eos: bool = False
    api: str = "chat"
    serve_args: tuple[str, ...] = ()
    together: bool | None = None
    keep_servers: bool = False
    port: int = 0
    timeout_s: float = 300.0
    start_timeout_s: float = 1200.0
    out: Path | None = None
    fidelity: tuple[str, ...] = ()
    fidelity_requests: int = FIDELITY_REQUESTS

    @property
    def starts_servers(self) -> bool:
        """Whether any arm is a server that the run starts."""
        return any(not arm.url for arm in self.arms)

    @property
    def approximate(self) -> list[str]:
        """Arms whose output is known to be approximate; of a server that already runs nothing is known."""
        return [arm.name for arm in self.arms if is_approximate(arm)]


# Arms


def presets() -> dict[str, list[str]]:
    """Flags of every arm that has a name of its own: vLLM's methods, and each registered proposer in kebab case."""
    known: dict[str, list[str]] = {
        "none": [],
        # The settings that were found best for these two where this project measured them (README, Measured).
        "ngram": _config(method="ngram", num_speculative_tokens=5, prompt_lookup_min=2, prompt_lookup_max=4),
        "suffix": _config(method="suffix", num_speculative_tokens=8, suffix_decoding_max_spec_factor=2.0),
    }
    for entry in registry.proposers().values():
        tokens = 16 if entry.name == "Auto" else 8
        model = [f"--spec-model={registry.PACKAGE}.{entry.name}", f"--spec-tokens={tokens}"]
        known[entry.section.replace("_", "-")] = model
    known["sparse"] = [f"--spec-model={registry.PACKAGE}.SparseVerify", "--spec-tokens=16"]
    adaptive = [f"--spec-model={registry.PACKAGE}.AdaptiveLength", "--spec-tokens=8"]
    for inner in ("ngram", "suffix"):
        choice = json.dumps({"specplug": {"adaptive_length": {"inner": f"vllm:{inner}"}}})
        known[f"adaptive-{inner}"] = [*adaptive, f"--additional-config={choice}"]
    return known


def _config(**speculative: Any) -> list[str]:
    return [f"--speculative-config={json.dumps(speculative)}"]


def default_arms() -> tuple[list[Arm], list[str]]:
    """The arms of a run that names none, and a line for each that is left out."""
    known = presets()
    arms = [Arm(name, known[name]) for name in DEFAULT_ARMS]
    if environment.has_module(SUFFIX_MODULE):
        return arms, []
    note = "suffix is left out: vLLM's suffix decoding needs the package arctic-inference, which is not installed."
    return [arm for arm in arms if arm.name != "suffix"], [note]


def parse_arm(text: str, where: str = "--arm") -> Arm:
    """An arm as the command line has it: ``PRESET``, ``NAME=FLAGS``, ``NAME=PRESET FLAGS`` or ``NAME=URL``.

    Raises:
        UsageError: it is none of these.
    """
    name, equals, rest = text.partition("=")
    name = name.strip()
    # A flag has an equals sign as well: what precedes it is no name then.
    if not equals or not _NAME.fullmatch(name):
        if name in presets() and not equals:
            return Arm(name, presets()[name])
        if _NAME.fullmatch(name) and not equals:
            raise UsageError(
                f"{where} {text}: there is no preset of that name.{options.nearest(name, presets())} Presets: "
                f"{', '.join(sorted(presets()))}; other arms are written NAME=FLAGS or NAME=http://HOST:PORT."
            )
        raise UsageError(
            f"{where} {text}: expected a preset's name, NAME=FLAGS or NAME=http://HOST:PORT, where NAME is up to 40 "
            "letters, digits, dots, dashes and underscores."
        )
    return make_arm(name, rest.strip(), f"{where} {name}")


def make_arm(name: str, value: Any, where: str) -> Arm:
    """The arm ``name`` from its flags, as one string or a list, from a preset's name before further flags, or from a
    URL; None: the preset ``name``. Raises :class:`UsageError`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{where}: a name of up to 40 letters, digits, dots, dashes and underscores is expected.")
    if value is None and name not in presets():
        raise UsageError(f"{where}: flags, a preset's name or a URL are expected; for no flags write none.")
    words = [name] if value is None else _split(value, where)
    if words and re.match(r"https?://", words[0]):
        address = words[0].rstrip("/").removesuffix("/v1")
        if len(words) > 1 or not re.fullmatch(r"https?://[^/\s]+(/\S*)?", address):
            raise UsageError(f"{where} = {value} is not allowed: expected http://HOST:PORT and nothing else.")
        return Arm(name, [], address)
    if words and not words[0].startswith("-"):
        known = presets()
        if words[0] not in known:
            raise UsageError(
                f"{where} = {value} is not allowed: flags begin with a dash, and there is no preset {words[0]}."
                f"{options.nearest(words[0], known)} Presets: {', '.join(sorted(known))}."
            )
        words = [*known[words[0]], *words[1:]]
    _check_flags(words, where)
    return Arm(name, words)


def is_approximate(arm: Arm) -> bool:
    """Whether an arm's flags name a proposer whose output is approximate."""
    if any(_APPROXIMATE.search(flag) for flag in arm.flags):
        return True
    for entry in registry.proposers().values():
        # Of the plugin's own it is known without importing them.
        named = rf"\b{registry.PACKAGE}\.{entry.name}\b"
        if entry.origin != registry.OWN and any(re.search(named, flag) for flag in arm.flags):
            with contextlib.suppress(options.OptionError):  # its server will say it
                return not getattr(entry.load(), "lossless", True)
    return False


def _split(value: Any, where: str) -> list[str]:
    if isinstance(value, str):
        try:
            return shlex.split(value)
        except ValueError as error:
            raise UsageError(f"{where}: the flags {value!r} cannot be split into words: {error}.") from None
    if isinstance(value, Sequence) and all(isinstance(word, (str, int, float)) for word in value):
        return [str(word) for word in value]
    raise UsageError(f"{where} = {value!r} is not allowed: expected flags, a preset's name or a URL.")


def _check_flags(words: Sequence[str], where: str) -> None:
    for word in words:
        flag = word.partition("=")[0]
        if flag in _RESERVED:
            raise UsageError(f"{where}: {flag} is not allowed: the comparison sets it (see --port).")


def _arms(value: Any, where: str) -> tuple[Arm, ...]:
    """The arms of a YAML file (a mapping, or a list of what ``--arm`` takes) or of the command line (such a list)."""
    if isinstance(value, Mapping):
        arms = [make_arm(name, flags, f"{where}.{name}") for name, flags in value.items()]
    elif isinstance(value, (list, tuple)) and value and all(isinstance(text, str) for text in value):
        arms = [parse_arm(text, where) for text in value]
    else:
        raise UsageError(f"{where} = {value!r} is not allowed: expected a mapping from names to flags or URLs.")
    names = [arm.name.lower() for arm in arms]
    for name in names:
        # Lower case: log files are named after them.
        if names.count(name) > 1:
            raise UsageError(f"{where}: two arms are called {name}; write NAME={name} for one of them.")
    if not arms:
        raise UsageError(f"{where}: no arm is named.")
    return tuple(arms)


# Options


def _number(low: float, high: float, whole: bool) -> Callable[[Any, str], Any]:
    def parse(value: Any, where: str) -> Any:
        try:
            # int("1e3") fails where float does not, and YAML has read its numbers already.
            number = int(value) if whole and isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not low <= number <= high or (whole and number != int(number)):
            kind = "a whole number" if whole else "a number"
            raise UsageError(f"{where} = {value} is not allowed: expected {kind} from {low:g} to {high:.10g}.")
        return int(number) if whole else number

    return parse


def _numbers(low: float, high: float, whole: bool) -> Callable[[Any, str], Any]:
    one = _number(low, high, whole)

    def parse(value: Any, where: str) -> Any:
        values = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        found = tuple(one(v.strip() if isinstance(v, str) else v, where) for v in values)
        if len(set(found)) < len(found) or not found:
            raise UsageError(f"{where} = {value} is not allowed: expected different numbers, separated by commas.")
        return found

    return parse


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{where} = {value!r} is not allowed: expected true or false.")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where} = {value!r} is not allowed: expected a name or a path.")
    return value


def _path(value: Any, where: str) -> Path | None:
    text = _text(str(value) if isinstance(value, Path) else value, where)
    return Path(text).expanduser()


def _names(value: Any, where: str) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise UsageError(f"{where} = {value!r} is not allowed: expected arms' names, separated by commas, or all.")
    return tuple(dict.fromkeys(name.strip() for name in names))


def _workload(value: Any, where: str) -> Path | None:
    return None if str(value) == BUNDLED else _path(value, where)


def _serve_args(value: Any, where: str) -> tuple[str, ...]:
    words = _split(value, where)
    if words and not words[0].startswith("-"):
        raise UsageError(f"{where} = {value} is not allowed: expected flags of `vllm serve`, which begin with a dash.")
    _check_flags(words, where)
    return tuple(words)


def _api(value: Any, where: str) -> str:
    if value not in APIS:
        raise UsageError(f"{where} = {value} is not allowed: expected one of {', '.join(APIS)}.")
    return str(value)


_SECONDS = _number(1, 86400, whole=False)

#: Name of each option, as :class:`Settings` and a YAML file have it, and how its value is read.
OPTIONS: dict[str, Callable[[Any, str], Any]] = {
    "arms": _arms,
    "model": _text,
    "workload": _workload,
    "concurrency": _numbers(1, 4096, whole=True),
    "rate": _numbers(1e-3, 1e5, whole=False),
    "requests": _number(1, 1e6, whole=True),
    "output_tokens": _number(1, 131072, whole=True),
    "temperature": _number(0, 2, whole=False),
    "repeats": _number(1, 1000, whole=True),
    "blocks": _number(1, 10000, whole=True),
    "seed": _number(0, 2**31 - 1, whole=True),
    "ignore_eos": _flag,
    "api": _api,
    "serve_args": _serve_args,
    "together": _flag,
    "keep_servers": _flag,
    "port": _number(1024, 65535, whole=True),
    "timeout_s": _SECONDS,
    "start_timeout_s": _SECONDS,
    "out": _path,
    "fidelity": _names,
    "fidelity_requests": _number(0, 1e6, whole=True),
}
DEFAULT_CONCURRENCY = (1, 8)


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file, not checked yet but for their names.

    Raises:
        UsageError: it cannot be read, is no mapping, or has an unknown key.
    """
    try:
        import yaml
    except ImportError:
        raise UsageError("--config needs the package pyyaml, which vLLM installs") from None
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"--config {path}{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"--config {path}: expected a mapping with the key arms or other options of the command.")
    found = {}
    for key, value in document.items():
        name = str(key).replace("-", "_")
        if name not in OPTIONS:
            raise UsageError(
                f"--config {path}: unknown key {key}.{options.nearest(name, OPTIONS)} Allowed: {', '.join(OPTIONS)}."
            )
        if value is not None:
            found[name] = value
    return found


def build(given: Mapping[str, Any], config: Path | None = None) -> tuple[Settings, list[str]]:
    """Checked settings, and lines that the user should read.

    Args:
        given: options of the command line by name; an option that was not given is None or missing.
        config: YAML file with further ones.

    Raises:
        UsageError: on the first thing that is wrong.
    """
    values: dict[str, Any] = {}
    for name, value in (read_config(config) if config else {}).items():
        values[name] = OPTIONS[name](value, f"--config {config}: {name}")
    for name, value in given.items():
        if value is not None:
            flag = "--arm" if name == "arms" else name if name == "model" else "--" + name.replace("_", "-")
            values[name] = OPTIONS[name](value, flag)
    notes: list[str] = []
    if "concurrency" in values and "rate" in values:
        raise UsageError("--concurrency and --rate exclude each other: requests arrive in one way or the other.")
    rates = values.pop("rate", ())
    concurrency = values.pop("concurrency", () if rates else DEFAULT_CONCURRENCY)
    loads = tuple(Load(rate=r) for r in rates) + tuple(Load(concurrency=c) for c in concurrency)
    if "arms" not in values:
        arms, notes = default_arms()
        values["arms"] = tuple(arms)
    settings = Settings(loads=loads, **values)
    settings = dataclasses.replace(settings, fidelity=_fidelity(settings, values.get("fidelity")))
    if settings.keep_servers and settings.together is False:
        raise UsageError("--keep-servers and --in-turn exclude each other.")
    if settings.starts_servers and settings.port + len(settings.arms) > 65536:
        raise UsageError(f"--port = {settings.port} is not allowed: {len(settings.arms)} ports from there are needed.")
    return settings, notes


def _fidelity(settings: Settings, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The arms whose fidelity is measured: those that were asked for, or all that are known to be approximate."""
    others = [arm.name for arm in settings.arms[1:]]
    if asked is None:
        return tuple(name for name in others if name in settings.approximate)
    if asked == ("all",):
        return tuple(others)
    for name in asked:
        if name not in others:
            allowed = f"one of {', '.join(others)}, or all" if others else "a second arm is needed"
            raise UsageError(f"--fidelity = {name} is not allowed: {allowed}; the first arm is what they are held to.")
    return asked
