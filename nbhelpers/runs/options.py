"""Options that several commands share, checks of what they name, and JSON output."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from nbhelpers.errors import UserError
from nbhelpers.files import given
from nbhelpers.systems.trained_files import RETRIEVAL

if TYPE_CHECKING:
    import pandas as pd

# what `train` takes: the systems, and any CLIP
Trainable = Literal["pir", "pir_clip", "pe_rsitr", "cfitr", "bita", "clip"]

MANY = 10**6  # a bound far above what is of use: it catches a slip that would fill the memory


class Split(StrEnum):
    """A split of a data set."""

    train = "train"
    val = "val"
    test = "test"


Profile = Annotated[str, typer.Option(help="A file of notebooks/profiles, without .yaml.")]
Data = Annotated[str, typer.Option(help="Folder that holds the data sets.")]
Upto = Annotated[str, typer.Option(help="Stop after the notebook whose name starts so, e.g. 20.")]
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="NAME=VALUE of a parameter, as in a profile; counts before it.", metavar="SET"
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed; by default the profile's SEED.")]
Captions = Annotated[
    str,
    typer.Option(
        help="Caption file, such as dataset_rsicd.json, or the folder of a layout of several files."
    ),
]
Images = Annotated[str, typer.Option(help="Folder, zip or tar of the images.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def retrieval_system(name: str) -> str:
    """Return the name of a retrieval system; a wrong choice for BITA and unknown names."""
    if name == "bita":
        raise typer.BadParameter(
            "BITA writes captions and does not search; use `caption`, then `score`."
        )
    if name not in RETRIEVAL:
        raise typer.BadParameter(f"'{name}' is not one of {', '.join(RETRIEVAL)}.")
    return name


def _complete_retrieval(incomplete: str) -> list[str]:
    return [name for name in RETRIEVAL if name.startswith(incomplete)]


RetrievalSystem = Annotated[
    str,
    typer.Option(
        help="A retrieval system.",
        metavar=f"<{'|'.join(RETRIEVAL)}>",
        callback=retrieval_system,
        autocompletion=_complete_retrieval,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help=(
            "Trained weights: a file of this project or of the system's authors. By default the "
            "model that the run of --profile and --seed trained."
        )
    ),
]
Start = Annotated[
    str | None,
    typer.Option(
        help=(
            "The starting weights of the checkpoint: the file that 12_starting_weights wrote. "
            "Needed where it lies outside the run of the checkpoint."
        )
    ),
]
RunProfile = Annotated[str, typer.Option(help="Profile of the run, without --checkpoint.")]
RunSeed = Annotated[
    int | None,
    typer.Option(help="Seed of the run, without --checkpoint; by default the profile's SEED."),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or mps; auto takes a GPU where there is one.")
]


def group(what: str) -> typer.Typer:
    """Return a new group of commands with plain help and -h beside --help."""
    return typer.Typer(
        help=what,
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


class SeveralValues(TyperCommand):
    """A command whose list options take several values after one name: `--seeds 0 1 2`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat list options before each of their values, then parse as usual."""
        options = [option for option in self.params if getattr(option, "multiple", False)]
        names = set().union(*(option.opts for option in options))
        return super().parse_args(ctx, repeat_options(args, names))


def repeat_options(words: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the words with each option of `names` repeated before each of its values."""
    found: list[str] = []
    option = ""
    for word in words:
        if word.startswith("--") or word == "-h":
            option = word if word in names else ""
        elif option and found[-1] != option:
            found.append(option)
        found.append(word)
    return found


def check_paths(**named: str | None) -> None:
    """Raise a UserError for the first path that does not exist, with the name of its option."""
    for option, path in named.items():
        if path and not given(path).exists():
            raise UserError(f"{path} does not exist; give --{option} a file or folder that does.")


def check_places(files: Mapping[str, str | None], folders: Mapping[str, str | None]) -> None:
    """Raise a UserError for a file to be written that is a folder, or the other way round.

    Called before long work, whose results could not be written.
    """
    for option, path in files.items():
        if path and given(path).is_dir():
            raise UserError(f"{path} is a folder; give --{option} the name of a file in it.")
    for option, path in folders.items():
        if path and any(part.is_file() for part in (Path(path), *Path(path).parents)):
            raise UserError(f"{path} is a file, or below one; give --{option} a folder.")


def parameter_values(words: Sequence[str]) -> dict[str, Any]:
    """Return the values of NAME=VALUE words, read as YAML; UserError for another form."""
    import yaml

    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--set has '{word}'; give NAME=VALUE, e.g. --set PRIOR=imagenet.")
        try:
            found[name] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise UserError(f"--set {name} is '{value}', which is no value of YAML.") from error
    return found


def check_count(option: str, count: int) -> None:
    """Raise a UserError if an option gives a number below 1."""
    if count < 1:
        raise UserError(f"--{option} is {count}; ask for at least 1.")


@contextmanager
def in_runs(what: str) -> Iterator[None]:
    """Let a command work in the folder of runs until the end of the block; see `at_work`."""
    from nbhelpers.paths import runs_root
    from nbhelpers.runs.at_work import at_work

    with at_work(runs_root(), what):
        yield


def print_json(value: Any) -> None:
    """Print a value as JSON; NaN and infinity become null."""
    print(json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as dictionaries of plain values; missing numbers are None."""
    return json.loads(frame.to_json(orient="records", double_precision=15))
