"""Write a reproducibility card for each paper.

Its facts come from the Markdown beside this file, its numbers from records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from string import Template

import pandas as pd

from nbhelpers.results import exports, leaderboard
from nbhelpers.results.leaderboard import Board
from nbhelpers.results.records import Record

PAPERS = {  # card -> the system, the notebooks whose records tell of it
    "pir": ("PIR", ("20_pir",)),
    "pir_clip": ("PIR-CLIP", ("21_pir_clip",)),
    "pe_rsitr": ("PE-RSITR", ("22_pe_rsitr",)),
    "cfitr": ("CFITR", ("23_cfitr", "25_two_stage_search")),
    "bita": ("BITA", ("24_bita", "50_score_captions")),
}


def cards(records: Sequence[Record], boards: Sequence[Board], folder: Path | str) -> dict[str, str]:
    """Paper -> its card as Markdown that lies in `folder`; `boards` are those of `records`.

    One without records says so.
    """
    return {paper: card(paper, records, boards, folder) for paper in PAPERS}


def card(paper: str, records: Sequence[Record], boards: Sequence[Board], folder: Path | str) -> str:
    """One card. Its rows keep the letters of the whole board: what they were tested against."""
    system, notebooks = PAPERS[paper]
    mine = [
        record
        for record in records
        if record["notebook"] in notebooks or record["system"] == system
    ]
    own = [
        part
        for board in boards
        if "notebook" in board.rows and (part := _part(board, system, notebooks)).files
    ]
    numbers = (
        exports.markdown([*own, *leaderboard.claimed(system)], folder)
        if own or leaderboard.claimed(system)
        else ""
    )
    none = "" if own else "No record of it is among those that this card was made from.\n\n"
    template = Template((files(__name__) / f"{paper}.md").read_text("utf-8"))
    return template.substitute(hardware=_hardware(mine), numbers=(none + numbers).rstrip())


def _part(board: Board, system: str, notebooks: Sequence[str]) -> Board:
    """The board's rows of one paper, with ceiling and chance beside them."""
    ours = board.rows.notebook.isin(notebooks) | (board.rows.system == system)
    kept = (ours | board.rows.notebook.isna()).tolist()
    if not ours.any():
        return replace(board, files=())
    return replace(
        board,
        rows=board.rows[kept],
        shown=board.shown[kept],
        files=tuple(found for found, keep in zip(board.files, kept, strict=True) if keep),
    )


def _hardware(records: Sequence[Record]) -> str:
    """A line for each set and profile: device, seconds, versions."""
    lines = []
    for profile, name in dict.fromkeys((record["profile"], record["set"]) for record in records):
        some = [
            record for record in records if (record["profile"], record["set"]) == (profile, name)
        ]
        seconds = pd.Series(
            [record["seconds"] for record in some if "seconds" in record], dtype=float
        )
        took = (
            f", {seconds.min():,.0f} to {seconds.max():,.0f} s of training" if len(seconds) else ""
        )
        versions = ", ".join(
            f"{package} {some[0]['versions'][package]}"
            for package in ("python", "torch", "transformers")
            if package in some[0]["versions"]
        )
        devices = ", ".join(dict.fromkeys(record["device"] for record in some))
        began = (
            ", ".join(dict.fromkeys(filter(None, map(leaderboard.started_from, some)))) or "nothing"
        )
        lines.append(
            f"- {name}, profile {profile}: {len(some)} records on {devices}{took}; {versions};"
            f" started from {began}."
        )
    return "\n".join(lines) or "- no run is recorded."
