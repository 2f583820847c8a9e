"""Result records: one JSON per run with its ranks beside it; written, read, checked and merged.

leaderboard.py makes the tables.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import numpy as np

from nbhelpers.data.table import SPLITS
from nbhelpers.errors import UserError
from nbhelpers.files import atomic_folder, atomic_write, given, read_json
from nbhelpers.metrics.caption_scores import METRICS as CAPTION_METRICS
from nbhelpers.metrics.protocols import PROTOCOLS
from nbhelpers.metrics.recall import QUERY_ARRAYS, TIES, Recall

VERSION = 1
PACKAGES = (
    "nbhelpers",
    "numpy",
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "accelerate",
    "pycocoevalcap",
)

_TEXT = {"type": "string", "minLength": 1}
_NAME = {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"}
_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_COUNT = {"type": "integer", "minimum": 0}
_RULE = {"enum": list(TIES)}
_RECALL = {"type": "number", "minimum": 0, "maximum": 100}
_NUMBERS = {
    "type": "object",
    "patternProperties": {r"^(mR|.*_R@\d+)$": _RECALL},
    "additionalProperties": {"type": "number", "minimum": 0},
}


def _fields(required: dict, **optional: dict) -> dict:
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


_SHARED = {
    "schema": {"const": VERSION},
    "notebook": _NAME,
    "system": _TEXT,
    "variant": {"type": "string", "pattern": r"^[A-Za-z0-9_.+-]*$"},
    "profile": _NAME,
    "set": _NAME,
    "data_fingerprint": _SHA256,
    "config": {"type": "object"},
    "config_sha256": _SHA256,
    "weights": {
        "type": "array",
        "items": _fields(
            {
                "name": _TEXT,
                "source": _TEXT,
                "sha256": {"type": "string", "pattern": "^([0-9a-f]{64})?$"},
                "kind": {"enum": ["package", "hub", "file", "stand-in", "random"]},
            }
        ),
    },
    "seed": _COUNT,
    "git": _fields(
        {"revision": {"type": ["string", "null"]}, "dirty": {"type": ["boolean", "null"]}}
    ),
    "versions": {"type": "object", "additionalProperties": _TEXT},
    "device": _TEXT,
    "intervals": {
        "type": "object",
        "additionalProperties": {
            "type": "array",
            "items": {"type": "number"},
            "minItems": 2,
            "maxItems": 2,
        },
    },
    "notes": {"type": "string"},
}
_SETTINGS = {"type": "object"}
_SECONDS = {"seconds": {"type": "number", "minimum": 0}}
_COST = _SECONDS | {"parameters": _fields({"all": _COUNT, "trainable": _COUNT})}
SCHEMA = _fields(
    _SHARED
    | _SECONDS
    | {
        "protocol": _fields(
            {"split": {"enum": list(SPLITS)}, "ties": _RULE, "selected_on": _TEXT},
            name={"enum": list(PROTOCOLS)},
        ),
        "metrics": {
            "type": "object",
            "propertyNames": _RULE,
            "minProperties": 1,
            "additionalProperties": _NUMBERS,
        },
        "ceiling": _NUMBERS,
        "chance": _NUMBERS,
    },
    class_only=_NUMBERS,  # where classes are known
    parameters=_COST["parameters"],  # unknown where only outputs were given
    ranks=_fields({"file": _TEXT, "sha256": _SHA256}),
    checkpoint=_TEXT,
    settings=_SETTINGS,
)
CAPTION_SCHEMA = _fields(
    _SHARED
    | {
        "kind": {"const": "captions"},
        "protocol": _fields(
            {
                "split": {"enum": list(SPLITS)},
                "images": {"type": "integer", "minimum": 1},
                "tokenizer": {"enum": ["PTB", "rules"]},
                "selected_on": _TEXT,
            }
        ),
        "metrics": {
            "type": "object",
            "propertyNames": {"enum": list(CAPTION_METRICS)},
            "minProperties": 1,
            "additionalProperties": {"type": "number", "minimum": 0},
        },
    },
    **_COST,
    settings=_SETTINGS,
)


# writing
def new(config, **fields) -> dict:
    """Return a record with what every run shares filled in: schema, git state, versions, hash.

    config  dict or dataclass of plain values
    fields  needed: notebook, system, profile, set, data_fingerprint, seed, protocol and metrics;
            optional: variant, device, weights [{name, source, sha256, kind}], intervals, notes,
            settings (`Run.settings`)

    A retrieval record also needs seconds, and parameters {all, trainable} if they are known. Its
    protocol is {split, ties, selected_on} and, where one was named, name, a protocol of
    `metrics.protocols`; its metrics are {tie rule: numbers}, and its intervals are by the rule in
    the protocol. It may have ceiling, chance, class_only (`audit.class_only`) and checkpoint (the
    model's file below the profile's folder of runs).

    A record of generated captions has kind="captions". Its protocol is {split, images, tokenizer,
    selected_on}; its metrics and intervals are {pycocoevalcap's name: fraction}. It may have
    seconds and parameters.
    """
    config = dict(config) if isinstance(config, Mapping) else asdict(config)
    shared = {
        "schema": VERSION,
        "config": config,
        "config_sha256": config_sha256(config),
        "git": _git_state(),
        "versions": _versions(),
        "device": f"cpu ({platform.machine()})",
        "variant": "",
        "weights": [],
        "intervals": {},
        "notes": "",
    }
    if kind_of(fields) == "retrieval":
        shared |= {"ceiling": {}, "chance": {}}
    return shared | fields


def write(folder: Path | str, record: dict, ranks: Mapping[str, np.ndarray] | None = None) -> Path:
    """Write `<notebook>-seed<seed>[-<variant>].json`, with its ranks as `.npz`; return its path.

    ranks  of a retrieval record: `Recall.arrays()` under the rule in `protocol`, and `owner` (M,)

    The ranks are replaced before the record, which names their hash. UserError, and nothing
    written, if the record does not fit the schema or its ranks give other metrics.
    """
    record = _plain({key: value for key, value in record.items() if key != "ranks"})
    _validate(record, "The record")
    if kind_of(record) == "retrieval":
        _agree(record, ranks or {}, "The record")
    path = Path(folder) / f"{file_stem(record)}.json"
    _keep_others(path, record)
    with ExitStack() as stack:
        text = stack.enter_context(atomic_write(path))  # entered first, so replaced last
        if ranks is not None:
            beside = path.with_suffix(".npz")
            arrays = stack.enter_context(atomic_write(beside))
            with open(arrays, "wb") as file:
                np.savez_compressed(file, **dict(ranks))  # type: ignore[arg-type] # no array is named so
            record["ranks"] = {"file": beside.name, "sha256": _sha256(arrays)}
        text.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def safe_name(name: str) -> str:
    """Return a name that a record's fields and a file may have."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", name).lstrip("_.+-") or "unnamed"


def file_stem(record: dict) -> str:
    """Return the name of a record's file, without suffix."""
    stem = f"{record['notebook']}-seed{record['seed']}"
    return f"{stem}-{record['variant']}" if record["variant"] else stem


def config_sha256(config: dict) -> str:
    """Hash of the configuration, independent of the order of its keys."""
    text = json.dumps(_plain(config, "config"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# reading
class Record(dict):
    """A record as it was read. `path` is its file, which is no part of it."""

    path: Path


def paths(where: Path | str | Iterable[Path | str]) -> list[Path]:
    """The record files in a folder, however deep, or in a list of folders and files."""
    places = [where] if isinstance(where, (str, Path)) else list(where)
    found = []
    for place in map(given, places):
        if not place.exists():
            raise UserError(
                f"{place} does not exist; a run writes its records to runs/<profile>/records."
            )
        found += sorted(place.rglob("*-seed*.json")) if place.is_dir() else [place]
    if not found:
        raise UserError(
            f"There is no record in {', '.join(map(str, places))}; run a notebook first."
        )
    return found


def read(where: Path | str | Iterable[Path | str], kind: str = "retrieval") -> list[Record]:
    """Read the records of a kind ("retrieval" or "captions").

    `where` is a folder, or a list of folders and files. UserError on a record that does not fit.
    """
    return [record for record in map(read_one, paths(where)) if kind_of(record) == kind]


def read_one(path: Path | str) -> Record:
    """The record in the file `path`, of either kind. UserError if it is none or does not fit."""
    path = Path(path)
    record = read_json(path, "delete it and run its notebook again")
    _validate(record, str(path))
    record = Record(record)
    record.path = path
    return record


def protocol_of(record: dict) -> str:
    """Return the protocol of a retrieval record that cannot share a table with others, or "".

    Tie rules have columns of their own, so they may.
    """
    name = record["protocol"].get("name", "")
    return "" if name in TIES else name


def kind_of(record: dict) -> str:
    """Return "retrieval" or "captions"."""
    return record.get("kind", "retrieval")


def read_checked(path: Path | str) -> Record:
    """The record in the file `path`.

    UserError also where its ranks are not as `read_recall` wants them.
    """
    record = read_one(path)
    if kind_of(record) == "retrieval":
        read_recall(path)
    return record


def read_recall(path: Path | str) -> tuple[Recall, np.ndarray]:
    """Return (recall, owner) of the record file at `path`, for intervals and paired tests.

    UserError if the ranks are missing, or are not those that the record was written with.
    """
    path = Path(path)
    record, ranks = read_one(path), path.with_suffix(".npz")
    if not ranks.is_file():
        raise UserError(
            f"{path} lacks its ranks {ranks.name}; copy them too, or run the notebook again."
        )
    if _sha256(ranks) != record.get("ranks", {}).get("sha256"):
        raise UserError(f"{ranks} does not hold the ranks of {path.name}; run the notebook again.")
    with np.load(ranks, allow_pickle=False) as file:
        arrays = dict(file)
    _agree(record, arrays, str(path))
    return Recall.from_arrays(record["protocol"]["ties"], arrays), arrays["owner"]


# merging
def merge(folders: Iterable[Path | str], out: Path | str) -> int:
    """Copy records and their ranks into the new folder `out`; return their number.

    The folder is written whole or not at all.

    A record keeps its place below its folder. It may lie in several folders if it is the same in
    all. UserError if two records tell differently of one run, if two runs would share a file, or if
    ranks are missing or are not the record's.
    """
    out = Path(out)
    runs: dict[tuple, Record] = {}
    places: dict[Path, Record] = {}
    if out.exists():
        raise UserError(
            f"{out} exists already; name a new folder, and the old one among those to merge."
        )
    for folder in map(Path, folders):
        for path in paths(folder):
            record = read_checked(path)
            if _known(record, runs):
                continue
            place = path.relative_to(folder) if folder.is_dir() else Path(path.name)
            if place in places:
                raise UserError(
                    f"{places[place].path} and {path} are of different runs and would share"
                    f" {out / place}; merge them into folders of their own."
                )
            places[place] = record
    with atomic_folder(out) as whole:
        for place, record in places.items():
            target = whole / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(record.path, target)
            if "ranks" in record:
                shutil.copyfile(record.path.with_suffix(".npz"), target.with_suffix(".npz"))
    return len(places)


def _known(record: Record, runs: dict[tuple, Record]) -> bool:
    """Whether this very record was met before; UserError if another one of the same run was."""
    names = ("profile", "set", "data_fingerprint", "notebook", "system", "variant", "seed")
    run = (kind_of(record), record["protocol"]["split"], *(record[name] for name in names))
    first = runs.setdefault(run, record)
    if first != record:
        fields = [name for name in {**first, **record} if first.get(name) != record.get(name)]
        raise UserError(
            f"{first.path} and {record.path} are of one run, but differ in {', '.join(fields)}; "
            "leave out the one that does not count."
        )
    return first is not record


# what a record must be
def _validate(record: dict, where: str) -> None:
    from jsonschema import Draft202012Validator  # slow to import
    from jsonschema.exceptions import best_match

    version = record.get("schema") if isinstance(record, dict) else None
    if version != VERSION:
        raise UserError(
            f"{where} has schema {version}; this version of nbhelpers knows schema {VERSION}."
        )
    schema = CAPTION_SCHEMA if kind_of(record) == "captions" else SCHEMA
    if error := best_match(Draft202012Validator(schema).iter_errors(record)):
        field = "".join(
            f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path
        ).lstrip(".")
        raise UserError(
            f"{where} does not fit the schema{f' at {field}' if field else ''}: {error.message}."
        )
    problems = {
        "config_sha256 is not the hash of config": (
            config_sha256(record["config"]) != record["config_sha256"]
        ),
        "more parameters are trainable than there are": (
            "parameters" in record
            and record["parameters"]["trainable"] > record["parameters"]["all"]
        ),
        "its metrics lack the tie rule of its protocol": (
            schema is SCHEMA and record["protocol"]["ties"] not in record["metrics"]
        ),
        "an interval's low end lies above its high end": any(
            low > high for low, high in record["intervals"].values()
        ),
    }
    for problem, present in problems.items():
        if present:
            raise UserError(f"{where} contradicts itself: {problem}.")


def _agree(record: dict, ranks: Mapping[str, np.ndarray], where: str) -> None:
    """UserError unless the ranks give the metrics that the record states."""
    missing = [name for name in ("ks", "owner", *QUERY_ARRAYS) if name not in ranks]
    if missing:
        raise UserError(
            f"The ranks of {where[0].lower() + where[1:]} lack {', '.join(missing)}; "
            "give Recall.arrays() and owner."
        )
    ties = record["protocol"]["ties"]
    for key, value in Recall.from_arrays(ties, ranks).metrics.items():
        stated = record["metrics"][ties].get(key)
        if stated is None or not math.isclose(stated, value, abs_tol=1e-6):
            raise UserError(
                f"{where} states {key} {stated} by the {ties} rule, but its ranks give {value}."
            )


def _keep_others(path: Path, record: dict) -> None:
    """A record replaces only an older one of the same system, profile and set."""
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text("utf-8"))
        others = [name for name in ("system", "profile", "set") if before[name] != record[name]]
    except (ValueError, TypeError, KeyError):
        return
    if others:
        raise UserError(
            f"{path} holds a record of {others[0]} '{before[others[0]]}', and this one is of "
            f"'{record[others[0]]}'; give it another variant or folder."
        )


def _plain(value, where: str = "record"):
    """`value` in JSON's types. UserError that names the place of what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}; a record holds finite numbers only.")
    if value is not None and not isinstance(value, (str, int, float)):
        raise UserError(
            f"{where} is a {type(value).__name__}; a record holds plain numbers and text only."
        )
    return value


def _git_state() -> dict:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {"revision": None, "dirty": None}
    revision, _, dirty = done.stdout.strip().partition("-")
    return {"revision": revision, "dirty": bool(dirty)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
