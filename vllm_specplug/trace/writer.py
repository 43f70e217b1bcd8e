"""Files of a bounded total size in a private directory, written line by line.

Lines are collected and appended as whole gzip members, so a file ends with a whole line whenever its process ends, and
is a sound gzip file unless that happens amid a write.
"""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

#: Bytes of text that make a gzip member.
MEMBER_BYTES = 1 << 18
_LEVEL = 6


class RotatingFiles:
    """The recorded files of one engine. Calls raise ``OSError``; later ones may work again.

    A file is named ``trace-<engine>-<UTC time>-<process>-<number>.jsonl.gz``. Those of earlier processes of the same
    engine count for the bounds, too.
    """

    def __init__(
        self, directory: Path, max_bytes: int, files: int, engine: int = 0, now: Callable[[], float] = time.time
    ) -> None:
        """
        Args:
            max_bytes: of all files together; each takes an equal share.
            files: how many there are at most.
            engine: index of the data-parallel engine, which keeps files of its own.
        """
        self.directory = directory
        self.written = 0  # bytes
        self.lost = 0  # lines
        self._max_bytes = max_bytes
        self._each = max_bytes // files
        self._files = files
        self._engine = engine
        self._now = now
        self._number = 0
        self._lines: list[bytes] = []
        self._size = 0
        self._path: Path | None = None
        self._length = 0

    def add(self, line: Iterable[str]) -> None:
        """Add a line, in pieces; it is on disk after the next :meth:`flush`, or earlier."""
        data = "".join(line).encode()
        # A line too long for a file must not take others with it.
        if self._size + len(data) > min(MEMBER_BYTES, self._each // 2):
            try:
                self.flush()
            finally:
                self._keep(data)
        else:
            self._keep(data)

    def _keep(self, data: bytes) -> None:
        self._lines.append(data)
        self._size += len(data)

    def flush(self) -> None:
        """Write what was added. If that fails, it is lost, and the files are as before."""
        if not self._lines:
            return
        lines, self._lines, self._size = self._lines, [], 0
        self.lost += len(lines)
        self._append(gzip.compress(b"".join(lines), _LEVEL, mtime=0))
        self.lost -= len(lines)

    def _append(self, member: bytes) -> None:
        if len(member) > self._each:
            raise OSError(f"a request of {len(member)} bytes, packed, where a file may have {self._each}")
        if self._path is None or not self._path.exists() or self._length + len(member) > self._each:
            self._begin()
        assert self._path is not None
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        try:
            self._write(handle, member)
        finally:
            os.close(handle)
        self._length += len(member)
        self.written += len(member)

    def _begin(self) -> None:
        """Begin a file; the oldest ones make room for it."""
        if not self.directory.is_dir():
            self.directory.mkdir(mode=0o700)
        name = f"trace-{self._engine}-"
        found = [(path.stat(), path) for path in self.directory.glob(f"{name}*.jsonl.gz")]
        there = sorted((stat.st_mtime_ns, path.name, stat.st_size, path) for stat, path in found)
        size = sum(bytes_ for _, _, bytes_, _ in there)
        for left, (_, _, bytes_, path) in zip(range(len(there), 0, -1), there, strict=True):
            if left < self._files and size + self._each <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            size -= bytes_
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self._now()))
        path = self.directory / f"{name}{stamp}-{os.getpid()}-{self._number:04d}.jsonl.gz"
        self._number += 1
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        self._path, self._length = path, 0

    def _write(self, handle: int, data: bytes) -> None:
        """Append all of it or nothing. Where neither works, the next write begins another file."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(handle, rest) :]
        except OSError:
            path, self._path = self._path, None
            os.ftruncate(handle, self._length)
            self._path = path
            raise
