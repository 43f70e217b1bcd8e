#!/usr/bin/env bash
# Install the benchmark peer `arctic_inference.suffix_decoding` (Arctic Inference, the library behind vLLM's
# `suffix` method) into one Python environment, built from its source distribution.
#
#   benchmarks/install_suffix_peer.sh [PYTHON]      # default: python of the active environment
#
# Only csrc/suffix_decoding is built: the rest of the package wants its own torch and vLLM versions. The package
# is laid out without its `vllm.general_plugins` entry point, which would patch the vLLM under test; a dist-info
# with name, version and file list makes `importlib.metadata.version` and `pip uninstall arctic_inference` work.
# Needs in that environment: pip, cmake, ninja, nanobind, torch (the sdist's setup.py imports it); a C++20 compiler.
# Safe to run again: it returns at once when that version already imports.
set -euo pipefail

VERSION=0.3.0
PYTHON=${1:-python}
PYTHON=$(command -v "$PYTHON")
BIN=$("$PYTHON" -c 'import sys, os; print(os.path.join(sys.prefix, "bin"))')
export PATH="$BIN:$PATH"

check() {
    "$PYTHON" - "$VERSION" <<'PY'
import importlib.metadata, sys
import numpy as np
from arctic_inference.suffix_decoding import SuffixDecodingCache
assert importlib.metadata.version("arctic_inference") == sys.argv[1]
cache = SuffixDecodingCache(max_tree_depth=8, max_cached_requests=4)
cache.start_request("r", np.array([1, 2, 3, 4, 1, 2], dtype=np.int32))
assert cache.speculate("r", np.array([1, 2], dtype=np.int32), max_spec_tokens=2).token_ids[0] == 3
print("arctic_inference.suffix_decoding", sys.argv[1], "works")
PY
}

if check 2>/dev/null; then
    exit 0
fi

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

# --no-build-isolation: pip would otherwise download the sdist's whole build stack (torch included) for its metadata.
"$PYTHON" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest "$WORK" \
    "arctic-inference==$VERSION"
tar -xzf "$WORK/arctic_inference-$VERSION.tar.gz" -C "$WORK"
SRC="$WORK/arctic_inference-$VERSION"

cmake -S "$SRC/csrc/suffix_decoding" -B "$WORK/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DPython_EXECUTABLE="$PYTHON" >"$WORK/cmake.log" || { cat "$WORK/cmake.log"; exit 1; }
cmake --build "$WORK/build" >"$WORK/build.log" || { cat "$WORK/build.log"; exit 1; }

"$PYTHON" - "$SRC" "$WORK/build" "$VERSION" <<'PY'
import pathlib, shutil, sys, sysconfig

src, build, version = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
site = pathlib.Path(sysconfig.get_path("platlib"))
package, info = site / "arctic_inference", site / f"arctic_inference-{version}.dist-info"
for old in (package, info):
    shutil.rmtree(old, ignore_errors=True)
(package / "suffix_decoding").mkdir(parents=True)
info.mkdir()
(package / "__init__.py").touch()
for name in ("__init__.py", "cache.py"):
    shutil.copy(src / "arctic_inference/suffix_decoding" / name, package / "suffix_decoding" / name)
(extension,) = build.glob("_C*.so")
shutil.copy(extension, package / "suffix_decoding" / extension.name)
shutil.copy(src / "LICENSE", info / "LICENSE")
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: arctic_inference\nVersion: {version}\n")
(info / "INSTALLER").write_text("install_suffix_peer\n")
files = [p for root in (package, info) for p in root.rglob("*") if p.is_file()]
record = [f"{p.relative_to(site)},," for p in files] + [f"{info.name}/RECORD,,"]
(info / "RECORD").write_text("\n".join(record) + "\n")
PY
check
