"""The pages beside the code: their commands are understood, their links lead somewhere, what they
name is there.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from nbhelpers.runs import batch, commands, parameters

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (
        ".",
        "notebooks",
        "data",
        "data/results/*",
        "nbhelpers",
        "nbhelpers/papers",
        "nbhelpers/runs",
        "nbhelpers/systems",
    )
    for path in ROOT.glob(f"{folder}/README.md")
)
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
_VALUES = r"""make run ((?:[A-Z]+=(?:"[^"]+"|[^\s`;:,]+) *)+)"""
RUNS = sorted({found for text in TEXT.values() for found in re.findall(_VALUES, text)})


def documented() -> list[list[str]]:
    """The commands of this package that the pages show, as argument lists."""
    lines = (line for text in TEXT.values() for line in re.split(r"\n|`", text))
    calls = (re.search(r"-m nbhelpers ([a-z].*)", re.split(" +# | < ", line)[0]) for line in lines)
    return [shlex.split(call[1]) for call in calls if call and "..." not in call[1]]


def parse(argv: list[str]) -> None:
    """Parse a command line without running it; an exception if it is wrong."""
    command, words = get_command(commands.app), list(argv)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("nbhelpers", words)


@pytest.mark.parametrize("argv", documented(), ids=" ".join)
def test_documented_commands_are_accepted(argv):
    parse(argv)


def test_a_wrong_command_is_not_accepted():
    with pytest.raises(typer.BadParameter):
        parse(["train", "--system", "blip"])


def test_every_command_is_in_the_readme_of_the_runs():
    text = TEXT["nbhelpers/runs/README.md"]
    names = get_command(commands.app).commands.keys()
    assert {argv[0] for argv in documented()} >= names
    assert all(f"| `{name}` |" in text for name in names)


def test_every_room_is_in_the_readme_of_the_package():
    text = TEXT["nbhelpers/README.md"]
    rooms = [
        path.name for path in (ROOT / "nbhelpers").iterdir() if (path / "__init__.py").exists()
    ]
    assert len(rooms) == 10 and all(f"| [{room}](" in text for room in rooms)
    assert all(
        f"[`{path.stem}`]" in text
        for path in (ROOT / "nbhelpers").glob("*.py")
        if not path.stem.startswith("__")
    )


@pytest.mark.parametrize("command", RUNS)
def test_make_run_names_profiles_and_notebooks_that_exist(command):
    given = dict(word.split("=", 1) for word in shlex.split(command))
    others = set(given) - {"PROFILE", "DATA", "SEEDS", "UPTO", "JOBS"}
    assert others <= set(batch.values_of("default"))
    batch.select(given.get("UPTO", ""))
    if given.get("PROFILE", "town") != "town":  # the reader's own
        assert batch.read_profile(given["PROFILE"])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", TEXT[page])
    assert all(((ROOT / page).parent / target).exists() for target in targets), targets


def test_parameters_that_the_pages_set_are_known_to_a_notebook():
    known = set(parameters.Parameters.model_fields)
    named = {
        name for text in TEXT.values() for name in re.findall(r"`([A-Z][A-Z0-9_]+): [^`]+`", text)
    }
    named |= {
        name
        for text in TEXT.values()
        for name in re.findall(r"`([A-Z_]+_(?:EPOCHS|BATCH|LR|ACCUMULATE))`", text)
    }
    assert {"SHARDS", "VILT", "CAPTION_SETS", "CFITR_BATCH"} <= named
    assert {name for name in named if not name.startswith("SIX_")} <= known
