"""The form of committed notebooks: executed, with text and small pictures, without widgets.

Their metadata hold a stamp: of what code and cells they were stored, so that all of one run can be
told from those of another.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import nbformat

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.paths import notebooks_folder, repository_root
from nbhelpers.runs import freshness

NOTEBOOKS = notebooks_folder()
TEXT_LIMIT, FILE_LIMIT = 150_000, 400_000  # bytes of a notebook without, and with, its pictures
PICTURE_LIMITS = (60_000, 50_000, 42_000, 36_000, 30_000, 25_000, 20_000, 15_000, 10_000)
STAMP = "nbhelpers"  # the key of the metadata
DROPPED = (
    "image/svg",
    "image/jpeg",
    "application/vnd.jupyter.widget",
    "application/javascript",
)
EXTRA_KEYS = [
    "metadata.widgets",
    "metadata.papermill",
    "metadata.language_info.version",
    "cell.metadata.execution",
    "cell.metadata.papermill",
    "cell.metadata.ExecuteTime",
]
TIME = re.compile(r"\d+(\.\d+)?(?= ?(s|ms|min|seconds|it/s|images/s)\b)")


def store(
    names: Sequence[str] = (), notebooks: Path = NOTEBOOKS, run: Path | str | None = None
) -> None:
    """Write notebooks in their stored form, with their committed parameters.

    names   beginnings of notebook names; none means all
    run     the folder of a finished run of the default profile, whose executed copies are taken;
            None: they are executed now

    Raises UserError where a cell fails, or where a copy is not of these cells or this code; that
    file and the later ones stay as they were.
    """
    package = freshness.package()
    for path in chosen(names, notebooks):
        began, made_of = time.monotonic(), stamp(path, package)
        executed = _executed(path) if run is None else _copy_of_run(path, Path(run), made_of)
        executed.metadata[STAMP] = made_of
        text = nbformat.writes(stored_form(executed)) + "\n"
        with atomic_write(path) as temporary:
            temporary.write_text(text)
        size = len(text.encode()) / 1000
        print(f"{path.name}: {time.monotonic() - began:.0f} s, {size:.0f} kB", flush=True)


def stamp(path: Path, package: str) -> dict[str, str]:
    """Return what a notebook is made of: digests of the package, as given, and of its cells."""
    return {"package": package, "cells": freshness.cells(path)}


def stamps(notebooks: Path = NOTEBOOKS) -> dict[str, dict[str, str]]:
    """Return the stamp of each stored notebook, {} where there is none."""
    return {
        path.stem: dict(nbformat.read(path, as_version=4).metadata.get(STAMP, {}))
        for path in chosen((), notebooks)
    }


def moved_on(notebooks: Path = NOTEBOOKS) -> list[str]:
    """Return the notebooks whose cells, or whose package, changed since they were stored."""
    package, found = freshness.package(), stamps(notebooks)
    return [
        name for name, one in found.items() if one != stamp(notebooks / f"{name}.ipynb", package)
    ]


def _copy_of_run(path: Path, run: Path, expected: dict[str, str]) -> nbformat.NotebookNode:
    """Return the executed copy of a finished run, in the form of the notebook `path`.

    UserError if there is none, or its stamp is not the expected one.
    """
    seed = 0  # of the parameters cell
    note = run / f"finished/{path.stem}-seed{seed}.json"
    copy = run / f"notebooks/{path.stem}-seed{seed}.ipynb"
    if not note.is_file() or not copy.is_file():
        raise UserError(f"{run} holds no finished {path.stem}; run the default profile first.")
    made_of = json.loads(note.read_text())["made_of"]
    if {key: made_of[key] for key in expected} != expected:
        raise UserError(f"{path.name} or the package changed since {run} was made; run it again.")
    executed = nbformat.read(copy, as_version=4)
    cells = [
        cell
        for cell in executed.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    original = nbformat.read(path, as_version=4)
    counts = iter(range(1, len(cells) + 1))
    for cell, other in zip(cells, original.cells, strict=True):
        cell.source, cell.metadata = other.source, other.metadata
        if cell.cell_type == "code":
            cell.execution_count = next(counts)
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = cell.execution_count
    executed.cells, executed.metadata = cells, original.metadata
    return executed


def verify(names: Sequence[str] = (), notebooks: Path = NOTEBOOKS) -> list[str]:
    """One sentence for each way in which a notebook is not in its stored form; [] if all are."""
    found = []
    for path in chosen(names, notebooks):
        found += [f"{path.name} {problem}" for problem in _problems(path)]
    return found


def chosen(names: Sequence[str], notebooks: Path) -> list[Path]:
    """Return the notebooks whose names start with one of `names`, sorted; all for no name.

    UserError for a name with which no notebook starts.
    """
    paths = sorted(notebooks.glob("*.ipynb"))
    for name in names or [""]:
        if not any(path.name.startswith(name) for path in paths):
            raise UserError(f"There is no notebook {name}*.ipynb in {notebooks}.")
    return [path for path in paths if not names or path.name.startswith(tuple(names))]


def stored_form(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a copy in the committed form.

    Text, pictures and execution counts stay, the pictures as small as the file needs. Widgets and
    timings go. Cell ids are numbers.
    """
    from nbstripout import strip_output

    notebook = nbformat.reads(nbformat.writes(notebook), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            unchecked = "nbval-ignore-output" in cell.metadata.get("tags", [])
            cell.outputs = [
                _stored_output(output, unchecked)
                for output in cell.outputs
                if not (unchecked and output.get("name") == "stderr")
            ]
    stripped = strip_output(
        notebook, keep_output=True, keep_count=True, keep_id=False, extra_keys=EXTRA_KEYS
    )
    return _with_small_pictures(stripped)


def _with_small_pictures(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the notebook with pictures of the largest limit under which the file fits."""
    from nbhelpers.figures import style  # which imports matplotlib

    pictures = _pictures(notebook)
    made: list[Iterator[bytes]] = []
    for data in pictures:
        made.append(style.reductions(base64.b64decode(data["image/png"])))
    smaller = [next(reductions) for reductions in made]
    for limit in PICTURE_LIMITS:
        for number, reductions in enumerate(made):
            while len(smaller[number]) > limit:
                following = next(reductions, None)
                if following is None:
                    break
                smaller[number] = following
        for data, png in zip(pictures, smaller, strict=True):
            data["image/png"] = base64.b64encode(png).decode()
        if len(nbformat.writes(notebook).encode()) < FILE_LIMIT:
            break
    return notebook


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _pictures(notebook: nbformat.NotebookNode) -> list[dict[str, Any]]:
    """Return the data of all outputs that hold a PNG."""
    outputs = chain.from_iterable(cell.outputs for cell in _code(notebook))
    return [output.data for output in outputs if "image/png" in output.get("data", {})]


def _stored_output(output: nbformat.NotebookNode, unchecked: bool) -> nbformat.NotebookNode:
    """Return an output as it is stored; where nbval compares nothing, without times."""
    if "data" in output:
        output.data = {
            kind: value for kind, value in output.data.items() if not kind.startswith(DROPPED)
        }
        output.metadata = {
            kind: value for kind, value in output.metadata.items() if kind == "image/png"
        }
    if unchecked:
        if "text" in output:
            output.text = TIME.sub("_", output.text)
        for kind in {"text/plain", "text/html"} & set(output.get("data", {})):
            output.data[kind] = TIME.sub("_", output.data[kind])
    return output


def _executed(path: Path) -> nbformat.NotebookNode:
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        return client.execute(env=os.environ | {"TQDM_DISABLE": "1"})
    except CellExecutionError as error:
        raise UserError(f"{path.name} was not stored: {error.ename}: {error.evalue}") from error
    except DeadKernelError as error:
        raise UserError(
            f"{path.name} was not stored, as its kernel died (too little memory?)."
        ) from error


def _problems(path: Path) -> list[str]:
    text = path.read_text()
    notebook = nbformat.reads(text, as_version=4)
    pictures = sum(len(data["image/png"]) for data in _pictures(notebook))
    code = _code(notebook)
    outputs = list(chain.from_iterable(cell.outputs for cell in code))
    counts = [cell.execution_count for cell in code]
    checks = {
        f"has more than {TEXT_LIMIT // 1000} kB of text": (
            len(text.encode()) - pictures >= TEXT_LIMIT
        ),
        f"is larger than {FILE_LIMIT // 1000} kB": len(text.encode()) >= FILE_LIMIT,
        "was not executed from top to bottom": counts != list(range(1, len(code) + 1)),
        "holds an error": any(output.output_type == "error" for output in outputs),
        "lacks a picture (run `python -m nbhelpers notebooks store`)": any(
            "display.Image" in output.data.get("text/plain", "") and "image/png" not in output.data
            for output in outputs
            if "data" in output
        ),
        "holds output to stderr": any(output.get("name") == "stderr" for output in outputs),
        "names a folder of the machine that executed it": (
            str(repository_root()) in json.dumps(outputs)
        ),
        "is not stripped (run `python -m nbhelpers notebooks store`)": (
            nbformat.writes(stored_form(notebook)) + "\n" != text
        ),
    }
    return [problem for problem, found in checks.items() if found]
