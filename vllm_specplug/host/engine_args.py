"""Start-up in the front process: flag spellings, and checks that end in one clear message.

Everything a user can get wrong is checked here, before vLLM starts an engine process: an error raised in
that process would reach the user as two nested tracebacks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from vllm_specplug import options, registry
from vllm_specplug.host import (
    compat,
    device_lengths,
    metrics,
    numba_guard,
    patching,
    sampling_params,
    sparse_calibration,
)
from vllm_specplug.trace import options as trace_options

#: Older spellings of vLLM's own flags, still in many launch scripts: flag -> (current flag, destination, type).
OLDER_FLAGS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "--speculative-model": ("--spec-model", "spec_model", str),
    "--num-speculative-tokens": ("--spec-tokens", "spec_tokens", int),
}

#: vLLM's rejection sampler verifies at most this many draft tokens (v1/sample/rejection_sampler.py).
MAX_DRAFT_TOKENS = 128

#: Named, not imported: it is needed in the engine's process only.
SPARSE_SCHEDULER = "vllm_specplug.host.sparse_scheduler.RefreshingScheduler"
DEVICE_WORKER = "vllm_specplug.host.gpu_worker.DeviceDraftWorker"
#: Proposers that draft on the device, in vLLM's Model Runner V2; see :mod:`vllm_specplug.host.gpu_speculator`.
DEVICE_PROPOSERS = ("Auto", "Retrieval", "TokenRecycling")

_warned: set[str] = set()


def install() -> None:
    """Patch vLLM's engine arguments if they are imported in this process. Idempotent."""
    # Everything that builds or parses engine arguments loads plugins from that very module, so where it is
    # not imported there is nothing to patch, and importing it would only slow that process's start.
    module = sys.modules.get("vllm.engine.arg_utils")
    engine_args = getattr(module, "EngineArgs", None)
    if engine_args is None:
        return
    patching.wrap(engine_args, "add_cli_args", _add_cli_args)
    patching.wrap(engine_args, "from_cli_args", _from_cli_args)
    patching.wrap(engine_args, "create_engine_config", _create_engine_config)
    sampling_params.install_front()


def uninstall() -> None:
    """Undo :func:`install`."""
    engine_args = getattr(sys.modules.get("vllm.engine.arg_utils"), "EngineArgs", None)
    if engine_args is not None:
        for name in ("add_cli_args", "from_cli_args", "create_engine_config"):
            patching.unwrap(engine_args, name)
    sampling_params.uninstall()


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        """Add the older flag names. ``EngineArgs.add_cli_args`` is where every vLLM command gets its engine
        flags from, after plugins are loaded; flags vLLM already has are left alone."""
        parser = original(parser)
        for flag, (current, destination, kind) in OLDER_FLAGS.items():
            if flag not in parser._option_string_actions:
                parser.add_argument(
                    flag,
                    dest=destination,
                    type=kind,
                    # Without this the flag's None would overwrite what the current spelling set.
                    default=parser.get_default(destination),
                    help=f"Older spelling of {current} (added by vllm-specplug).",
                )
        return parser

    return add_cli_args


def _from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: type, args: Any) -> Any:
        """Check the plugin's settings as soon as a command line is parsed and exit like argparse does.
        Only command-line programs call this; Python callers get the exception from create_engine_config."""
        engine_args = original(cls, args)
        try:
            check(engine_args)
        except (options.OptionError, patching.HostSymbolMissing) as error:
            print(f"vllm-specplug: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        return engine_args

    return from_cli_args


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Check the plugin's settings before any engine is built. Every entry point, ``LLM`` included, comes
        through here; vLLM's own settings are left to vLLM."""
        arms = check(self)
        sampling_params.install_front()
        numba_guard.protect()  # check() may have imported numba, and so may an earlier engine of this process
        config = original(self, *args, **kwargs)
        if self.worker_cls == DEVICE_WORKER and not config.use_v2_model_runner:
            raise options.OptionError(f"{_DEVICE} needs vLLM's Model Runner V2, which this server does not use.")
        if arms:
            sampling_params.allow_arms(config.speculative_config, arms)
        return config

    return create_engine_config


def check(engine_args: Any) -> list[str]:
    """Check everything the user said to this plugin.

    Returns:
        What requests may name as their arm; empty if no proposer of ours is selected.

    Raises:
        options.OptionError: an unknown proposer, an option or a draft length that is not allowed.
        patching.HostSymbolMissing: this vLLM cannot run the plugin.
    """
    config: Mapping[str, Any] = engine_args.speculative_config or {}
    config = {str(key).replace("-", "_"): value for key, value in config.items()}
    model = config.get("model") or engine_args.spec_model
    additional = engine_args.additional_config
    ours = isinstance(model, str) and (model == registry.PACKAGE or model.startswith(registry.PACKAGE + "."))
    set_options = isinstance(additional, dict) and options.ROOT in additional
    if not ours:
        if set_options:
            registry.parse_options(additional)
            _warn_once(
                f"additional_config has options under '{options.ROOT}' but no proposer of {registry.PACKAGE} is "
                f"selected: add --spec-model {registry.PACKAGE}.{next(iter(registry.proposers()))} --spec-tokens K"
            )
        return []
    entry = registry.find(str(model).removeprefix(registry.PACKAGE).removeprefix("."))
    tokens = config.get("num_speculative_tokens", engine_args.spec_tokens)
    where = "num_speculative_tokens (--spec-tokens)"
    if tokens is None:
        raise options.OptionError(
            f"{where} is required with {registry.PACKAGE}.{entry.name}: the most draft tokens per request and "
            f"step, a whole number from 1 to {MAX_DRAFT_TOKENS}."
        )
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MAX_DRAFT_TOKENS:
        raise options.OptionError(
            f"{where} = {tokens!r} is not allowed: expected a whole number from 1 to {MAX_DRAFT_TOKENS}."
        )
    if config.get("rejection_sample_method") == "synthetic":
        raise options.OptionError(
            f"rejection_sample_method = 'synthetic' is not allowed with {registry.PACKAGE}.{entry.name}: drafts are "
            "verified against the model, none is accepted at a made-up rate."
        )
    user = registry.parse_options(additional)
    user.check(entry)
    method = config.get("method")
    if user.general.on_device and method in (None, "custom_class"):
        method = "ngram_gpu"
    if method not in (None, "custom_class"):
        _prepare_device(str(method), user, entry, engine_args)
        _say_device(engine_args, config, entry, tokens)
        device_lengths.prepare(engine_args, user, entry)
        # Whether a request gets drafts is settled in the scheduler.
        off = [registry.OFF] if engine_args.scheduler_cls == device_lengths.DEVICE_SCHEDULER else []
        return [*off, registry.DEFAULT, entry.section]
    if user.ab.split and str(engine_args.distributed_executor_backend) == "external_launcher":
        raise options.OptionError(
            f"{options.ROOT}.ab.split is not allowed with --distributed-executor-backend external_launcher: every rank "
            "names requests differently, and would assign them to different arms. Name the arm in each request."
        )
    _prepare_sparse(user, entry, engine_args)
    _prepare_state_file(user.general.state_file)
    _prepare_trace(user.trace)
    metrics.install_front(engine_args)
    warning = compat.require()
    if warning:
        _warn_once(warning)
    return list(user.arm_names(entry))


_DEVICE = "specplug.on_device (speculative_config.method = 'ngram_gpu')"


def _say_device(engine_args: Any, config: Mapping[str, Any], entry: registry.Entry, tokens: int) -> None:
    """Name the method that vLLM takes for its own GPU n-grams, however the user asked for ours."""
    said = {"method": "ngram_gpu", "model": f"{registry.PACKAGE}.{entry.name}", "num_speculative_tokens": tokens}
    engine_args.speculative_config = {**config, **said}
    # vLLM refuses flags that say the same again.
    for flag in ("spec_method", "spec_model", "spec_tokens"):
        if hasattr(engine_args, flag):
            setattr(engine_args, flag, None)


def _prepare_device(method: str, user: registry.PluginOptions, entry: registry.Entry, engine_args: Any) -> None:
    """Check a proposer that is to draft on the device, and ask vLLM for the worker that has it."""
    if method != "ngram_gpu":
        raise options.OptionError(
            f"speculative_config.method = {method!r} is not allowed with {registry.PACKAGE}.{entry.name}: expected "
            "custom_class, or ngram_gpu to draft on the device."
        )
    if entry.name not in DEVICE_PROPOSERS:
        raise options.OptionError(f"{_DEVICE} is not there for {entry.name}: expected one of {list(DEVICE_PROPOSERS)}.")
    for name, there in (
        ("ab.arms", bool(user.ab.arms)),
        ("ab.split", bool(user.ab.split)),
        ("state_file", user.general.state_file is not None),
        ("trace.dir", user.trace.dir is not None),
        ("enabled = false", not user.general.enabled),
    ):
        if there:
            raise options.OptionError(f"{options.ROOT}.{name} is not available with {_DEVICE}.")
    missing = compat.missing_for_device_drafts()
    if missing:
        raise options.OptionError(f"{_DEVICE} is not available: this vLLM lacks {', '.join(missing)}.")
    if engine_args.worker_cls not in ("auto", DEVICE_WORKER):
        raise options.OptionError(f"{_DEVICE} is not allowed with --worker-cls {engine_args.worker_cls}.")
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        raise options.OptionError(f"{_DEVICE} needs a CUDA GPU, this is {current_platform.device_name or 'a CPU'}.")
    engine_args.worker_cls = DEVICE_WORKER
    metrics.install_front(engine_args)


def _prepare_sparse(user: registry.PluginOptions, entry: registry.Entry, engine_args: Any) -> None:
    """Check what SparseVerify needs, if the server holds it, and ask vLLM for the scheduler of its exact refresh."""
    held = [arm for arm in user.arms(entry).values() if arm.name == "SparseVerify"]
    if not held:
        return
    chosen = user.section(held[0])
    where = f"{options.ROOT}.{held[0].section}"
    block = engine_args.block_size
    if chosen.unit % 16 or (block and block % chosen.unit):
        raise options.OptionError(
            f"{where}.unit = {chosen.unit} is not allowed: expected a multiple of 16 that divides the KV block size"
            + (f", {block} (--block-size)." if block else ".")
        )
    sparse_calibration.load(chosen.calibration, engine_args.model)
    if not chosen.refresh or not chosen.attention or chosen.ratio >= 1.0:
        return
    if engine_args.scheduler_cls is not None and engine_args.scheduler_cls != SPARSE_SCHEDULER:
        raise options.OptionError(
            f"{where}.refresh is not allowed with --scheduler-cls {engine_args.scheduler_cls}: it needs a scheduler of "
            "its own. Set it to 0."
        )
    engine_args.scheduler_cls = SPARSE_SCHEDULER


def _prepare_state_file(path: str | None) -> None:
    """Check where learned state is to be kept, and see to it that a server that ends has the time to save it."""
    if path is None:
        return
    from vllm_specplug.host import state_file

    state_file.check_path(path)
    if not state_file.install_front():
        _warn_once(f"this vLLM ends engines without notice: {path} is saved every save_every_s seconds only")


def _prepare_trace(trace: trace_options.TraceOptions) -> None:
    """Check where requests are to be recorded, and see to it that a server that ends has the time to write the last."""
    if trace.dir is None:
        return
    from vllm_specplug.host import state_file

    trace_options.check(trace)
    state_file.install_front()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        from vllm.logger import init_logger

        # A name under "vllm." is what vLLM's logging configuration prints.
        init_logger("vllm.specplug").warning("%s", message)
