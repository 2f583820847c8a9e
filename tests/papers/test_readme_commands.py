"""The commands of nbhelpers/papers/README.md, which stand beside those of the authors: each is read
by the program that would run it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
from accelerate.commands.launch import launch_command_parser

from nbhelpers.paths import notebooks_folder
from nbhelpers.runs import batch, commands, needs, parameters

README = Path(commands.__file__).parents[1] / "papers/README.md"
SECTION = README.read_text().split("## Coming from")[1].split("\n## ")[0]
KINDS = ("make ", "python -m nbhelpers ", "accelerate launch ", "papermill ")
COMMANDS = [
    code
    for row in re.findall(r"^\|(?!---).*\|$", SECTION, re.M)
    for code in re.findall(r"`([^`]+)`", row.split("|")[-2])
    if code.startswith(KINDS)
]


def read_by_typer(words: list[str]) -> str:
    """The command that reads the words, without a call."""
    command: click.Command = typer.main.get_command(commands.app)
    context, name = None, "nbhelpers"
    while True:
        context = command.make_context(name, words, parent=context)
        if not hasattr(command, "resolve_command"):
            return name
        rest = [*context._protected_args, *context.args]
        name, command, words = command.resolve_command(context, rest)


def read_by_make(words: list[str]) -> None:
    """What `make run` hands on: a profile, its parameters and the last notebook."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    chosen = needs.choose(given.pop("PROFILE", "default"), {}, given.pop("UPTO", ""))
    assert chosen.steps and set(given) <= {"DATA", "SIZE", "SEED"}


def read_by_papermill(words: list[str]) -> None:
    notebook = notebooks_folder() / Path(words[0]).name
    names = [words[at + 1] for at, word in enumerate(words) if word == "-p"]
    assert set(names) <= set(parameters.declared(notebook)) and names
    for at, word in enumerate(words):
        if word == "-f":
            assert (notebooks_folder().parent / words[at + 1]).is_file()


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_read_as_it_stands(line):
    program, *words = shlex.split(line)
    if program == "make":
        target, *values = words
        makefile = (notebooks_folder().parent / "Makefile").read_text()
        assert re.search(rf"^{target}:", makefile, re.M)
        return read_by_make(values) if target == "run" else None
    if program == "papermill":
        return read_by_papermill(words)
    if program == "accelerate":
        found = launch_command_parser().parse_args(words[1:])
        assert found.module and found.training_script == "nbhelpers"
        words = ["-m", "nbhelpers", *found.training_script_args]
    assert words[:2] == ["-m", "nbhelpers"]
    name = read_by_typer(words[2:])
    assert name != "nbhelpers"


def test_each_of_the_five_systems_has_its_commands():
    assert len(COMMANDS) >= 17
    for part, notebook in zip(
        SECTION.split("### ")[1:], batch.RETRIEVAL_NOTEBOOKS + ("24_bita",), strict=True
    ):
        assert f"UPTO={notebook[:2]}" in part, part.splitlines()[0]
