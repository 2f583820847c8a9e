"""The pages beside the code: their commands are understood, their links lead somewhere, what they name is there."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nbhelpers import __main__ as command_line
from nbhelpers import batch

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "data/README.md", "nbhelpers/papers/README.md")
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
COMMANDS = [(name, found) for name in PAGES for found in re.findall(r"python -m nbhelpers ([^\n`#]+)", TEXT[name])]
COMMANDS += [(name, found) for name in PAGES for found in re.findall(r"-m nbhelpers (train [^\n`#]+)", TEXT[name])]
_VALUES = r"""make run ((?:[A-Z]+=(?:"[^"]+"|[^\s`;:,]+) *)+)"""
RUNS = sorted({found for text in TEXT.values() for found in re.findall(_VALUES, text)})


@pytest.mark.parametrize("page, command", COMMANDS, ids=lambda value: value[:60])
def test_commands_are_understood(page, command):
    words = shlex.split(command)
    if words[0] != "records":  # which reads its own words
        arguments, more = command_line._parser().parse_known_args(words)
        assert more == [] and callable(arguments.command)


@pytest.mark.parametrize("command", RUNS)
def test_make_run_names_profiles_and_notebooks_that_exist(command):
    given = dict(word.split("=", 1) for word in shlex.split(command))
    assert set(given) <= {"PROFILE", "DATA", "SEEDS", "UPTO", "JOBS"}
    batch.select(given.get("UPTO", ""))
    if given.get("PROFILE", "town") != "town":  # the reader's own
        assert batch.read_profile(given["PROFILE"])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", TEXT[page])
    assert all(((ROOT / page).parent / target).exists() for target in targets), targets


def test_parameters_that_the_pages_set_are_known_to_a_notebook():
    known = set().union(*(batch.known_parameters(batch.NOTEBOOKS / f"{step.name}.ipynb") for step in batch.CHAIN))
    named = {name for text in TEXT.values() for name in re.findall(r"`([A-Z][A-Z0-9_]+): [^`]+`", text)}
    named |= {name for text in TEXT.values() for name in re.findall(r"`([A-Z_]+_(?:EPOCHS|BATCH|LR|ACCUMULATE))`", text)}
    assert {"SHARDS", "VILT", "CAPTION_SETS", "CFITR_BATCH"} <= named
    assert {name for name in named if not name.startswith("SIX_")} <= known
