"""A headless Chromium, driven over its DevTools protocol with aiohttp: what a reader of a page would see."""

import asyncio
import base64
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

BINARIES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)


def find_browser() -> str | None:
    return next((path for name in BINARIES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """What was seen of one page at one size."""

    errors: list[str] = field(default_factory=list)
    """Console errors, uncaught exceptions, and whatever else the browser logged."""
    requests: list[str] = field(default_factory=list)
    """Everything fetched but for data: URLs."""
    values: dict[str, Any] = field(default_factory=dict)
    screenshot: bytes = b""


def open_page(url: str, folder: Path, *, width: int, height: int, dark: bool, scripts: dict[str, str]) -> Page:
    """Open `url`, wait until it has loaded, and evaluate `scripts` in it. A screenshot shows the whole page."""
    binary = find_browser()
    assert binary is not None
    process = subprocess.Popen(
        [binary, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return asyncio.run(_visit(folder, url, width, height, dark, scripts))
    finally:
        process.terminate()
        process.wait(20)


async def _visit(folder: Path, url: str, width: int, height: int, dark: bool, scripts: dict[str, str]) -> Page:
    port_file = folder / "DevToolsActivePort"
    give_up = time.monotonic() + 60
    while not (port_file.exists() and port_file.read_text().count("\n")):
        assert time.monotonic() < give_up, "Chromium did not start"
        await asyncio.sleep(0.05)
    port = port_file.read_text().split()[0]
    page = Page()
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            target = next(entry for entry in await answer.json() if entry["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            number = 0
            loaded = False

            def note(message: dict[str, Any]) -> None:
                nonlocal loaded
                method, params = message.get("method"), message.get("params", {})
                if method == "Log.entryAdded":
                    page.errors.append(f"{params['entry']['level']}: {params['entry']['text']}")
                elif method == "Runtime.exceptionThrown":
                    page.errors.append(str(params["exceptionDetails"].get("text")))
                elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert", "warning"):
                    page.errors.append(str(params["args"]))
                elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
                    page.requests.append(params["request"]["url"])
                elif method == "Page.loadEventFired":
                    loaded = True

            async def call(method: str, **params: Any) -> dict[str, Any]:
                nonlocal number
                number += 1
                await socket.send_json({"id": number, "method": method, "params": params})
                while True:
                    message = await socket.receive_json(timeout=60)
                    if message.get("id") == number:
                        assert "error" not in message, message["error"]
                        return dict(message["result"])
                    note(message)

            for domain in ("Page", "Log", "Runtime", "Network"):
                await call(f"{domain}.enable")
            await call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=width < 600,
            )
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await call("Emulation.setEmulatedMedia", features=[scheme])
            await call("Page.navigate", url=url)
            while not loaded:
                note(await socket.receive_json(timeout=60))
            for name, script in scripts.items():
                outcome = await call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
                page.values[name] = outcome["result"].get("value")
            picture = await call("Page.captureScreenshot", captureBeyondViewport=True)
            page.screenshot = base64.b64decode(picture["data"])
    return page
