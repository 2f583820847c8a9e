"""`python -m nbhelpers`: what is not a notebook."""
from __future__ import annotations

import argparse
import os
import sys

from nbhelpers.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs one command: 0 on success, 1 and a sentence on stderr if not, 2 for a wrong command line."""
    parser = _parser()
    arguments, arguments.rest = parser.parse_known_args(argv)
    if arguments.rest and arguments.command is not _records:
        parser.error(f"unrecognized arguments: {' '.join(arguments.rest)}")
    try:
        return arguments.command(arguments) or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nbhelpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    data = commands.add_parser("data", help="look at a data set, or decode it").add_subparsers(
        required=True, metavar="check|prepare")
    check = data.add_parser("check", help="what captions and images hold, and what is wrong with them")
    check.add_argument("--captions", required=True, help="file, or folder of a layout of several files")
    check.add_argument("--images", help="folder, zip or tar of the images; left away, they are not looked at")
    check.add_argument("--layout", help="karpathy, precomp, rows, lavis or nwpu; recognised if left away")
    check.set_defaults(command=_check)
    prepare = data.add_parser("prepare", help="decode the images of a set once, into the cache")
    prepare.add_argument("--set", default="scenes", help="ucm, rsicd, ...; scenes (default) is generated")
    prepare.add_argument("--data", default="", help="folder that holds the set; none for scenes")
    prepare.set_defaults(command=_prepare)

    run = commands.add_parser("run", help="run the notebooks in order, headlessly")
    run.add_argument("--profile", default="default", help="a file of notebooks/profiles, without .yaml")
    run.add_argument("--data", default="", help="folder that holds the data sets")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--upto", default="", help="stop after the notebook that starts so, e.g. 20")
    run.set_defaults(command=_run)

    notebooks = commands.add_parser("notebooks", help="make or verify the stored form of the notebooks")
    notebooks.add_argument("action", choices=("store", "verify"))
    notebooks.add_argument("names", nargs="*", help="beginnings of notebook names; all if left away")
    notebooks.set_defaults(command=_notebooks)

    records = commands.add_parser("records", help="read result records", add_help=False)
    records.set_defaults(command=_records)
    return parser


def _check(arguments: argparse.Namespace) -> int:
    from nbhelpers.data.check import check
    report = check(arguments.captions, arguments.images, arguments.layout)
    for line in report.lines:
        print(line)
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


def _prepare(arguments: argparse.Namespace) -> None:
    from nbhelpers.data.catalog import open_dataset
    dataset = open_dataset(arguments.set, arguments.data)
    print("\n".join(dataset.where))
    print(dataset.table.counts().to_string())
    print(f"The decoded images lie in {dataset.pixels.folder}.")


def _run(arguments: argparse.Namespace) -> int:
    from nbhelpers import batch
    return batch.main(arguments)


def _notebooks(arguments: argparse.Namespace) -> int:
    from nbhelpers import batch
    return batch.notebooks_main(arguments)


def _records(arguments: argparse.Namespace) -> int:
    from nbhelpers import records
    return records.main(arguments.rest)


if __name__ == "__main__":
    sys.exit(main())
