"""The command line: `nbhelpers`, or `python -m nbhelpers`.

A command checks its options and files first. Only then it imports what it needs, because torch
and transformers take many seconds.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.main import get_command

from nbhelpers.errors import UserError, of_system, printable, reason
from nbhelpers.runs import data_commands, record_commands, system_commands, weight_commands
from nbhelpers.runs.bench_commands import bench
from nbhelpers.runs.options import (
    AsJson,
    Data,
    Given,
    Profile,
    SeveralValues,
    Upto,
    group,
    in_runs,
    parameter_values,
    print_json,
)
from nbhelpers.runs.train_command import train

if TYPE_CHECKING:
    from nbhelpers.runs.cache import Entry

ENDINGS = {130: "Interrupted.", 143: "Ended."}  # exit code: what is said
app = group("Run the notebooks, and use trained systems, data sets and records without them.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: it succeeded. 1: it failed, with a sentence on stderr. 2: the command line is wrong.
    130: it was interrupted; 143: it was ended by SIGTERM.
    """
    try:
        with _ended_in_order():
            get_command(app).main(argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(of_system(error), file=sys.stderr)
        return 1
    except Exception as error:
        print(_unforeseen(error), file=sys.stderr)
        return 1
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if code in ENDINGS:
            print(ENDINGS[code], file=sys.stderr)
        return code
    return 0


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the block as an error does: files and processes are cleared up.

    Python's own KeyboardInterrupt would now and then end the process by the signal itself: where it
    meets `exec` of a text, as in imports.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _unforeseen(error: Exception) -> str:
    """Write the traceback to a file; return a sentence that names it."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="nbhelpers-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write("".join(traceback.format_exception(error)))
    return printable(
        f"This was not foreseen ({type(error).__name__}: {reason(error)}); "
        f"report it with the file {file.name}, which has the details."
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nbhelpers {version('nbhelpers')}")
        raise typer.Exit


@app.callback()
def _program(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command(cls=SeveralValues)
def run(
    profile: Profile = "default",
    data: Data = "",
    seeds: Annotated[
        list[int] | None,
        typer.Option(help="One seed or several, one after the other; by default the profile's."),
    ] = None,
    upto: Upto = "",
    jobs: Annotated[
        int | None,
        typer.Option(help="Notebooks at a time, which share the cores: 1; 2 in profile default."),
    ] = None,
    given: Given = None,
) -> None:
    """Check what the notebooks need, then run them in order, without a browser."""
    from nbhelpers.runs import batch, needs

    batch.read_profile(profile)  # before all notebooks are read, which takes seconds
    values = parameter_values(given or ())
    needs.require(profile, values | ({"DATA": data} if data else {}), upto)
    raise typer.Exit(batch.run_chain(profile, data, seeds or None, upto, jobs, given=values))


@app.command(cls=SeveralValues)
def check(
    profile: Profile = "default",
    data: Data = "",
    upto: Upto = "",
    given: Given = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch what the hub has, then check again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List all that the notebooks of a profile need: weights, data, memory, disk, hours."""
    from nbhelpers.runs import needs

    values = parameter_values(given or ()) | ({"DATA": data} if data else {})
    chosen = needs.choose(profile, values, upto)
    rows = needs.table(chosen)
    if download:
        with redirect_stdout(sys.stderr if as_json else sys.stdout):
            failed = needs.download(rows)
        print("\n".join(failed), file=sys.stderr, end="\n" if failed else "")
        rows = needs.table(chosen)
    if as_json:
        print_json(needs.as_json(chosen, rows))
    else:
        print(printable("\n".join(needs.lines(chosen, rows))))
    if needs.missing_of(rows):
        raise typer.Exit(1)


app.command()(train)
app.command()(bench)


@app.command()
def notebooks(
    action: Literal["store", "verify"],
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Beginnings of notebook names, e.g. 20; by default all."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="store: take the executed copies of this run, e.g. runs/default, in place of"
            " executing again."
        ),
    ] = None,
) -> None:
    """Write notebooks in their stored form, or verify it."""
    from nbhelpers.runs import stored_notebooks

    if run is not None and action == "verify":
        raise UserError("verify reads no run; leave --run out, or say store.")
    if action == "store":
        with in_runs("notebooks store"):
            stored_notebooks.store(names or (), run=run)
    if problems := stored_notebooks.verify(names or ()):
        print("\n".join(problems), file=sys.stderr)
        raise typer.Exit(1)
    print("The notebooks are in their stored form.")
    if changed := stored_notebooks.moved_on():
        print(f"The code changed since these were stored: {', '.join(changed)}.", file=sys.stderr)


@app.command(cls=SeveralValues)
def cache(
    action: Literal["show", "clear"],
    kind: Annotated[
        list[str] | None,
        typer.Option(help="To clear: images, features, sets, weights, unfinished; default all."),
    ] = None,
    days: Annotated[
        float, typer.Option(help="Clear only what was not used for so many days.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Show or clear runs/cache, which makes runs faster."""
    from nbhelpers.paths import runs_root
    from nbhelpers.runs import cache as room

    if action == "clear":
        removed = room.clear(runs_root(), kind or None, days)
        print(room.cleared(removed), file=sys.stderr if as_json else sys.stdout)
    entries = room.entries(runs_root())
    if not as_json:
        print(room.table(entries))
        return
    print_json([_described(entry) for entry in entries])


def _described(entry: Entry) -> dict[str, Any]:
    used = datetime.fromtimestamp(entry.used).isoformat(timespec="seconds")
    return {"path": str(entry.path), "kind": entry.kind, "bytes": entry.size, "last_used": used}


app.add_typer(data_commands.app, name="data")
app.add_typer(system_commands.app)
app.add_typer(weight_commands.app, name="weights")
app.add_typer(record_commands.app, name="records")
