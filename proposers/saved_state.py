"""Learned state as named arrays, and the file they are kept in.

A proposer's state is a dict of arrays whose names are paths, ``mixture/weights``. The file is a NumPy ``.npz``, which
is a zip archive of ``.npy`` members, uncompressed and without pickles: every member has a checksum, so a damaged file
is told from a sound one, and reading one can run no code. Its first member, ``header``, is UTF-8 JSON.

The arrays hold users' text. Only the owner may read the file.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: What a proposer returns. An array too large to be copied between two steps comes as an iterator of pieces, to be
#: concatenated along the first axis; at least one. They are drawn upon one after another, in the order of the dict.
State = dict[str, Array | Iterator[Array]]

#: To be raised when the meaning of any saved array changes.
FORMAT = 1
#: Larger files are neither written nor read.
MAX_BYTES = 4 << 30
_HEADER = "header"
_SUFFIX = ".npy"
# Checksums and the file are fed this many bytes at once, with the GIL released.
_WRITTEN = 1 << 20
# Booleans, whole numbers, floats.
_KINDS = "biuf"


class StateFileError(ValueError):
    """The file is damaged, or is no state file, or is too large. The message is for the user and names no path."""


def join(parts: Mapping[str, Mapping[str, Array | Iterator[Array]]]) -> State:
    """``{"a": {"b": x}}`` as ``{"a/b": x}``."""
    return {f"{name}/{key}": array for name, arrays in parts.items() for key, array in arrays.items()}


def part(state: Mapping[str, Array], name: str) -> dict[str, Array]:
    """The arrays under ``name/``, that prefix removed."""
    prefix = name + "/"
    return {key.removeprefix(prefix): array for key, array in state.items() if key.startswith(prefix)}


def take(state: Mapping[str, Array | Iterator[Array]], pieces: dict[str, list[Array]]) -> Iterator[None]:
    """Move ``state`` into ``pieces``, drawing one piece from its iterators between two yields."""
    for name, array in state.items():
        pieces[name] = []
        for piece in [array] if isinstance(array, np.ndarray) else array:
            pieces[name].append(piece)
            yield


def whole(state: Mapping[str, Array | Iterator[Array]]) -> dict[str, Array]:
    """``state`` with every iterator drawn upon at once."""
    pieces: dict[str, list[Array]] = {}
    for _ in take(state, pieces):
        pass
    return {name: np.concatenate(several) for name, several in pieces.items()}


def check(state: Mapping[str, Array], like: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
    """Raise ``ValueError`` unless ``state`` has exactly the arrays ``like`` (name -> dtype, shape with -1 for any
    length), floats all finite."""
    if state.keys() != like.keys():
        raise ValueError(f"saved arrays {sorted(state)} where {sorted(like)} are expected")
    for name, (dtype, shape) in like.items():
        array = state[name]
        fits = array.ndim == len(shape) and all(want in (-1, got) for want, got in zip(shape, array.shape, strict=True))
        if array.dtype != dtype or not fits:
            raise ValueError(f"saved {name} is {array.dtype}{array.shape}, expected {np.dtype(dtype)}{shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"saved {name} has values that are not finite")


def pack_names(names: Iterable[str]) -> Array:
    """Strings as one ``uint8[bytes]`` array."""
    return np.frombuffer(json.dumps(list(names)).encode(), np.uint8)


def unpack_names(array: Array) -> list[str]:
    """What :func:`pack_names` packed. Raises ``ValueError`` if it is anything else, or a name occurs twice."""
    names = json.loads(array.tobytes())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("saved names must be a list of distinct strings")
    return names


def write(
    path: Path, pieces: Mapping[str, Sequence[Array]], about: Mapping[str, Any], max_bytes: int = MAX_BYTES
) -> int:
    """Replace the file at ``path``; returns its size in bytes. If that fails, what was there stays.

    Args:
        pieces: by name, what makes up each array, see :func:`take`.
        about: JSON values for the header.

    Raises:
        OSError: the file cannot be written.
        StateFileError: it would be too large.
    """
    size = sum(piece.nbytes for several in pieces.values() for piece in several)
    if size > max_bytes:
        raise StateFileError(f"{size} bytes are more than the {max_bytes} that are allowed")
    header = json.dumps({**about, "format": FORMAT, "arrays": sorted(pieces)})
    path = Path(os.path.realpath(path))
    handle, temporary = tempfile.mkstemp(".tmp", _temporary_prefix(path), path.parent)  # readable by the owner only
    try:
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                _add(archive, _HEADER, [np.frombuffer(header.encode(), np.uint8)])
                for name, several in pieces.items():
                    _add(archive, name, several)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)
    return size


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}."


def remove_leftovers(path: Path) -> None:
    """Delete what a process killed while it wrote ``path`` has left behind."""
    path = Path(os.path.realpath(path))
    for left in path.parent.glob(f"{glob.escape(_temporary_prefix(path))}*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()


def _add(archive: zipfile.ZipFile, name: str, pieces: Sequence[Array]) -> None:
    shape = (sum(len(piece) for piece in pieces), *pieces[0].shape[1:])
    about = {"descr": np.lib.format.dtype_to_descr(pieces[0].dtype), "fortran_order": False, "shape": shape}
    # A fixed date, so that equal states make equal files.
    with archive.open(zipfile.ZipInfo(name + _SUFFIX), "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, about)
        for piece in pieces:
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            for start in range(0, len(data), _WRITTEN):
                member.write(data[start : start + _WRITTEN])


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: Path, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Any], dict[str, Array]]:
    """The header and the arrays (read-only) of the file at ``path``.

    Raises:
        FileNotFoundError: there is none.
        StateFileError: it cannot be read, is damaged, of another format or larger than ``max_bytes``.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise StateFileError(f"it has {size} bytes, more than the {max_bytes} that are allowed")
            with zipfile.ZipFile(file) as archive:
                return _read(archive, size)
    except (FileNotFoundError, StateFileError):
        raise
    except Exception as error:  # zipfile's answers to damaged input are of a dozen types
        raise StateFileError(f"it is damaged or no state file ({type(error).__name__}: {error})") from error


def _read(archive: zipfile.ZipFile, size: int) -> tuple[dict[str, Any], dict[str, Array]]:
    members = {info.filename.removesuffix(_SUFFIX): info for info in archive.infolist()}
    if _HEADER not in members:
        raise StateFileError("it is no state file: it has no header")
    for name, info in members.items():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise StateFileError(f"its member {name} is compressed or claims {info.file_size} of {size} bytes")
    header = json.loads(_array(archive.read(members.pop(_HEADER))).tobytes())
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise StateFileError(f"its format is {found!r}, this version of the plugin reads {FORMAT}")
    if header.pop("arrays", None) != sorted(members):
        raise StateFileError("its members are not those its header lists")
    return header, {name: _array(archive.read(info)) for name, info in members.items()}


def _array(data: bytes) -> Array:
    """A ``.npy`` file's array, without copying. NumPy's own reader allocates whatever size the file claims."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise StateFileError("one of its arrays is of another .npy version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    at = stream.tell()
    if fortran or dtype.kind not in _KINDS or int(np.prod(shape, dtype=object)) * dtype.itemsize != len(data) - at:
        raise StateFileError(f"one of its arrays is {dtype}{shape} in {len(data) - at} bytes")
    return np.ndarray(shape, dtype, data, at)
