"""A dense layer split into experts computes the same with all of them; and the export of the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from vllm_specplug import moe_split
from vllm_specplug.cli import main, model


def rows(count: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_groups_are_equal_and_of_rows_that_are_alike() -> None:
    directions = torch.eye(5)
    kind = torch.arange(40) % 5
    groups = moe_split._groups(directions[kind] + 0.05 * rows(40, 5, 0).abs(), 5)
    assert sorted(torch.cat(groups).tolist()) == list(range(40))
    assert all(len(group) == 8 and len(kind[group].unique()) == 1 for group in groups)
    # One kind is too many for a group: its rows go elsewhere, and groups stay equal.
    groups = moe_split._groups(directions[torch.zeros(40, dtype=torch.long)] + 0.05 * rows(40, 5, 1).abs(), 5)
    assert sorted(torch.cat(groups).tolist()) == list(range(40))
    assert all(len(group) == 8 for group in groups)


def test_all_experts_together_are_the_dense_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_split, "EXPERTS", 6)
    monkeypatch.setattr(moe_split, "EXPERT_SIZE", 8)
    hidden, channels, layer = 24, 64, 3
    gate, up, down = rows(channels, hidden, 0), rows(channels, hidden, 1), rows(hidden, channels, 2)
    x = rows(200, hidden, 3)
    active = silu(x @ gate.T) * (x @ up.T)
    mlp = f"model.layers.{layer}.mlp"
    weights = {f"{mlp}.gate_proj.weight": gate, f"{mlp}.up_proj.weight": up, f"{mlp}.down_proj.weight": down}
    moe_split._split_layer(weights, layer, x.half(), (active.abs() * down.norm(dim=0)).half())

    def part(name: str) -> torch.Tensor:
        g, u, d = (weights[f"{mlp}.{name}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        return (silu(x @ g.T) * (x @ u.T)) @ d.T

    assert weights[f"{mlp}.shared_expert.gate_proj.weight"].shape == (channels - 48, hidden)
    logits = x @ weights[f"{mlp}.gate.weight"].T
    assert logits.std() == pytest.approx(moe_split.SPREAD, rel=0.2)
    shares = logits.softmax(dim=1)
    experts = torch.stack([part(f"experts.{e}") for e in range(6)], dim=1)
    together = part("shared_expert") * (x @ weights[f"{mlp}.shared_expert_gate.weight"].T).sigmoid()
    together += (shares[:, :, None] * experts).sum(dim=1)
    dense = active @ down.T
    assert (together - dense).norm() / dense.norm() < 2 * moe_split.SPREAD
    # The router prefers the experts that add most.
    best = experts.norm(dim=2).argmax(dim=1)
    assert (logits.topk(3, dim=1).indices == best[:, None]).any(dim=1).double().mean() > 0.6


def test_export_as_a_mixture_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(gguf: Path, target: Path, dtype: str) -> None:
        (target / "config.json").write_text(json.dumps({"dtype": dtype}))

    def split(source: Path, target: Path) -> None:
        (target / "config.json").write_text((source / "config.json").read_text())
        (target / "model.safetensors").write_text("experts")

    monkeypatch.setattr(model, "installed_version", lambda name: "1")
    monkeypatch.setattr(model, "_gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(model, "_convert", convert)
    monkeypatch.setattr(moe_split, "split", split)
    assert main.main(["model", "export", str(tmp_path / "m"), "--moe", "--dtype", "float32"]) == 0
    assert "as a mixture of experts (float32" in capsys.readouterr().out
    assert model.is_exported(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == {"dtype": "float32"}
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_model_too_small_is_refused(tmp_path: Path) -> None:
    from engines import make_tiny_llama

    with pytest.raises(ValueError, match="256 channels cannot hold 24 experts of 32"):
        moe_split.split(make_tiny_llama(tmp_path / "tiny", 300), tmp_path / "moe")
