"""60_search in a real JupyterLab and Chromium.

Every wait has a limit, and the server always ends.

Screenshots lie in pytest's temporary folder (--basetemp names another). Needs the models of a run
in the folder named by NBHELPERS_RUNS; where it holds none yet, the chain runs first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
from PIL import Image

from nbhelpers.errors import UserError
from nbhelpers.paths import runs_root
from nbhelpers.runs import batch
from nbhelpers.systems import gallery, trained_systems

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright, which drives the browser, is not installed"
)
pytestmark = pytest.mark.browser

TOKEN = "a-token-of-this-test"
LIMIT = 120  # seconds that any one step may take
SETTINGS = {  # of JupyterLab: no question about news; every cell is drawn, also out of sight
    "apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "notebook-extension/tracker": {"windowingMode": "none"},
}
ERROR = "[data-mime-type='application/vnd.jupyter.error']"
RAN = f"""() => document.querySelector("{ERROR}")
  || [...document.querySelectorAll('.jp-OutputArea-output')]
       .some(said => said.textContent.startsWith('asked '))"""  # the last cell
# From the Enter key to the last picture: the search has said its times, and every picture of the
# grid is drawn.
STOPWATCH = """
() => {
  const status = document.querySelector('.nbh-status'), grid = document.querySelector('.nbh-grid');
  document.querySelector('.nbh-query input').addEventListener('keydown', event => {
    if (event.key !== 'Enter') return;
    const began = performance.now();
    window.waited = null;
    const images = () => [...grid.querySelectorAll('.nbh-tile:not(.nbh-empty) img')];
    const drawn = () => images().every(image => image.complete)
      ? window.waited = performance.now() - began : requestAnimationFrame(drawn);
    const watch = new MutationObserver(() => {
      if (!status.textContent.includes(' ms (')) return;
      watch.disconnect();
      requestAnimationFrame(drawn);
    });
    watch.observe(status, {childList: true, subtree: true, characterData: true});
  }, true);
}"""


# ---- a server and a page
@contextmanager
def jupyter_lab(folder: Path, runs: Path) -> Iterator[str]:
    """A JupyterLab of its own settings in `folder`, whose notebooks lie in folder/root: its address
    with {} for a path.
    """
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        name: str(folder / name.lower())
        for name in (
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "IPYTHONDIR",
            "JUPYTERLAB_WORKSPACES_DIR",
        )
    }
    environment = (
        os.environ
        | own
        | {
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "NBHELPERS_RUNS": str(runs),
            "TQDM_DISABLE": "1",
        }
    )
    ends_itself = [
        "--ServerApp.shutdown_no_activity_timeout=300",
        "--MappingKernelManager.cull_idle_timeout=300",
        "--MappingKernelManager.cull_connected=True",
    ]  # should this process be killed
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={folder / 'root'}",
        *ends_itself,
    ]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}/{{}}?token={TOKEN}"
    try:
        _wait_for(server, address.format("api/status"), folder / "lab.log")
        yield address
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)


def _wait_for(server: subprocess.Popen, address: str, log: Path) -> None:
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start: {log.read_text()[-1500:]}")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox"], timeout=1000 * LIMIT
        )
        try:
            yield browser
        finally:
            browser.close()


class Reader:
    """A page on which a notebook is open, and what its console said."""

    def __init__(self, browser, address: str, shots: Path):
        self.page, self.errors, self.shots = (
            browser.new_page(viewport={"width": 1440, "height": 1000}),
            [],
            shots,
        )
        self.page.set_default_timeout(1000 * LIMIT)
        self.page.on(
            "console",
            lambda message: self.errors.append(message.text) if message.type == "error" else None,
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_selector("text=/\\| Idle/")

    def run_all(self) -> None:
        self.page.click(".lm-MenuBar-item >> text=Run")
        self.page.click(".lm-Menu-item >> text=/^Run All Cells$/")
        self.page.wait_for_function(RAN, timeout=3000 * LIMIT)
        broken = self.page.locator(ERROR)
        assert not broken.count(), broken.first.inner_text()[-1500:]

    def ask(self, sentence: str, answer: str = "ms (") -> str:
        query = self.page.locator(".nbh-query input")
        query.fill(sentence)
        return self.after(lambda: query.press("Enter"), answer)

    def after(self, action: Callable[[], object], part: str) -> str:
        """What stands below the query after an action, once it is new, holds `part`, and nothing
        goes on any more.
        """
        self.page.evaluate(
            "document.querySelector('.nbh-status .widget-html-content > *').dataset.old = 1"
        )
        action()
        self.page.wait_for_function(
            "part => { const status = document.querySelector('.nbh-status'); return "
            "status.textContent.includes(part) && !status.querySelector('.nbh-busy, [data-old]') }",
            arg=part,
        )
        return self.page.locator(".nbh-status").inner_text()

    def tiles(self) -> list[str]:
        """The notes below the pictures of the grid."""
        return self.page.locator(".nbh-tile:not(.nbh-empty)").all_inner_texts()

    def places(self) -> list[tuple[float, ...]]:
        """Where the parts of the search stand, seen from the first of them, and their sizes."""
        parts = (".nbh-query", ".nbh-status", ".nbh-grid", ".nbh-detail")
        boxes = [self.page.locator(part).first.bounding_box() for part in parts]
        return [
            (box["x"] - boxes[0]["x"], box["y"] - boxes[0]["y"], box["width"], box["height"])
            for box in boxes
        ]

    def give(self, file: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.click(".nbh-upload")
        chooser.value.set_files(file)

    def shoot(self, name: str) -> None:
        self.page.locator(".nbh-search").scroll_into_view_if_needed()
        self.page.screenshot(path=self.shots / f"{name}.png")


def opened(folder: Path, parameters: dict) -> None:
    """A copy of 60_search with these parameters, without outputs, in folder/root/notebooks, and the
    pictures that it links beside it.
    """
    path = folder / "root" / "notebooks" / "60_search.ipynb"
    path.parent.mkdir(parents=True)
    shutil.copytree(batch.NOTEBOOKS.parent / "figures", folder / "root" / "figures")
    papermill.execute_notebook(
        str(batch.NOTEBOOKS / path.name), str(path), parameters, prepare_only=True
    )
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    nbformat.write(notebook, path)


# ---- what a reader does
@pytest.fixture(scope="module")
def reader(request, browser, tmp_path_factory) -> Iterator[Reader]:
    """60_search of the default profile after Run All; where the run has no models yet, the chain
    trains them.
    """
    if not os.environ.get("NBHELPERS_RUNS"):
        pytest.skip("runs in the folder named by NBHELPERS_RUNS, as `make test` sets it")
    try:
        for name in trained_systems.SYSTEMS:
            trained_systems.trained(runs_root() / "default", name)
    except UserError:
        request.getfixturevalue("chain")
    folder = tmp_path_factory.mktemp("browser")
    opened(folder, {"PROFILE": "default"})
    with jupyter_lab(folder, runs_root()) as address:
        reader = Reader(browser, address.format("lab/tree/notebooks/60_search.ipynb"), folder)
        reader.run_all()
        yield reader
        reader.page.close()


def test_type_click_and_look(reader):
    page, before, tile = reader.page, reader.places(), reader.page.locator(".nbh-tile button")
    reader.shoot("1_after_run_all")

    assert (
        re.match(r"\d+ ms \(encode", reader.ask("many green trees are near the houses ."))
        and len(reader.tiles()) == 12
    )
    scores = [float(re.search(r"· (-?\d+\.\d+)", note).group(1)) for note in reader.tiles()]
    assert scores == sorted(scores, reverse=True)
    assert page.evaluate(
        "[...document.querySelectorAll('.nbh-tile img')].every(image => image.naturalWidth > 100)"
    )
    reader.shoot("2_asked")

    reader.after(tile.nth(4).click, "speak for the sentence")
    assert page.locator(".nbh-chosen").count() == 1 and page.locator(".nbh-detail img").is_visible()
    assert "Its captions" in page.locator(".nbh-detail").inner_text()
    reader.shoot("3_clicked")

    place = re.search(
        r"at place (\d+)", reader.after(page.locator(".nbh-sample").click, "own image is")
    )
    framed = page.locator(".nbh-right:not(.nbh-empty)").count()
    assert (framed > 0) == (int(place.group(1)) <= 12)  # PIR ranks all, so there is a place
    reader.shoot("4_a_caption_of_the_set")

    assert "fine" in reader.after(
        lambda: page.locator(".nbh-search select").select_option("CFITR"), "coarse"
    )
    assert "(was" in reader.tiles()[0]
    reader.shoot("5_reranked")
    page.click(".nbh-stages button >> nth=0")
    page.wait_for_function("!document.querySelector('.nbh-tile').textContent.includes('(was')")
    reader.shoot("6_by_code")

    reader.after(tile.nth(0).click, "speak for the sentence")
    reader.after(page.locator(".nbh-detail > button").click, "most similar")
    assert "BITA writes" in page.locator(".nbh-detail").inner_text()
    reader.shoot("7_a_picture_asks")
    query = page.locator(".nbh-query input")
    assert "similar" not in reader.after(lambda: query.press("Enter"), "coarse")

    assert reader.places() == before, "something moved on the page"
    assert reader.errors == []


def test_mistakes_are_sentences_and_the_kernel_lives_on(reader, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    Image.fromarray(np.full((50, 70, 3), 90, np.uint8)).save(tmp_path / "plain.png")
    before = reader.places()
    # not "qqq": the default size spells words that it does not know
    for sentence, answer in (("r" * 20_001, "at most 20,000"), ("", "nothing to search for")):
        reader.ask(sentence, answer)
        assert reader.tiles() == [] and reader.places() == before
    reader.shoot("8_a_mistake")
    assert "only the first" in reader.ask("many green trees " * 333)
    reader.after(lambda: reader.give(tmp_path / "notes.png"), "notes.png is not an image file")
    reader.after(lambda: reader.give(tmp_path / "plain.png"), "most similar")
    assert len(reader.tiles()) == 12 and reader.places() == before
    reader.shoot("9_an_image_of_ones_own")
    assert reader.errors == []


QUESTIONS = (
    "two ships in a port",
    "a tennis court beside trees",
    "planes are parked",
    "a dense residential area",
    "a winding river",
    "green fields",
    "an overpass with cars",
    "storage tanks",
    "waves on a sandy beach",
    "a baseball diamond",
    "a straight freeway",
)


@pytest.mark.realdata
def test_under_300_ms_on_ucm(browser, tmp_path):
    """From Enter to the grid with the compact PIR; the figure is kept beside the times of
    60_search.
    """
    run = runs_root() / "ucm"
    try:
        system = trained_systems.trained(run, "pir")
    except UserError as error:
        pytest.skip(f"{error} (make run PROFILE=ucm DATA=FOLDER UPTO=20 trains it)")
    folder = str(Path(os.environ["NBHELPERS_TEST_DATA"]).resolve())
    opened(tmp_path, batch.check_profile("ucm", {"SEED": 0, "DATA": folder})["60_search"])
    with jupyter_lab(tmp_path, runs_root()) as address:
        reader = Reader(browser, address.format("lab/tree/notebooks/60_search.ipynb"), tmp_path)
        reader.run_all()
        reader.page.locator(".nbh-search select").select_option("PIR")
        reader.page.evaluate(STOPWATCH)
        waited = [_waited(reader, sentence) for sentence in QUESTIONS]
        reader.shoot("ucm")
        assert reader.errors == []
    figures = {
        "enter_to_grid": round(float(np.median(waited)), 1),
        "slowest": round(max(waited), 1),
    }
    gallery.write_times(
        run / "times" / "60_search-browser.json",
        {"PIR": figures},
        profile="ucm",
        set="ucm",
        seed=0,
        questions=len(waited),
        cores=os.cpu_count(),
        device=system.device.type,
        checkpoint=str(system.checkpoint.relative_to(run)),
    )
    assert np.median(waited) < 300, f"{np.median(waited):.0f} ms, each: {np.round(waited)}"


def _waited(reader: Reader, sentence: str) -> float:
    reader.ask(sentence)
    reader.page.wait_for_function("window.waited")
    return reader.page.evaluate("window.waited")
