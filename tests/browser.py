"""A page in headless Chromium: what its scripts make of it, its errors, what it asks the network for, how it looks.

Spoken over a pipe in Chromium's DevTools protocol (https://chromedevtools.github.io/devtools-protocol/), so that no
driver, library or port is needed.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT = 60  # seconds for one command: long, for the machine may be busy
KEYS = {"Tab": 9, "Enter": 13, "Delete": 46}


def find() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A running headless Chromium, to be used in a `with` statement."""

    def __init__(self, profile: Path):
        to_browser, from_us = _pipe()
        from_browser, to_us = _pipe()
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={profile}", "--remote-debugging-pipe",
        ]  # fmt: skip
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        command = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{to_us}', "bash", find(), *flags]
        self.process = subprocess.Popen(
            command,
            pass_fds=(to_browser, to_us),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(to_us)
        self.out, self.into = from_browser, from_us
        self.waiting, self.last = b"", 0
        self.pages: dict[str, Page] = {}

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error) -> None:
        try:
            self.send("Browser.close")
        finally:
            for end in (self.out, self.into):
                os.close(end)
            self.process.wait(TIMEOUT)

    def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False, media: str = "") -> "Page":
        """Open a file in a new page of this size in CSS pixels, with light or dark colours, on `media` ("print")."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        page.send("Page.navigate", url=path.resolve().as_uri())
        self.read_until(lambda: page.loaded)
        # Two frames: after them observers have run and layout is done.
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return page

    def send(self, method: str, session: str | None = None, **parameters) -> dict:
        """Send a command and return its result."""
        self.last += 1
        number = self.last
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self.into, json.dumps(message).encode() + b"\0")
        answers: list[dict] = []
        self.read_until(lambda: bool(answers), lambda found: answers.append(found) if found["id"] == number else None)
        if "error" in answers[0]:
            raise RuntimeError(f"{method}: {answers[0]['error']['message']}")
        return answers[0]["result"]

    def read_until(self, done, answer=lambda found: None) -> None:
        """Read messages until `done()`: answers go to `answer`, events to their page."""
        end = time.monotonic() + TIMEOUT
        while not done():
            if b"\0" not in self.waiting:
                ready, _, _ = select.select([self.out], [], [], max(0.0, end - time.monotonic()))
                read = os.read(self.out, 1 << 20) if ready else b""
                if not read:
                    raise RuntimeError("Chromium ended" if ready else f"Chromium said nothing for {TIMEOUT} s")
                self.waiting += read
                continue
            text, _, self.waiting = self.waiting.partition(b"\0")
            found = json.loads(text)
            if "id" in found:
                answer(found)
            elif found.get("sessionId") in self.pages:
                self.pages[found["sessionId"]].note(found["method"], found["params"])


class Page:
    """One page: `errors` of its scripts and console, `requests` to anywhere but its own file, `dialogs` it opened."""

    def __init__(self, browser: Browser, session: str, target: str):
        self.browser, self.session, self.target = browser, session, target
        self.loaded = False
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []

    def send(self, method: str, **parameters) -> dict:
        return self.browser.send(method, self.session, **parameters)

    def note(self, event: str, found: dict) -> None:
        """Remember what an event says."""
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Runtime.exceptionThrown":
            details = found["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in found["args"]))
        elif event == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.errors.append(found["entry"]["text"])
        elif event == "Network.requestWillBeSent" and not found["request"]["url"].startswith("data:"):
            if found["request"]["url"] != found["documentURL"]:
                self.requests.append(found["request"]["url"])
        elif event == "Page.javascriptDialogOpening":
            # A page with an open dialog answers nothing; nobody waits for the answer to this one.
            self.dialogs.append(found["message"])
            dismiss = {"id": 0, "sessionId": self.session, "method": "Page.handleJavaScriptDialog"}
            os.write(self.browser.into, json.dumps(dismiss | {"params": {"accept": False}}).encode() + b"\0")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page, a promise's result waited for."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """The texts, as they are rendered, of all elements that are shown."""
        return self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.checkVisibility())"
            ".map(e => (e.innerText ?? e.textContent).trim())"
        )

    def click(self, selector: str, place: int = 0) -> None:
        """Click the middle of an element as a pointer would, so that what covers it is hit instead."""
        x, y = self._middle(selector, place)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str, place: int = 0) -> None:
        """Put the pointer on the middle of an element."""
        x, y = self._middle(selector, place)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def fill(self, selector: str, text: str) -> None:
        """Write a text into a field in place of what stands there."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text) if text else self.press("Delete")

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a selection."""
        self.evaluate(
            f"{{const field = document.querySelector({json.dumps(selector)}); field.value = {json.dumps(value)};"
            "field.dispatchEvent(new Event('change', {bubbles: true}))}"
        )

    def press(self, key: str) -> None:
        """Press a key: one of KEYS."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **text)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the whole page, or of its first screen."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self) -> bytes:
        """The page as printed, on the paper that its style sheet asks for."""
        found = self.send("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        return base64.b64decode(found["data"])

    def close(self) -> None:
        self.browser.send("Target.closeTarget", targetId=self.target)
        del self.browser.pages[self.session]

    def _middle(self, selector: str, place: int) -> tuple[float, float]:
        found = f"document.querySelectorAll({json.dumps(selector)})[{place}]"
        self.evaluate(f"{found}.scrollIntoView({{block: 'center', inline: 'center', behavior: 'instant'}})")
        box = self.evaluate(f"{found}.getBoundingClientRect().toJSON()")
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def _pipe() -> tuple[int, int]:
    """A pipe whose ends lie above 9, out of the way of the descriptors that Chromium expects."""
    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends[0], ends[1]
