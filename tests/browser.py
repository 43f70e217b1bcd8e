"""A headless Chromium for tests of pages, driven by its DevTools protocol through a pipe: no port, no other package.

``python tests/browser.py REPORT.html FOLDER`` writes the screenshots of a report that ``docs/`` shows.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-default-apps",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)


def find() -> str | None:
    """Path of a Chromium, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser of its own. Use as a context manager; it always ends with the browser gone.

    Attributes:
        requests: URLs that pages asked for since :meth:`open` was last called.
        problems: errors and warnings in the page's log since then.
    """

    def __init__(self, profile: Path, timeout_s: float = 60.0) -> None:
        """``profile``: a new empty folder; ``timeout_s``: for every answer."""
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._profile, self._timeout_s = profile, timeout_s
        self._number, self._session = 0, ""
        self._rest = b""
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        path = find()
        assert path is not None, "no Chromium"
        (their_in, self._out), (self._in, their_out) = os.pipe(), os.pipe()
        # The protocol's descriptors are 3 and 4; numbers far above keep the copies apart.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (their_in, their_out)]

        def place() -> None:
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)

        self._process = subprocess.Popen(
            [path, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4, *theirs),
            preexec_fn=place,
            start_new_session=True,
        )
        for fd in (their_in, their_out, *theirs):
            os.close(fd)
        try:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                self._call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._out)
        os.close(self._in)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait(10)

    def open(self, page: Path, width: int, height: int = 900, dark: bool = False, media: str = "") -> None:
        """Show a file at a width in CSS pixels, in light or dark, as on ``screen`` or in ``print``."""
        self.requests.clear()
        self.problems.clear()
        self._events.clear()
        mobile = width < 600
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + self._timeout_s
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            assert time.monotonic() < deadline, f"{page} was not loaded"
            self._receive(deadline)
        self.evaluate("document.fonts.ready.then(() => 1)")
        for event in self._events:
            found = event["params"]
            if event["method"] == "Network.requestWillBeSent":
                self.requests.append(found["request"]["url"])
            elif event["method"] == "Log.entryAdded":
                self.problems.append(found["entry"]["text"])
            elif event["method"] == "Runtime.exceptionThrown":
                self.problems.append(found["exceptionDetails"]["text"])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, clip: dict[str, float] | None = None) -> bytes:
        """PNG of the whole page, or of ``clip`` (x, y, width, height in CSS pixels from the page's top left)."""
        if clip is None:
            size = self._call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"]}
        answer = self._call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip={**clip, "scale": 1}
        )
        return base64.b64decode(answer["data"])

    def pdf(self) -> bytes:
        """The page as printed on A4."""
        answer = self._call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(answer["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self._timeout_s
        while True:
            answer = self._receive(deadline)
            if answer is not None and answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """The next message; an event is kept, too. None at the deadline."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser did not answer within {self._timeout_s:.0f} s"
            read = os.read(self._in, 1 << 20)
            assert read, f"the browser ended with code {self._process.wait(10)}"
            self._rest += read
        raw, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self._events.append(message)
        return message


def main(page: Path, folder: Path) -> None:
    """Write the beginning of a page, wide and narrow, light and dark, as PNG of few colours."""
    import io

    from PIL import Image

    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile) / "profile") as shown:
        for name, width, height in (("wide", 1280, 2400), ("narrow", 360, 3000)):
            for dark in (False, True):
                shown.open(page, width, dark=dark)
                clip: dict[str, float] = {"x": 0, "y": 0, "width": width, "height": height}
                image = Image.open(io.BytesIO(shown.screenshot(clip))).convert("RGB")
                image.quantize(96, dither=Image.Dither.NONE).save(
                    folder / f"ab-{name}-{'dark' if dark else 'light'}.png", optimize=True
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
