"""``specplug doctor``: what will work here, and why not. It never fails itself."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_specplug import cpu_setup
from vllm_specplug.ab import environment

from .common import add_json_flag, describe_error

PLUGIN_GROUP = "vllm.general_plugins"
CPU_SETUP = "python -m vllm_specplug.cpu_setup"


@dataclass(frozen=True)
class Feature:
    """One thing the plugin can do, whether it works here, and why or why not."""

    name: str
    works: bool
    why: str


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``doctor``."""
    parser = commands.add_parser("doctor", help="what will work here, and why not")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 if speculation can work here, 1 otherwise."""
    # vLLM's own start-up lines would mix with the report.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    report = examine()
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0 if report["works"] else 1


def examine() -> dict[str, Any]:
    """Everything doctor knows, as one document."""
    host = _host()
    plugin = _plugin()
    proposers = _attempt(_proposers, [])
    features = [
        _chains(host, plugin, proposers),
        _serve_command(),
        _transformers(),
        _trees(host),
        _sparse(host),
        _on_device(host),
    ]
    return {
        "works": features[0].works,
        "versions": environment.versions(),
        "platform": environment.compute_platform(),
        "plugin": plugin,
        "proposers": proposers,
        "host": host,
        "features": [asdict(feature) for feature in features],
    }


def _attempt(question: Callable[[], Any], otherwise: Any) -> Any:
    """The answer, or ``otherwise`` if asking failed in any way: doctor has to survive every broken environment."""
    try:
        return question()
    except Exception:
        return otherwise


def _host() -> dict[str, Any]:
    """Is this vLLM supported, and is every symbol that the plugin relies on there?"""
    try:
        from vllm_specplug.host import compat

        level, message = compat.support_status()
        symbols = [asdict(p) for p in compat.probe()]
    except Exception as error:
        return {"level": "unsupported", "message": f"vLLM cannot be examined: {describe_error(error)}", "symbols": []}
    return {"level": level, "message": message, "symbols": symbols}


def _plugin() -> dict[str, Any]:
    """Would vLLM load the plugin?"""
    points = _attempt(lambda: list(importlib.metadata.entry_points(group=PLUGIN_GROUP, name="specplug")), [])
    allowed = os.environ.get("VLLM_PLUGINS")
    error = None
    if not points:
        error = "its entry point is missing: install the package (pip install vllm-specplug)"
    elif allowed is not None and "specplug" not in allowed.split(","):
        error = f"VLLM_PLUGINS={allowed} leaves it out: add specplug"
    else:
        try:
            points[0].load()
        except Exception as failure:
            error = describe_error(failure)
    return {"entry_point": points[0].value if points else None, "error": error}


def _proposers() -> list[dict[str, Any]]:
    from vllm_specplug import registry

    found = []
    for name, entry in registry.proposers().items():
        error = None
        try:
            entry.load()
        except Exception as failure:
            error = describe_error(failure)
        found.append({"name": name, "from": entry.origin, "error": error})
    return found


def _chains(host: dict[str, Any], plugin: dict[str, Any], proposers: list[dict[str, Any]]) -> Feature:
    missing = [s["name"] for s in host["symbols"] if s.get("required", True) and not s["found"]]
    usable = [p["name"] for p in proposers if p["error"] is None]
    if host["level"] == "unsupported":
        why = host["message"]
    elif missing:
        why = "this vLLM lacks " + ", ".join(missing)
    elif plugin["error"]:
        why = "vLLM would not load the plugin: " + plugin["error"]
    elif not usable:
        why = "no proposer can be loaded: " + "; ".join(f"{p['name']}: {p['error']}" for p in proposers)
    else:
        names = ", ".join(f"vllm_specplug.{name}" for name in usable)
        return Feature("speculation (chains)", True, f"--spec-model {names} --spec-tokens K")
    return Feature("speculation (chains)", False, why)


def _trees(host: dict[str, Any]) -> Feature:
    """Whether trees can be verified also depends on the model and the server's settings; the server's log says."""
    missing = [s["name"] for s in host["symbols"] if not s["found"]]
    device = _device()
    if host["level"] == "unsupported":
        return Feature("draft trees", False, host["message"])
    if missing:
        return Feature("draft trees", False, "this vLLM lacks " + ", ".join(missing))
    if device != "cpu":
        found = f"chains on {device or 'nothing'}; trees on a CUDA GPU by choice (gpu_trees), but none has run them yet"
        return Feature("draft trees", False, found)
    return Feature(
        "draft trees", True, "for models with ordinary attention; else drafts are chains, and the log says why"
    )


def _sparse(host: dict[str, Any]) -> Feature:
    """Whether verification can be approximate, for who asks for it."""
    name = "sparse verification"
    if host["level"] == "unsupported":
        return Feature(name, False, host["message"])
    asked = "approximate, only by name: --spec-model vllm_specplug.SparseVerify"
    if _device() != "cpu":
        return Feature(name, False, f"{asked}, with gpu_trees; never run on a GPU by its authors")
    return Feature(name, True, asked)


def _on_device(host: dict[str, Any]) -> Feature:
    """Whether drafts can be made on the device, in Model Runner V2."""
    name = "drafting on the device"
    if host["level"] == "unsupported":
        return Feature(name, False, host["message"])
    if _device() in ("cpu", None):
        return Feature(name, False, "needs a CUDA GPU")
    from vllm_specplug.host import compat

    missing = _attempt(compat.missing_for_device_drafts, ["its Model Runner V2"])
    if missing:
        return Feature(name, False, "this vLLM lacks " + ", ".join(missing))
    return Feature(name, False, "by choice (on_device); never run on a GPU by its authors")


def _device() -> str | None:
    return _attempt(lambda: environment.compute_platform()["device"], None)


def _serve_command() -> Feature:
    name = "`vllm` command"
    if not environment.has_module("vllm"):
        return Feature(name, False, "vLLM is not installed")
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return Feature(
            name,
            False,
            f"no distribution is called vllm; run {CPU_SETUP}, or use python -m vllm.entrypoints.openai.api_server",
        )
    return Feature(name, True, f"vllm {version}")


def _transformers() -> Feature:
    """Is something beside transformers that makes its import fail? Found without importing any of it."""
    site = Path(sysconfig.get_paths()["purelib"])
    name = "model loading"
    with contextlib.suppress(Exception):
        torch = cpu_setup.find("torch", site)
        if torch is not None and cpu_setup.accelerator_of(torch) is None:
            for companion in cpu_setup.COMPANIONS:
                found = cpu_setup.find(companion, site)
                built = cpu_setup.accelerator_of(found) if found else None
                if built:
                    return Feature(name, False, f"{companion} is built for {built} beside a CPU torch; run {CPU_SETUP}")
    absent = [module for module in ("torch", "transformers") if not environment.has_module(module)]
    if absent:
        return Feature(name, False, f"{' and '.join(absent)} not installed")
    return Feature(name, True, "torch and transformers fit together")


def _text(report: dict[str, Any]) -> str:
    versions, platform, host, plugin = (report[key] for key in ("versions", "platform", "host", "plugin"))
    lines = ["versions"]
    lines += [f"  {name:<18}{version or 'not installed'}" for name, version in versions.items()]
    lines += ["platform", f"  {'processor':<18}{platform['cpu'] or 'unknown'}, {platform['cpus']} usable"]
    lines.append(f"  {'device':<18}{platform['device'] or 'unknown (torch cannot be imported)'}")
    lines.append(f"  {'instruction set':<18}{platform['isa'] or 'unknown'}")
    layout = f", layout {platform['attention_layout']}" if platform["attention_layout"] else ""
    lines.append(f"  {'attention':<18}{platform['attention_backend'] or 'unknown'}{layout}")
    lines += ["plugin", f"  {'entry point':<18}{plugin['error'] or plugin['entry_point']}"]
    for proposer in report["proposers"]:
        state = proposer["error"] or f"from {proposer['from']}"
        lines.append(f"  {proposer['name']:<18}{state}")
    lines += ["vLLM", f"  {'support':<18}{host['message']}"]
    found = sum(symbol["found"] for symbol in host["symbols"])
    lines.append(f"  {'symbols':<18}{found} of {len(host['symbols'])} found")
    lines += [f"  {'missing':<18}{s['name']}: {s['detail']}" for s in host["symbols"] if not s["found"]]
    lines.append("features")
    lines += [f"  {'yes' if f['works'] else 'no':<4}{f['name']}: {f['why']}" for f in report["features"]]
    return "\n".join(lines)
