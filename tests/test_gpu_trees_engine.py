"""Draft trees on GPUs in a real engine in float32, in Triton's interpreter: the same tokens as without speculation in
every odd situation, with trees that branch and rows that move. `gpu_trees_driver.py` is what runs, in TRITON_ATTN but
where FLASH_ATTN is named."""

from __future__ import annotations

import interpreted
import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton")

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def scenarios():
    return interpreted.run("gpu_trees_driver", "usual")


def sound(found, moved, backend="TritonAttention"):
    """The facts of a scenario, which had trees that this plugin attended, and in which so many rows moved at least."""
    assert found["found"] == found["want"]
    assert (found["reason"], found["errors"], found["impl"]) == ("", 0, f"Tree{backend}Impl")
    trees = found["trees"]
    assert trees["tree_steps"] == sum(found["steps"].values()) > 0, "steps of trees that were not attended as such"
    assert trees["rows_moved"] >= moved
    assert trees["tree_nodes_verified"] > trees["tree_nodes_accepted"] > 0
    return found


def test_prompts_arrive_in_chunks_while_others_verify(scenarios):
    found = sound(scenarios["mixed batches"], 30)
    assert found["steps"]["beside prompts"] > 0 and found["steps"]["alone"] > 5


def test_blocks_that_held_trees_are_reused(scenarios):
    assert sound(scenarios["prefix hits"], 2)["hits"] >= 200


def test_samples_are_those_without_speculation(scenarios):
    found = sound(scenarios["sampled"], 8)
    assert len({tuple(tokens) for tokens in found["found"]}) == 3


def test_preemption_in_flash_attention():
    """vLLM's other backend for GPUs, its compiled functions written out; see `flash_attention`."""
    found = interpreted.run("gpu_trees_driver", "tight", flash=3)["preemption"]
    assert sound(found, 10, "FlashAttention")["preemptions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 3])
def test_flash_attention_in_every_situation(version):
    found = interpreted.run("gpu_trees_driver", "usual", "window", flash=version)
    for name, moved in (("mixed batches", 30), ("prefix hits", 2), ("sampled", 8), ("window", 10)):
        sound(found[name], moved, "FlashAttention")
    assert found["mixed batches"]["steps"]["beside prompts"] > 0 and found["window"]["windows"] == [20, 20]


@pytest.mark.slow
def test_a_sliding_window_preemption_and_proposers():
    found = interpreted.run("gpu_trees_driver", "window", "tight", "proposers")
    assert sound(found["preemption"], 10)["preemptions"] > 0
    assert sound(found["window"], 10)["windows"] == [20, 20]
    for name in ("TokenRecycling", "Auto"):
        sound(found[name], 1)
