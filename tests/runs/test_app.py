"""The application: it asks what a run has trained, and says so where nothing was."""

from __future__ import annotations

import ast
import json

import pytest

from nbhelpers.errors import UserError
from nbhelpers.runs import app, batch

NOTEBOOK = batch.NOTEBOOKS / "app" / "search.ipynb"


def test_where_nothing_was_trained_a_sentence_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path))
    with pytest.raises(UserError, match="run `make run PROFILE=default` first"):
        app.search_panel()
    assert capsys.readouterr().out == ""


def test_a_profile_without_its_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path))
    with pytest.raises(UserError, match="SET ucm needs DATA"):
        app.search_panel("ucm")


def test_its_notebook_calls_the_package_and_stores_nothing():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    (code,) = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code["outputs"] == [] and code["execution_count"] is None
    tree = ast.parse("".join(code["source"]))
    called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "search_panel" in called and hasattr(app, "search_panel")


def test_it_is_no_step_of_the_chain():
    assert "search" not in {step.name for step in batch.CHAIN}
    assert NOTEBOOK not in set(batch.NOTEBOOKS.glob("*.ipynb"))
