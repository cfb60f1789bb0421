"""A real browser for tests: headless Chromium or Chrome, spoken to over its DevTools pipe; nothing leaves the machine."""

from __future__ import annotations

import base64
import json
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking", "--no-first-run",
    "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip
SECONDS = 60.0  # that one answer may take on a busy machine


class Browser:
    """One browser with one page; a context manager. `complaints`: errors and warnings of the console; `requests`: URLs."""

    def __init__(self, profile: Path) -> None:
        self.profile = profile
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.number, self.session, self.rest, self.loaded = 0, "", b"", False

    def __enter__(self) -> Browser:
        read, self.pen = os.pipe()
        self.ear, write = os.pipe()
        # the pipe is spoken on file descriptors 3 and 4
        command = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "browser", BROWSER, *FLAGS]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(read, write),
            stdout=quiet,
            stderr=quiet,
        )
        os.close(read)
        os.close(write)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.ear, selectors.EVENT_READ)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=SECONDS)
        os.close(self.pen)
        os.close(self.ear)

    def open(
        self, page: Path, *, width: int = 1280, height: int = 1000, media: Mapping[str, str] | None = None
    ) -> None:
        """Load a file in a window of this size and with these media features, e.g. {"prefers-color-scheme": "dark"}."""
        self.complaints, self.requests, self.loaded = [], [], False
        features = [{"name": name, "value": value} for name, value in (media or {}).items()]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=page.as_uri())
        deadline = time.monotonic() + SECONDS
        while not self.loaded:
            self._read(deadline)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """Write what the window shows, or the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.pen, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self, deadline: float) -> dict[str, Any]:
        """Return the next message and note what it complains of."""
        while b"\0" not in self.rest:
            assert self.selector.select(max(0.0, deadline - time.monotonic())), "the browser does not answer"
            data = os.read(self.ear, 1 << 16)
            assert data, "the browser has ended"
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(line)
        about, more = message.get("method"), message.get("params", {})
        if about == "Runtime.exceptionThrown":
            self.complaints.append(str(more["exceptionDetails"]))
        elif about == "Log.entryAdded" and more["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(more["entry"]["text"]))
        elif about == "Runtime.consoleAPICalled":
            self.complaints.append(str(more["args"]))
        elif about == "Network.requestWillBeSent":
            self.requests.append(more["request"]["url"])
        elif about == "Page.loadEventFired":
            self.loaded = True
        return message
