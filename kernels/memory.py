"""Compiled access to memory by address.

A batch of requests is a batch of separately allocated blocks. Numba has no array of arrays that is cheap to pass, so
compiled code gets an int64 array of block addresses and reads words from them. There are no bounds checks: whoever
calls with an address from outside validates first.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

Kernel = Callable[..., Any]


def _folder_stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, modification time (ns) and size of every module of a folder."""
    files = sorted(folder.glob("*.py"))
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files)


_STAMPS: dict[Path, tuple[tuple[str, int, int], ...]] = {}


def _stamp(module_file: str) -> tuple[tuple[str, int, int], ...]:
    """What a kernel compiled from ``module_file`` depends on: its folder's modules and this folder's."""
    folders = {Path(module_file).resolve().parent, Path(__file__).resolve().parent}
    for folder in folders - _STAMPS.keys():
        _STAMPS[folder] = _folder_stamp(folder)
    return sum((_STAMPS[folder] for folder in sorted(folders)), ())


def _compile(function: Kernel, options: dict[str, Any]) -> Kernel:
    compiled = njit(**options)(function)
    if options.get("cache"):
        # Numba's disk cache notices a change of a function's own file, not of the files of the kernels it calls: after
        # an upgrade that changed only some modules, old and new code would share one memory layout.
        index = compiled._cache._cache_file
        if not hasattr(index, "_source_stamp"):
            raise TypeError("this Numba keeps the stamp of its cache elsewhere")
        index._source_stamp = _stamp(function.__code__.co_filename)
    return compiled  # type: ignore[no-any-return]


def kernel(function: Kernel) -> Kernel:
    """Compile without the GIL, cached on disk where some folder can be written (it need not be in a container).

    Kernels allocate nothing, and `_nrt=False` tells Numba so: without its reference counting of array views a step
    takes a quarter less time. Numba keeps that option private, so a version without it must do as well.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    for extra in ({"cache": True, "_nrt": False}, {"_nrt": False}, {"cache": True}):
        try:
            return _compile(function, options | extra)
        except (RuntimeError, KeyError, TypeError, AttributeError):  # no cache folder; no such option
            continue
    return _compile(function, options)


def c_callable(function: Kernel) -> int:
    """Address, for C callers, of ``function(call)`` as ``void(*)(int64)``; cached on disk if a folder can be written.

    Numba's disk cache keeps such functions apart by the values of their free variables: one of these should be
    `sources_stamp`, so that a changed module is another function.
    """
    for cache in (True, False):
        try:
            compiled = cfunc(types.void(types.int64), nopython=True, error_model="numpy", cache=cache)(function)
            return int(compiled.address)
        except RuntimeError:  # no folder can be written
            if not cache:
                raise
    raise AssertionError


def sources_stamp(module_file: str) -> int:
    """A number that changes with what kernels compiled from ``module_file`` depend on."""
    return zlib.crc32(repr(_stamp(module_file)).encode())


def _pointer(builder: Any, kind: Any, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


@intrinsic
def load(typingctx: Any, address: Any, index: Any) -> Any:
    """The int32 at ``address + 4 * index``, widened to int64 so that sums and products of it cannot overflow."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(builder.load(_pointer(builder, ir.IntType(32), *args)), ir.IntType(64))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def store(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Write ``value`` as int32 to ``address + 4 * index``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(builder.trunc(args[2], ir.IntType(32)), _pointer(builder, ir.IntType(32), args[0], args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def load_float(typingctx: Any, address: Any, index: Any) -> Any:
    """The float32 at ``address + 4 * index``, as float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.load(_pointer(builder, ir.FloatType(), *args)), ir.DoubleType())

    return types.float64(types.int64, types.int64), codegen


@intrinsic
def store_float(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Write ``value`` as float32 to ``address + 4 * index``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(builder.fptrunc(args[2], ir.FloatType()), _pointer(builder, ir.FloatType(), args[0], args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float64), codegen
