"""Keeps vLLM's CPU start-up working in a process where numba is already imported.

vLLM 0.29 to 0.32 scan every module's attributes for Triton kernels to replace
(triton_utils/dispatcher.py:_rebind_kernels) and call ``vars(value).get(...)`` on each value that has a
``__dict__``. llvmlite's library handle answers *any* attribute name with a wrapped C function, ``__dict__``
included, so the scan ends in ``AttributeError: '_lib_fn_wrapper' object has no attribute 'get'``. This plugin's
proposers import numba, hence the duty to keep that harmless.
"""

from __future__ import annotations

import sys


def protect() -> bool:
    """Give llvmlite's handle an empty ``__dict__``, if llvmlite is imported. Idempotent; changes no behaviour of
    llvmlite, which never looks that name up.

    Returns:
        Whether it is protected now.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    table = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if not isinstance(table, dict):
        return False
    table.setdefault("__dict__", {})
    return True
