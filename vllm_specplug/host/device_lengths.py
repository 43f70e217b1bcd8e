"""Start-up of the budget of drafting on the device: the lengths to choose from, told to vLLM before it starts.

vLLM's Dynamic SD ("num_speculative_tokens_per_batch_size" of its speculative config) is a table from the size of the
batch to a draft length. The runner captures CUDA graphs for every length in it, and the scheduler asks it for each
step's. Here the table lists the lengths that pay at some load, and the scheduler of :mod:`.device_budget` chooses.

In the front process; imports nothing of vLLM's.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm_specplug import options, registry

logger = logging.getLogger("vllm.specplug")

#: Named, not imported: it is needed in the engine's process only.
DEVICE_SCHEDULER = "vllm_specplug.host.device_budget.BudgetedScheduler"
#: vLLM's option.
TABLE = "num_speculative_tokens_per_batch_size"
#: What ``policy`` of a proposer's options may be here.
POLICIES = ("marginal", "fixed")

_warned: set[str] = set()


def prepare(engine_args: Any, user: registry.PluginOptions, entry: registry.Entry) -> None:
    """Ask vLLM for the lengths and the scheduler, in ``engine_args``. May be called again on what it made.

    Args:
        engine_args: vLLM's ``EngineArgs``, whose ``speculative_config`` is a mapping.

    Raises:
        options.OptionError: a policy that is not for this, or a scheduler of the user's own.
    """
    config = {str(key).replace("-", "_"): value for key, value in engine_args.speculative_config.items()}
    most = config.get("num_speculative_tokens") or engine_args.spec_tokens
    section = user.section(entry)
    where = f"{options.ROOT}.{entry.section}.policy"
    policy = getattr(section, "policy", "marginal")
    if policy not in POLICIES:
        raise options.OptionError(
            f"{where} = {policy!r} is not available where drafts are made on the device, since their number is settled "
            f"before they are known: expected one of {', '.join(POLICIES)}."
        )
    ours = engine_args.scheduler_cls == DEVICE_SCHEDULER
    if config.get(TABLE) is not None and not ours:
        return  # the user's own, or that of a fixed length
    if policy == "fixed":
        if section.length < most:
            _set_table(engine_args, config, [section.length])
        return
    if (engine_args.data_parallel_size or 1) > 1:
        _warn_once(f"no budget with data parallelism, where vLLM has no Dynamic SD: always {most} draft tokens.")
        return
    missing = _missing()
    if missing:
        _warn_once(f"no budget: this vLLM lacks {', '.join(missing)}. Always {most} draft tokens.")
        return
    # A table has one length per size of the batch.
    seats = engine_args.max_num_seqs
    if seats == 1:
        _warn_once(f"no budget with --max-num-seqs 1: always {most} draft tokens.")
        return
    if engine_args.scheduler_cls is not None and not ours:
        raise options.OptionError(
            f"drafting on the device is not allowed with --scheduler-cls {engine_args.scheduler_cls}: a scheduler of "
            f"its own chooses how many tokens are drafted. To settle that yourself, set speculative_config.{TABLE}"
            + (f", or {where} to fixed." if hasattr(section, "policy") else ".")
        )
    from vllm_specplug.proposers.draft_length import MOST_LENGTHS, lengths_up_to

    _set_table(engine_args, config, lengths_up_to(most, min(seats or MOST_LENGTHS, MOST_LENGTHS)))
    engine_args.scheduler_cls = DEVICE_SCHEDULER


def table_of(lengths: list[int]) -> list[list[int]]:
    """vLLM's table with these lengths, the longest for one request, and so on: ``[first, last, length]`` sizes of the
    batch. It goes on with the last entry."""
    return [[size, size, length] for size, length in enumerate(sorted(lengths, reverse=True), 1)]


def _set_table(engine_args: Any, config: dict[str, Any], lengths: list[int]) -> None:
    engine_args.speculative_config = config | {TABLE: table_of(lengths)}


def _missing() -> list[str]:
    from vllm_specplug.host import compat

    symbols = (
        ("vllm.config", "SpeculativeConfig", (TABLE,)),
        ("vllm.v1.core.sched.output", "SchedulerOutput", ("num_spec_tokens_to_schedule",)),
        ("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", ()),
        ("vllm.v1.spec_decode.dynamic.utils", "build_dynamic_sd_schedule_lookup", ()),
    )
    probes = (compat.probe_symbol(compat.Symbol(*symbol, "draft lengths by load")) for symbol in symbols)
    return [probe.name for probe in probes if not probe.found]


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning("vllm-specplug: %s", message)
