"""All notebooks of paper_ucm in forks of one process, which imports the libraries once.

    python forks.py HOME '{"EPOCHS": 1}'

Papermill and Snakemake, which tests/runs/test_chain.py tries, would start Python 32 times.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from IPython.core.interactiveshell import InteractiveShell

from nbhelpers.runs import batch, needs

AT_ONCE = 2


def run(step: batch.Step, values: Mapping[str, Any], log: Path) -> int:
    """Run the cells of a notebook with its parameters; 0, or the number of the cell that fails."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(batch.NOTEBOOKS)
    shell = InteractiveShell.instance()
    given = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
    number = 0
    for cell in nbformat.read(f"{step.name}.ipynb", as_version=4).cells:
        parameters = "parameters" in cell.metadata.get("tags", [])
        for source in [cell.source, given][: 1 + parameters] if cell.cell_type == "code" else []:
            number += 1
            began = time.process_time()
            result = shell.run_cell(source, store_history=True)
            print(f"[{number}] {time.process_time() - began:.1f} s of the processor", flush=True)
            if not result.success:
                return number
    return 0


def start(step: batch.Step, values: Mapping[str, Any], log: Path) -> int:
    """Fork a process for a notebook and return its number."""
    if pid := os.fork():
        return pid
    code = 255
    try:
        code = run(step, values, log)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_all(values: Mapping[str, Mapping[str, Any]], logs: Path) -> list[str]:
    """Run all notebooks, each when those that it reads have ended; the names of those that fail."""
    waiting = {step.name: step for step in batch.CHAIN}
    running: dict[int, str] = {}
    failed: list[str] = []
    while waiting or running:
        unfinished = {*waiting, *running.values()}
        ready = [step for step in waiting.values() if not unfinished.intersection(step.reads)]
        for step in sorted(ready, key=lambda step: -step.budget)[: AT_ONCE - len(running)]:
            del waiting[step.name]
            pid = start(step, values[step.name], logs / f"{step.name}.log")
            running[pid] = step.name
        pid, status = os.wait()
        name, code = running.pop(pid), os.waitstatus_to_exitcode(status)
        print(
            f"{name}: {'ran to its end' if code == 0 else f'failed in cell [{code}]'}", flush=True
        )
        failed += [name] if code else []
    return failed


def import_libraries() -> None:
    """Import what the notebooks import; no thread may start before the forks."""
    from nbhelpers import figures  # noqa: F401
    from nbhelpers.papers import bita, cfitr, pe_rsitr, pir, pir_clip  # noqa: F401
    from nbhelpers.systems import region_maps, search_panel, trained_systems  # noqa: F401
    from nbhelpers.tasks import captioning, pretraining, retrieval, stand_ins  # noqa: F401


def main(home: Path, given: dict[str, Any]) -> int:
    """Check the profile as `make run` does, then run all; print the end of each failed log."""
    needs.require("paper_ucm", given, "")
    values = batch.check_profile("paper_ucm", given)
    logs = home / "logs"
    logs.mkdir(exist_ok=True)
    import_libraries()
    failed = run_all(values, logs)
    for name in failed:
        print(f"{name}:\n{(logs / f'{name}.log').read_text()[-3000:]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
