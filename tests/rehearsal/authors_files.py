"""The trained models of a rehearsal in the layouts of their authors, written and used again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import release_files
import release_states
import small_sets

from nbhelpers.__main__ import main
from nbhelpers.systems import trained_systems

NOTES = {"pir": "config", "pe_rsitr": "options", "cfitr": "hyper_parameters", "bita": "config"}


def write(folder: Path, system: str, path: Path) -> None:
    """Write what the authors of a system write: without a note of this project."""
    content = release_files.content_of(trained_systems.trained(folder, system).model)
    content.get(NOTES.get(system, ""), content).pop("nbhelpers", None)
    release_states.save_pickle(path, content)


def use(home: Path, system: str, path: Path) -> int:
    """Evaluate a file of the authors' layout, or describe images with it."""
    data = home / "data"
    words = ["--system", system, "--checkpoint", str(path), "--device", "cpu"]
    words += ["--captions", str(data / "dataset_ucm.json"), "--images", str(data / "UCM_images")]
    if system != "bita":
        return main(["eval", *words, "--out", str(home / "records")])
    start = home / "runs/paper_ucm/starting/bita-seed0.json"
    said = home / "captions.json"
    code = main(["caption", *words, "--start", str(start), "--out", str(said)])
    return code or len(json.loads(said.read_text())["captions"]) != small_sets.COUNTS["test"]


if __name__ == "__main__":
    home = Path(sys.argv[1])
    for system in trained_systems.SYSTEMS:
        path = home / f"{system}.pth"
        write(home / "runs/paper_ucm", system, path)
        if use(home, system, path):
            sys.exit(f"{system}: a file in the layout of its authors could not be used")
        path.unlink()
