"""`display` outside a notebook: text is printed, an object's address never."""

from __future__ import annotations

import io

import pandas as pd
from IPython import display as rich
from matplotlib.figure import Figure

from nbhelpers.runs.plain_display import plain_display


def said(*objects: object) -> str:
    from contextlib import redirect_stdout

    buffer = io.StringIO()
    with plain_display(), redirect_stdout(buffer):
        cells: dict = {"objects": objects}
        exec("from IPython.display import display\ndisplay(*objects)", cells)
    return buffer.getvalue()


def test_sentences_and_tables_are_printed():
    assert said(rich.Markdown("Validation mR is **79.2**.")) == "Validation mR is **79.2**.\n"
    assert said("a", pd.DataFrame({"mR": [79.2]})) == "a\n     mR\n0  79.2\n"


def test_pictures_and_widgets_are_left_out():
    import ipywidgets

    assert said(rich.Image(b"", format="png"), Figure(), ipywidgets.HTML("x"), rich.HTML("y")) == ""


def test_display_is_itself_again_afterwards():
    before = rich.display
    said("a")
    assert rich.display is before
