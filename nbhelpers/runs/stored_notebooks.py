"""The form of committed notebooks: executed, with text, without images, widgets and timings."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat

from nbhelpers.errors import UserError
from nbhelpers.files import atomic_write
from nbhelpers.paths import notebooks_folder, repository_root

NOTEBOOKS = notebooks_folder()
SIZE_LIMIT = 100_000
DROPPED = ("image/", "application/vnd.jupyter.widget", "application/javascript")
EXTRA_KEYS = [
    "metadata.widgets",
    "metadata.papermill",
    "metadata.language_info.version",
    "cell.metadata.execution",
    "cell.metadata.papermill",
    "cell.metadata.ExecuteTime",
]
TIME = re.compile(r"\d+(\.\d+)?(?= ?(s|ms|min|seconds|it/s|images/s)\b)")


def store(names: Sequence[str] = (), notebooks: Path = NOTEBOOKS) -> None:
    """Execute notebooks with their committed parameters and write them in their stored form.

    names   beginnings of notebook names; none means all

    Raises UserError where a cell fails; that file and the later ones stay as they were.
    """
    for path in chosen(names, notebooks):
        began = time.monotonic()
        text = nbformat.writes(stored_form(_executed(path))) + "\n"
        with atomic_write(path) as temporary:
            temporary.write_text(text)
        size = len(text.encode()) / 1000
        print(f"{path.name}: {time.monotonic() - began:.0f} s, {size:.0f} kB", flush=True)


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

    Text and execution counts stay. Images, widgets and timings go. Cell ids are numbers.
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
    return strip_output(
        notebook, keep_output=True, keep_count=True, keep_id=False, extra_keys=EXTRA_KEYS
    )


def _stored_output(output: nbformat.NotebookNode, unchecked: bool) -> nbformat.NotebookNode:
    """Return the text of an output; where nbval compares nothing, without times of execution."""
    if "data" in output:
        output.data = {
            kind: value for kind, value in output.data.items() if not kind.startswith(DROPPED)
        }
        output.metadata = {}
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
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    counts = [cell.execution_count for cell in code]
    checks = {
        f"is larger than {SIZE_LIMIT // 1000} kB": len(text.encode()) >= SIZE_LIMIT,
        "was not executed from top to bottom": counts != list(range(1, len(code) + 1)),
        "holds an error": any(output.output_type == "error" for output in outputs),
        "holds output to stderr": any(output.get("name") == "stderr" for output in outputs),
        "names a folder of the machine that executed it": (
            str(repository_root()) in json.dumps(outputs)
        ),
        "is not stripped (run `python -m nbhelpers notebooks store`)": (
            nbformat.writes(stored_form(notebook)) + "\n" != text
        ),
    }
    return [problem for problem, found in checks.items() if found]
