"""`python -m nbhelpers records`: what can be done with result records from the command line."""

from __future__ import annotations

import argparse

from nbhelpers.errors import UserError
from nbhelpers.paths import repository_root
from nbhelpers.results import exports, leaderboard, pages, records


def main(argv: list[str] | None = None) -> int:
    """Looks at result records, checks, merges and tables them."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers records", description=main.__doc__)
    commands = parser.add_subparsers(
        required=True, metavar="show|check|table|export|merge|readme", dest="command"
    )
    parsers = {
        name: commands.add_parser(name, help=said, description=said)
        for name, said in {
            "show": "what each record says",
            "check": "whether they and their ranks are whole; 1 if one is at fault",
            "table": "the leaderboard",
            "export": (
                "the leaderboard as Markdown, LaTeX and CSV, and a card for each paper, as files"
            ),
            "merge": "copies records of several machines, with their ranks, into one new folder",
            "readme": "renews the tables of records in README.md",
        }.items()
    }
    for name, command in parsers.items():
        if name != "readme":
            command.add_argument(
                "folder", nargs="+", help="e.g. runs/default/records or data/results"
            )
    parsers["table"].add_argument("--format", choices=("text", "markdown", "latex"), default="text")
    for name in ("export", "merge"):
        parsers[name].add_argument("--out", required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    return COMMANDS[arguments.command](arguments) or 0


def _show(arguments: argparse.Namespace) -> None:
    print("\n\n".join(map(_shown, exports.read(arguments.folder))))


def _table(arguments: argparse.Namespace) -> None:
    found = exports.read(arguments.folder)
    if arguments.format == "text":
        print(leaderboard.table(found), end="")
    else:
        print(
            (exports.markdown if arguments.format == "markdown" else exports.latex)(
                leaderboard.boards(found)
            ),
            end="",
        )


def _export(arguments: argparse.Namespace) -> None:
    print("\n".join(map(str, pages.write(arguments.folder, arguments.out))))


def _merge(arguments: argparse.Namespace) -> None:
    print(f"{records.merge(arguments.folder, arguments.out)} records lie in {arguments.out}.")


def _readme(_: argparse.Namespace) -> None:
    path = repository_root() / "README.md"
    print(f"{path.name} {'was renewed' if pages.readme(path) else 'is current'}.")


def _check(arguments: argparse.Namespace) -> int:
    problems, found = [], records.paths(arguments.folder)
    for path in found:
        try:
            records.read_checked(path)
        except UserError as error:
            problems.append(str(error))
    print("\n".join([*problems, f"{len(found)} records, {len(problems)} with a problem."]))
    return 1 if problems else 0


COMMANDS = {
    "show": _show,
    "check": _check,
    "table": _table,
    "export": _export,
    "merge": _merge,
    "readme": _readme,
}


def _shown(record: dict) -> str:
    git, protocol = record["git"], record["protocol"]
    lines = [
        f"{records.file_stem(record)}: {record['system']} {record['variant']}".rstrip(),
        f"profile {record['profile']}, set {record['set']}, data {record['data_fingerprint'][:12]}",
        f"{protocol['split']} split, selected on {protocol['selected_on']}",
    ]
    if "parameters" in record:
        lines.append("{all:,} parameters, {trainable:,} trainable".format(**record["parameters"]))
    took = f"{record['seconds']:.0f} s " if "seconds" in record else ""
    lines += [
        f"{took}on {record['device']}",
        (
            "revision"
            f" {(git['revision'] or 'unknown')[:12]}{' with local changes' if git['dirty'] else ''}"
        ),
    ]
    lines += [
        f"weights {w['name']} ({w['kind']}): {w['source']} {w['sha256'][:12]}".rstrip()
        for w in record["weights"]
    ]
    if records.kind_of(record) == "captions":
        named = {
            f"captions of {protocol['images']} images, x 100": {
                k: 100 * v for k, v in record["metrics"].items()
            }
        }
    else:
        named = {f"ties by {ties} rule": numbers for ties, numbers in record["metrics"].items()}
        named |= {bound: record[bound] for bound in ("ceiling", "chance")}
    for name, numbers in named.items():
        lines.append(
            f"{name}: " + (", ".join(f"{key} {value:.2f}" for key, value in numbers.items()) or "-")
        )
    return "\n  ".join(lines + [record["notes"]] * bool(record["notes"]))
