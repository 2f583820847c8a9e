"""The commands of `records`: show, check, table, trace, export and merge result records."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nbhelpers.errors import UserError
from nbhelpers.runs.options import AsJson, group, print_json, rows_of

if TYPE_CHECKING:
    from nbhelpers.results.leaderboard import Board
    from nbhelpers.results.records import Record

app = group("Show, check and table result records.")
Folders = Annotated[
    list[str], typer.Argument(help="Folders, e.g. runs/default/records or data/results.")
]
Out = Annotated[str, typer.Option(help="Folder to write.")]


@app.command()
def show(folder: Folders, as_json: AsJson = False) -> None:
    """Print what each record says."""
    found = _read(folder)
    if as_json:
        print_json(found)
    else:
        print("\n\n".join(map(_shown, found)))


@app.command()
def check(folder: Folders, as_json: AsJson = False) -> None:
    """Check records and their ranks; exit code 1 for a problem."""
    from nbhelpers.results import records

    problems, found = [], records.paths(folder)
    for path in found:
        try:
            records.read_checked(path)
        except UserError as error:
            problems.append(str(error))
    if as_json:
        print_json({"records": [str(path) for path in found], "problems": problems})
    else:
        print(f"{len(found)} records, {len(problems)} with a problem.")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)


@app.command()
def table(
    folder: Folders,
    form: Annotated[
        Literal["text", "markdown", "latex"], typer.Option("--format", help="Form of the tables.")
    ] = "text",
    as_json: AsJson = False,
) -> None:
    """Print the leaderboard."""
    found = _read(folder)  # before scipy is imported
    from nbhelpers.results import exports, leaderboard

    if as_json:
        print_json([_board(board) for board in leaderboard.boards(found)])
    elif form == "text":
        print(leaderboard.table(found), end="")
    elif form == "markdown":
        print(exports.markdown(leaderboard.boards(found)), end="")
    else:
        print(exports.latex(leaderboard.boards(found)), end="")


def _read(folders: list[str]) -> list[Record]:
    from nbhelpers.results import records

    return [records.read_one(path) for path in records.paths(folders)]


def _board(board: Board) -> dict[str, Any]:
    rows = rows_of(board.rows.rename_axis("name").reset_index())
    return {"heading": board.heading, "rows": rows, "notes": list(board.notes)}


@app.command()
def export(folder: Folders, out: Out) -> None:
    """Write the leaderboard and a card for each paper as files."""
    from nbhelpers.results import pages

    print("\n".join(map(str, pages.write(folder, out))))


@app.command()
def merge(folder: Folders, out: Out) -> None:
    """Copy records and ranks of several machines into a new folder."""
    from nbhelpers.results import records

    print(f"{records.merge(folder, out)} records lie in {out}.")


@app.command()
def readme() -> None:
    """Renew the tables of records in data/results/README.md."""
    from nbhelpers.paths import repository_root
    from nbhelpers.results import pages

    path = repository_root() / "data/results/README.md"
    print(f"data/results/{path.name} {'was renewed' if pages.readme(path) else 'is current'}.")


@app.command()
def trace(
    page: Annotated[
        list[Path] | None, typer.Argument(help="Pages; without one, those of the repository.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the records behind the numbers in a page's sentences; exit code 1 if one differs."""
    from nbhelpers.paths import repository_root
    from nbhelpers.results import traces

    root = repository_root()
    results = root / "data/results"
    pages = page or [root / "README.md", *sorted(results.rglob("README.md"))]
    found = list(chain.from_iterable(traces.traces(one, results) for one in pages))
    if as_json:
        print_json([asdict(trace) | {"holds": trace.holds} for trace in found])
    else:
        print("\n".join(map(str, found)))
    wrong = [trace for trace in found if not trace.holds]
    for trace in wrong:
        print(
            f"{trace.page}, line {trace.line}: the sentence says {trace.said}, but {trace.column}"
            f" of {trace.row} is {trace.cell}; write that.",
            file=sys.stderr,
        )
    if wrong:
        raise typer.Exit(1)


def _shown(record: Record) -> str:
    lines = [*_origin(record), *_numbers(record)]
    if record["notes"]:
        lines.append(record["notes"])
    return "\n  ".join(lines)


def _origin(record: Record) -> Iterator[str]:
    """Yield lines about system, data, cost, code and weights."""
    from nbhelpers.results.records import file_stem

    git, protocol = record["git"], record["protocol"]
    yield f"{file_stem(record)}: {record['system']} {record['variant']}".rstrip()
    data = record["data_fingerprint"][:12]
    yield f"profile {record['profile']}, set {record['set']}, data {data}"
    yield f"{protocol['split']} split, selected on {protocol['selected_on']}"
    if "parameters" in record:
        yield "{all:,} parameters, {trainable:,} trainable".format(**record["parameters"])
    took = f"{record['seconds']:.0f} s " if "seconds" in record else ""
    yield f"{took}on {record['device']}"
    changes = " with local changes" if git["dirty"] else ""
    yield f"revision {(git['revision'] or 'unknown')[:12]}{changes}"
    for one in record["weights"]:
        hashed = one["sha256"][:12]
        yield f"weights {one['name']} ({one['kind']}): {one['source']} {hashed}".rstrip()


def _numbers(record: Record) -> Iterator[str]:
    """Yield a line of numbers for each tie rule, or for the captions, and for the bounds."""
    if record.get("kind") == "captions":
        images = record["protocol"]["images"]
        scores = {name: 100 * value for name, value in record["metrics"].items()}
        yield f"captions of {images} images, x 100: {_listed(scores)}"
        return
    for ties, metrics in record["metrics"].items():
        yield f"ties by {ties} rule: {_listed(metrics)}"
    for bound in ("ceiling", "chance"):
        yield f"{bound}: {_listed(record[bound])}"


def _listed(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in numbers.items()) or "-"
