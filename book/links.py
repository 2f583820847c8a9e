"""Links between pages of the book, to files of the repository, and the check of the built pages.

python -m book.links build/book      # lists links of the built book that lead nowhere
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
CODE = re.compile(r"(^ *(?P<fence>```+|~~~+).*?^ *(?P=fence)[ `~]*$|`+[^`\n]+`+)", re.M | re.S)
GIVEN = re.compile(r"(data/results|figures)/.*\.(json|csv|tex|png)")  # the reader can download them


class Resolver:
    """Change the links of a page to what the book has.

    root        the repository
    pages       path of a page in the repository -> its path among the sources of the book
    anchors     path of a source file or folder -> the label of its place in the book
    repository  address of the repository on the web, or ""
    files       filled with the paths of the files that pages show or give to download
    """

    def __init__(
        self, root: Path, pages: dict[str, str], anchors: dict[str, str], repository: str = ""
    ):
        self.root, self.pages, self.anchors = root, pages, anchors
        self.repository = repository.rstrip("/")
        self.files: set[str] = set()

    def text(self, markdown: str, page: str) -> str:
        """Return the Markdown of a page with its links changed; code stays as it is."""
        return outside_code(markdown, lambda part: LINK.sub(lambda m: self._link(m, page), part))

    def _link(self, found: re.Match, page: str) -> str:
        text = LINK.sub(lambda inner: self._link(inner, page), found["text"])
        if found["image"]:
            return f"![{text}]({self._file(found['target'], page)})"
        target = self.target(found["target"], page)
        return f"[{text}]({target})" if target else text

    def target(self, target: str, page: str) -> str:
        """Return where a link of a page leads in the book; "" if nowhere.

        Raises ValueError for a file that the repository does not have.
        """
        if urlsplit(target).scheme or target.startswith("#"):
            return target
        path, mark, fragment = target.partition("#")
        place = _joined(page, path)
        for known in (place, posixpath.join(place, "README.md")):
            if known in self.pages:
                # a notebook's heading has an anchor in lower case here
                return self._from(page, self.pages[known]) + mark + fragment.lower()
        if place in self.anchors:
            return f"#{self.anchors[place]}"
        if GIVEN.fullmatch(place):
            return self._file(target, page)
        if not (self.root / place).exists():
            raise ValueError(f"{page} links to {target}, which the repository does not have.")
        if self.repository:
            kind = "tree" if (self.root / place).is_dir() else "blob"
            return f"{self.repository}/{kind}/main/{place}{mark}{fragment}"
        return ""

    def _file(self, target: str, page: str) -> str:
        """Keep a file that a page shows or gives; return its relative path."""
        if urlsplit(target).scheme:
            return target
        place = _joined(page, target)
        if not (self.root / place).is_file():
            raise ValueError(f"{page} shows {target}, which the repository does not have.")
        self.files.add(place)
        return self._from(page, place)

    def _from(self, page: str, place: str) -> str:
        return posixpath.relpath(place, PurePosixPath(self.pages[page]).parent)


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Return a text with a change made everywhere but in code spans and fenced code.

    A code span within the text of a link stays, and the link is changed all the same.
    """
    kept: list[str] = []

    def hide(found: re.Match) -> str:
        kept.append(found[0])
        return f"\0{len(kept) - 1}\0"

    changed = change(CODE.sub(hide, markdown))
    return re.sub(r"\0(\d+)\0", lambda found: kept[int(found[1])], changed)


def _joined(page: str, target: str) -> str:
    """Return the path below the root to which a page's relative target leads."""
    return posixpath.normpath(posixpath.join(PurePosixPath(page).parent, unquote(target)))


class _Page(HTMLParser):
    """What a built page names (ids) and where it leads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.targets: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect ids, and the targets of links, pictures, scripts and styles."""
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.ids.add(value or "")
            elif name in {"href", "src"} and value:
                self.targets.add(value)


def dead(folder: Path) -> list[str]:
    """Return one sentence for each link within the built pages that leads nowhere."""
    folder = folder.resolve()
    pages = {
        path: _Page(path.read_text("utf-8"))
        for path in sorted(folder.rglob("*.html"))
        if "_static" not in path.relative_to(folder).parts  # templates of the theme
    }
    found = []
    for path, page in pages.items():
        problems = {target: _problem(target, path, pages) for target in sorted(page.targets)}
        name = path.relative_to(folder)
        found += [f"{name}: {target} {problem}" for target, problem in problems.items() if problem]
    return found


def _problem(target: str, path: Path, pages: dict[Path, _Page]) -> str:
    """Say why a target on a page leads nowhere; "" if it leads to a place, or out of the book."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return ""
    place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    place = place / "index.html" if place.is_dir() else place
    if not place.is_file():
        return "leads to no file"
    found = not parts.fragment or place not in pages or unquote(parts.fragment) in pages[place].ids
    return "" if found else "leads to no place on its page"


def main() -> None:
    """Print the dead links of a built book; exit with 1 if there is one."""
    folder = Path(sys.argv[1])
    found = dead(folder)
    print("\n".join(found) or f"No dead link within {folder}.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
