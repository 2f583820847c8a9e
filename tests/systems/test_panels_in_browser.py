"""The panels for K, maps and the loss in a real JupyterLab and Chromium, around stand-ins."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
import test_browser

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser

K_CELL = """from nbhelpers.systems.candidate_panel import CandidatePanel

def point_of(k):
    return {"k": k, "mR": 40 + k / 3, "i2t_total_ms": 2.0 * k, "t2i_total_ms": 1.5 * k}

CandidatePanel(point_of, [5, 10, 20], {"coarse alone": 41.0}, 20, 30)"""
MAP_CELL = """import numpy as np
from nbhelpers.systems.map_panel import MapPanel

pictures = np.full((2, 64, 64, 3), 120, np.uint8)
maps = np.random.default_rng(0).normal(size=(2, 7, 7))
words = [(["two", "ponds"], maps[:, ::-1]), (["a", "road"], maps)]
both = {"PIR": {"belief": abs(maps)}, "CFITR": {"relevance": maps}}
MapPanel(pictures, ["two ponds", "a road"], both, {"CFITR": words}, {("PIR", "belief"): "no"})"""
LOSS_CELL = """import os, time, torch
for name in ("CI", "TQDM_DISABLE"):  # somebody looks
    os.environ.pop(name, None)
from nbhelpers.systems.loss_panel import LossPanel

class Model(torch.nn.Module):
    def loss(self, step):
        time.sleep(0.02)
        return {"loss": torch.tensor(1 / (1 + step))}

model = LossPanel().watch(Model())
for step in range(200):
    model.loss(step)"""


@pytest.fixture
def notebook(tmp_path) -> Path:
    """A notebook with the three panels, in the folder that the server opens."""
    path = tmp_path / "root" / "panels.ipynb"
    path.parent.mkdir()
    cells = [K_CELL, MAP_CELL, LOSS_CELL, "print('asked nothing')"]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


def test_choices_are_answered_by_pictures(tmp_path, notebook):
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with (
        playwright.sync_playwright() as driver,
        test_browser.jupyter_lab(tmp_path, tmp_path) as address,
    ):
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        reader = test_browser.Reader(browser, address.format("lab/tree/panels.ipynb"), tmp_path)
        reader.run_all()
        page = reader.page

        def after(action, part: str) -> None:
            """Wait until the picture of a panel is another one."""
            image = page.locator(f"{part} img")
            before = image.get_attribute("src")
            action()
            page.wait_for_function(
                "([part, old]) => document.querySelector(part + ' img').src !== old",
                arg=[part, before],
            )

        assert page.locator(".nbh-loss img").evaluate("image => image.naturalWidth") > 200
        page.locator(".nbh-loss").screenshot(path=tmp_path / "loss.png")
        readout = page.locator(".nbh-candidates .widget-readout")
        after(lambda: (readout.fill("7"), readout.press("Enter")), ".nbh-candidates")
        page.wait_for_selector("text=/mR 42.3, .*14.0 ms for an image/")
        page.locator(".nbh-candidates").screenshot(path=tmp_path / "candidates.png")
        lists = page.locator(".nbh-maps select")
        after(lambda: lists.nth(1).select_option("CFITR"), ".nbh-maps")
        after(lambda: lists.nth(2).select_option("words"), ".nbh-maps")
        after(lambda: lists.nth(3).select_option("2. ponds"), ".nbh-maps")
        page.locator(".nbh-maps").screenshot(path=tmp_path / "maps.png")
        after(lambda: lists.nth(0).select_option("a road"), ".nbh-maps")
        assert lists.nth(3).locator("option").all_inner_texts() == ["1.\xa0a", "2.\xa0road"]
        assert reader.errors == []
        browser.close()
