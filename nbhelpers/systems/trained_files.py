"""The names of the systems, and the files that a run keeps of each. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

from nbhelpers.errors import UserError

NOTEBOOK_OF = {
    "pir": "20_pir",
    "pir_clip": "21_pir_clip",
    "pe_rsitr": "22_pe_rsitr",
    "cfitr": "23_cfitr",
    "bita": "24_bita",
}
# as records and figures call them
NAMES = {
    "pir": "PIR",
    "pir_clip": "PIR-CLIP",
    "pe_rsitr": "PE-RSITR",
    "cfitr": "CFITR",
    "bita": "BITA",
}
SYSTEMS = tuple(NOTEBOOK_OF)
RETRIEVAL = ("pir", "pir_clip", "pe_rsitr", "cfitr")


def trained_files(folder: Path | str, system: str, seed: int = 0) -> tuple[Path, Path]:
    """Return the checkpoint and the starting weights of a system in the run `folder`.

    Raises:
        UserError: the system is unknown, its notebook has not run in this folder, it trained
            nothing (it was given a CHECKPOINT), or the checkpoint is gone.
    """
    if system not in SYSTEMS:
        raise UserError(f"There is no system '{system}'; choose one of {', '.join(SYSTEMS)}.")
    folder, notebook = Path(folder), NOTEBOOK_OF[system]
    note = folder / ("captions" if system == "bita" else "records") / f"{notebook}-seed{seed}.json"
    try:
        file = json.loads(note.read_text(encoding="utf-8")).get("checkpoint", "")
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no trained {system} of seed {seed} yet; run {notebook} first."
        ) from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{note} cannot be read ({error}); run {notebook} again.") from error
    if not file or not (folder / file).is_file():
        raise UserError(
            f"{note} names no checkpoint that is there{file and f' ({file})'}; run {notebook}"
            " again, without CHECKPOINT."
        )
    return folder / file, folder / "starting" / f"{system}-seed{seed}.json"
