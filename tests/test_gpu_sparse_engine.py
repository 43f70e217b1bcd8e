"""SparseVerify on GPUs in a real engine in float32, in Triton's interpreter: exact at its exact values, and else every
layer attends what the definitions say. `gpu_sparse_driver.py` is what runs."""

from __future__ import annotations

import interpreted
import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton")

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=[None, pytest.param(3, marks=pytest.mark.slow)], ids=["triton", "flash"])
def scenarios(request):
    return interpreted.run("gpu_sparse_driver", flash=request.param)


def defined(found):
    """The scenario's sparse layers were all looked at, and are what the definitions say."""
    assert (found["reason"], found["errors"]) == ("", 0)
    assert found["seen"]["layers"] > 5 and found["seen"]["choices"] > 10
    assert found["seen"]["other choices"] == 0
    assert found["worst"]["output"] < 1e-5 and found["worst"]["summary"] < 1e-5
    return found


def test_short_contexts_are_exact(scenarios):
    found = scenarios["short"]
    assert found["found"] == [tokens[:8] for tokens in scenarios["want"][:2]]
    assert found["reason"] == "" and found["sparse"]["sparse_attention_steps"] == 0
    assert found["sparse"]["sparse_summary_bytes"] > 0


def test_everything_chosen_is_the_exact_model(scenarios):
    found = defined(scenarios["everything"])
    assert found["found"] == [tokens[:12] for tokens in scenarios["want"][:3]]
    assert found["sparse"]["sparse_attention_share"] == 1.0 and found["seen"]["left out"] == 0
    assert found["rows_moved"] >= 4 and found["preemptions"] > 0


def test_a_part_of_the_context_as_defined(scenarios):
    """Over prefix hits, preemption and the exact refresh, beside a request that is to be exact."""
    found = defined(scenarios["sparse"])
    assert found["seen"]["left out"] == found["seen"]["choices"] > 40
    assert found["found"][1] == scenarios["want"][1]
    assert found["found"] != scenarios["want"]
    earlier = scenarios["everything"]
    assert all(found[what] > earlier[what] for what in ("preemptions", "hits", "refreshes"))
    assert 0.3 < found["sparse"]["sparse_attention_share"] < 1.0


def test_heads_with_budgets_and_layers_that_take_over_the_choice(scenarios):
    seen = defined(scenarios["heads"])["seen"]
    assert seen["uneven"] == seen["left out"] == seen["choices"] == 2 * seen["taken over"]


def test_requests_that_ended_leave_nothing(scenarios):
    assert scenarios["end"]["live"] == 0
