"""The page in a browser: samples are clicked, walked between and added up, and the z of a walk makes it again."""

import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import requests
from browser import find_browser, open_page
from export_cases import Export
from support import ROOT

from export.samplers.open import open_sampler

PYTHON = ROOT / "build" / "explore" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="make test-explore makes the environment with Gradio"),
]

HELPERS = """
const until = async (test) => {
  const end = Date.now() + 120000;
  while (Date.now() < end) {
    const found = test();
    if (found) return found;
    await new Promise(done => setTimeout(done, 100));
  }
  throw new Error('waited in vain for ' + test);
};
const all = (what) => [...document.querySelectorAll(what)];
const button = (text) => all('button').find(one => one.textContent.trim() === text);
const tile = (name) => all('button').find(one => one.textContent.trim() === name && one.querySelector('img'));
const says = (text) => document.body.innerText.includes(text);
const link = (name) => all('a[href]').map(one => one.href).find(one => one.endsWith(name));
const shown = (name) => all('img').find(one => one.src.includes(name) && one.complete && one.naturalWidth);
const fill = async (slot, names) => {
  all('input[type=radio]').find(one => one.value === slot).click();
  for (let i = 0; i < names.length; i++) {
    tile(names[i]).click();
    await until(() => says(slot + ': ' + names.slice(0, i + 1).join(', ')));
  }
};
"""
SCRIPTS = {
    "grid": "await until(() => tile('0:31') && link('grid.npy')); return link('grid.npy');",
    "next": "button('Next').click(); await until(() => tile('0:63')); button('Back').click(); "
    "await until(() => tile('0:0')); return says('0:63');",
    "walk": "await fill('walk from', ['0:3']); await fill('walk to', ['0:9']); button('Show the walk').click(); "
    "await until(() => shown('walk.webp') && shown('walk.png') && link('walk.npy')); return link('walk.npy');",
    "sum": "all('[role=tab]').filter(one => one.textContent.trim() === 'A − B + C').forEach(one => one.click()); "
    "await until(() => button('Show A − B + C')); await fill('A', ['0:1', '0:2', '0:3']); "
    "await fill('B', ['0:4', '0:5', '0:6']); await fill('C', ['0:7', '0:8', '0:9']); button('Show A − B + C').click(); "
    "await until(() => shown('sum.png') && link('sum.npy')); return link('sum.npy');",
}


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium: make system")
def test_a_page_to_play_with(exported: Export, tmp_path: Path) -> None:
    command = [str(PYTHON), "-m", "export.cli", "explore", "--model", str(exported.model), "--backend", "onnxruntime"]
    environment = {"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    environment["MPLCONFIGDIR"] = str(tmp_path / "matplotlib")  # which Gradio imports, and which lists the fonts
    (tmp_path / "home").mkdir()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("the page is at http://127.0.0.1:"), line
        url = line.split()[4]
        scripts = {name: f"(async () => {{{HELPERS}{body}}})()" for name, body in SCRIPTS.items()}
        page = open_page(url, tmp_path / "browser", width=1280, height=1000, dark=False, scripts=scripts)
        (tmp_path / "page.png").write_bytes(page.screenshot)
        assert page.errors == []
        assert [one for one in page.requests if not one.startswith((url, "blob:"))] == []
        fetched = {}
        for name in ("grid", "walk", "sum"):
            assert isinstance(page.values[name], str), (name, page.values)
            path = tmp_path / f"{name}.npy"
            path.write_bytes(requests.get(page.values[name], timeout=60).content)
            fetched[name] = np.load(path)
        assert page.values["next"] is False
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
    grid, walk, total = fetched["grid"], fetched["walk"], fetched["sum"]
    assert np.allclose(walk[[0, -1]], grid[[3, 9]], atol=1e-6)
    assert np.allclose(total[0], grid[1:4].mean(0) - grid[4:7].mean(0) + grid[7:10].mean(0), atol=1e-5)
    with open_sampler(str(exported.model)) as sampler:
        assert sampler.sample(walk).shape == (24, 32, 32, 3)
    assert list((tmp_path / "home").iterdir()) == []
    assert list(tmp_path.glob("dcgan-explore-*")) == []


def test_a_port_that_is_taken_is_one_line(exported: Export) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [str(PYTHON), "-m", "export.cli", "explore", "--model", str(exported.model), "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 69
    assert done.stderr.count("\n") == 1
    assert f"--port {port}" in done.stderr
