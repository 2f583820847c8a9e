"""Get the files of a published set from a mirror on the Hugging Face hub, or from its own host.

Nothing is redistributed: the files go from their host to the user's machine. Licence and size are
shown before. The mirrors were made by others and not tried against the real hub.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
from tqdm import tqdm

from nbhelpers.data import catalog
from nbhelpers.errors import UserError, reason

MIRRORS = {"rsicd": "arampacha/rsicd"}  # set -> dataset repository of the hub
PART = ".part"  # ending of a file that is not whole yet


@dataclass(frozen=True)
class Offer:
    """What can be fetched: the set, where its files lie, their bytes (None: not said), licences."""

    key: str
    source: str
    files: dict[str, int | None]
    licences: list[str]

    @property
    def size(self) -> int:
        """Return the sum of all sizes that are known, in bytes."""
        return sum(size or 0 for size in self.files.values())

    def lines(self) -> list[str]:
        """Return what a user must know before: source, size, licences."""
        unknown = sum(size is None for size in self.files.values())
        more = f", and {unknown} of unknown size" if unknown else ""
        return [
            f"source: {self.source}",
            f"files: {len(self.files)}, {self.size / 1e6:.1f} MB{more}",
            *self.licences,
        ]


def offer(key: str, mirror: str = "", urls: tuple[str, ...] = ()) -> Offer:
    """Ask a mirror or hosts what they have of a set; nothing is fetched.

    mirror  dataset repository of the hub, OWNER/NAME; "": that of MIRRORS
    urls    addresses of files in the place of a mirror
    UserError for a set without a known mirror, and what cannot be reached.
    """
    key = key.lower()
    licences = _licences(key)
    if urls:
        sizes = {url: _size(url) for url in urls}
        return Offer(
            key, ", ".join(sorted({str(urlsplit(u).netloc) for u in urls})), sizes, licences
        )
    repository = mirror or MIRRORS.get(key, "")
    if not repository:
        raise UserError(_no_mirror(key))
    from huggingface_hub import HfApi

    with _in_one_sentence(repository):
        about = HfApi().dataset_info(repository, files_metadata=True)
    sizes = {file.rfilename: file.size for file in about.siblings or []}
    card = getattr(about.card_data, "license", None) or "none stated"
    licences.append(f"licence that the mirror states: {card}")
    return Offer(key, f"the dataset {repository} of the hub", sizes, licences)


def fetch(
    key: str, out: Path | str, found: Offer, mirror: str = "", urls: tuple[str, ...] = ()
) -> Path:
    """Fetch what `offer` found into `out`/`key`; return that folder.

    A fetch that was interrupted goes on where it stopped. UserError on a full disk, and if a host
    cannot be reached.
    """
    folder = Path(out).expanduser() / key.lower()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if found.size > free:
        raise UserError(
            f"The files have {found.size / 1e9:.1f} GB, and {folder} has room for"
            f" {free / 1e9:.1f} GB; free some space, or choose another folder."
        )
    if urls:
        for url in urls:
            _download(url, folder)
        return folder
    repository = mirror or MIRRORS[key.lower()]
    from huggingface_hub import snapshot_download

    with _in_one_sentence(repository):
        snapshot_download(repository, repo_type="dataset", local_dir=folder)
    return folder


def _licences(key: str) -> list[str]:
    known = catalog.KNOWN.get(key)
    if known is None:
        return ["licence: unknown to this project; read that of the source"]
    return [
        f"{known.title}: captions from {known.captions_source}, images from {known.images_source}",
        f"licence of the captions: {known.captions_licence}",
        f"licence of the images: {known.images_licence}",
    ]


def _no_mirror(key: str) -> str:
    known = catalog.KNOWN.get(key)
    where = f"known sets are {', '.join(catalog.KNOWN)}"
    if known:
        where = f"its captions are at {known.captions_source}, its images at {known.images_source}"
    return (
        f"No mirror of '{key}' is known; {where}. Name a mirror by --mirror OWNER/NAME, or files"
        " by --url."
    )


@contextmanager
def _in_one_sentence(place: str) -> Iterator[None]:
    """Turn what goes wrong at the hub or a host into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # offline, refused, gone, cut off: the clients have no common error
        raise UserError(
            f"{place} cannot be fetched ({type(error).__name__}: {reason(error)}); check the name"
            " and the connection, and run the command again: it goes on where it stopped."
        ) from error


def _size(url: str) -> int | None:
    """Return the bytes of an address; None if its host does not say. UserError without one."""
    if urlsplit(url).scheme not in ("http", "https") or not _name_of(url):
        raise UserError(f"{url} is no address of a file; write https://HOST/FILE.")
    with _in_one_sentence(url):
        found = httpx.head(url, follow_redirects=True, timeout=30)
        found.raise_for_status()
    length = found.headers.get("content-length", "")
    return int(length) if length.isdigit() else None


def _name_of(url: str) -> str:
    """Return the plain file name of an address; "" if it has none."""
    name = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    return name if re.fullmatch(r"[\w][\w .()+-]*", name) else ""


def _download(url: str, folder: Path) -> None:
    """Fetch one file; what is there of it already is kept."""
    target = folder / _name_of(url)
    part = target.with_name(target.name + PART)
    if target.exists():
        return
    have = part.stat().st_size if part.exists() else 0
    ask = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with (
        _in_one_sentence(url),
        httpx.stream("GET", url, headers=ask, follow_redirects=True) as answer,
    ):
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.replace(target)
            return
        answer.raise_for_status()
        goes_on = answer.status_code == httpx.codes.PARTIAL_CONTENT
        bar = tqdm(desc=target.name, unit="B", unit_scale=True, disable=None)
        with bar, part.open("ab" if goes_on else "wb") as file:
            for chunk in answer.iter_raw():
                file.write(chunk)
                bar.update(len(chunk))
    part.replace(target)
