"""Collect the sources of the book in one folder, from which Sphinx makes the pages.

    python -m book.sources build/book-sources

The notebooks, READMEs and records of the repository are read; nothing is executed. Each page lies
at its path in the repository, so relative links between pages stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

from book import api, notebook_pages
from book.links import Resolver

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "data/README.md",
    "data/sample/README.md",
)
RECORDS = re.compile(r"<!-- records: (\S+) -->\n.*?<!-- end of records -->", re.S)
TABLE = re.compile(r"(?:^\|.*\n)+", re.M)
# Of the default profile; BOOK_FIGURES names another folder, such as runs/default/figures.
FIGURES = ROOT / os.environ.get("BOOK_FIGURES", "figures/default")


def version() -> str:
    """Return the version of the package."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def pages(root: Path = ROOT) -> dict[str, str]:
    """Path of each page in the repository -> its path among the sources.

    Pages that are made rather than read have one path, and may not exist in the repository.
    """
    found = [*DOCUMENTS, *_below(root, "nbhelpers", "README.md"), "notebooks/README.md"]
    found += [path.relative_to(root).as_posix() for path in sorted(root.glob("notebooks/*.ipynb"))]
    found += _below(root, "data/results", "*.md")
    found += [f"{folder}/leaderboard.md" for folder in result_folders(root)]
    found += [f"api/{room}.md" for room in api.rooms(root / "nbhelpers")]
    own = {f"book/{path.name}": path.name for path in sorted((root / "book").glob("*.md"))}
    return {path: path for path in found} | own


def _below(root: Path, folder: str, name: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in sorted((root / folder).rglob(name))]


def result_folders(root: Path = ROOT) -> list[str]:
    """Return the folders below data/results that hold records, one for each run of a set."""
    folders = sorted(path for path in (root / "data/results").iterdir() if path.is_dir())
    return [path.relative_to(root).as_posix() for path in folders if any(path.glob("*.json"))]


def write(out: Path, root: Path = ROOT, repository: str = "") -> list[str]:
    """Write the sources anew into an empty or former folder `out`; return their paths."""
    shutil.rmtree(out, ignore_errors=True)
    known = pages(root)
    resolver = Resolver(root, known, api.anchors(root / "nbhelpers"), repository)
    for place, text in _texts(root, resolver):
        path = out / known[place]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    for place in sorted(resolver.files):
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / place, out / place)
    return list(known.values())


def _texts(root: Path, resolver: Resolver) -> Iterator[tuple[str, str]]:
    """Yield each page with its text."""
    package = root / "nbhelpers"
    modules = api.rooms(package)
    for place in resolver.pages:
        path = root / place
        if place.startswith("api/"):
            room = path.stem
            yield place, api.page(room, modules[room], package)
        elif path.name == "leaderboard.md":
            yield place, resolver.text(leaderboard(path.parent), place)
        elif path.suffix == ".ipynb":
            yield place, notebook_pages.page(path, root, resolver, FIGURES / path.stem)
        else:
            text = RECORDS.sub(_link_to_records, _filled(path.read_text("utf-8"), root))
            yield place, resolver.text(text, place)


def _link_to_records(found: re.Match) -> str:
    return f"The tables stand on a page of their own: [leaderboard]({found[1]}/leaderboard.md)."


def _filled(text: str, root: Path) -> str:
    """Return a page of the book with what stands for `<!-- insert: NAME -->`."""
    inserts: dict[str, Callable[[Path], str]] = {
        "glossary": glossary,
        "sets": _table_of_sets,
        "rooms": _table_of_rooms,
    }
    return re.sub(r"<!-- insert: (\w+) -->", lambda found: inserts[found[1]](root), text)


def glossary(root: Path = ROOT) -> str:
    """Return the table below the heading Glossary of the first notebook."""
    notebook = json.loads((root / "notebooks/00_start_here.ipynb").read_text("utf-8"))
    for cell in notebook["cells"]:
        _, _, after = "".join(cell["source"]).partition("## Glossary\n")
        if after:
            text = re.split(r"^## ", after, maxsplit=1, flags=re.M)[0].strip()
            return text.replace("](", "](../notebooks/").replace("../notebooks/../", "../")
    raise ValueError("00_start_here has no heading Glossary.")


def _table_of_sets(root: Path) -> str:
    lines = ["| folder of records | leaderboard | what the runs say |", "|---|---|---|"]
    for folder in result_folders(root):
        told = f"[README](../{folder}/README.md)" if (root / folder / "README.md").is_file() else ""
        lines.append(f"| `{folder}` | [leaderboard](../{folder}/leaderboard.md) | {told} |")
    return "\n".join(lines)


def _table_of_rooms(root: Path) -> str:
    lines = ["| room | modules |", "|---|---|"]
    for room, paths in api.rooms(root / "nbhelpers").items():
        names = ", ".join(
            f"[`{path.stem}`](../{path.relative_to(root).as_posix()})"
            for path in paths
            if path.name != "__init__.py"
        )
        lines.append(f"| [{room}](../api/{room}.md) | {names} |")
    return "\n".join(lines)


def leaderboard(folder: Path) -> str:
    """Return the page of a folder of records: its tables, made from the records, to be sorted."""
    from nbhelpers.data import catalog
    from nbhelpers.results import exports
    from nbhelpers.results import leaderboard as tables

    known = catalog.KNOWN.get(folder.name)
    text = exports.markdown(tables.boards(exports.read([folder])), folder, level=2)
    text = TABLE.sub(lambda found: f":::{{table}}\n:class: sortable\n{found[0]}:::\n", text)
    files = [path.name for path in sorted(folder.iterdir()) if path.suffix in {".csv", ".tex"}]
    others = [path for path in sorted(folder.rglob("*.md")) if path.name != "leaderboard.md"]
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in others]
    parts = [
        "---\nhtml_theme.sidebar_secondary.remove: true\n---",
        f"# Leaderboard of {known.title if known else folder.name}",
        "Click the title of a column to sort by it. The number of a seed gives its record.",
        text,
        "## Files",
        "\n".join(f"- [{name}]({name})" for name in files),
        "\n".join(["```{toctree}", ":hidden:", ":maxdepth: 1", "", *names, "```"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the sources into the folder that the command line names."""
    out = Path(sys.argv[1])
    written = write(out, repository=os.environ.get("BOOK_REPOSITORY", ""))
    print(f"{len(written)} pages in {out}")


if __name__ == "__main__":
    main()
