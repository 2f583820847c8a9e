"""Result records: one JSON per run with its ranks beside it, and the leaderboard made from nothing else."""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from nbhelpers.data.table import SPLITS
from nbhelpers.errors import UserError, atomic_write
from nbhelpers.recall import QUERY_ARRAYS, TIES, Recall

VERSION = 1
CAPTION_METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
PACKAGES = ("nbhelpers", "numpy", "torch", "torchvision", "transformers", "timm", "accelerate",
            "pycocoevalcap")

_TEXT = {"type": "string", "minLength": 1}
_NAME = {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"}
_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_COUNT = {"type": "integer", "minimum": 0}
_RULE = {"enum": list(TIES)}
_RECALL = {"type": "number", "minimum": 0, "maximum": 100}
_NUMBERS = {"type": "object", "patternProperties": {r"^(mR|.*_R@\d+)$": _RECALL},
            "additionalProperties": {"type": "number", "minimum": 0}}


def _fields(required: dict, **optional: dict) -> dict:
    return {"type": "object", "properties": required | optional, "required": list(required),
            "additionalProperties": False}


_SHARED = {
    "schema": {"const": VERSION},
    "notebook": _NAME, "system": _TEXT, "variant": {"type": "string", "pattern": r"^[A-Za-z0-9_.+-]*$"},
    "profile": _NAME, "set": _NAME, "data_fingerprint": _SHA256,
    "config": {"type": "object"}, "config_sha256": _SHA256,
    "weights": {"type": "array", "items": _fields({
        "name": _TEXT, "source": _TEXT, "sha256": {"type": "string", "pattern": "^([0-9a-f]{64})?$"},
        "kind": {"enum": ["package", "hub", "file", "stand-in", "random"]}})},
    "seed": _COUNT,
    "git": _fields({"revision": {"type": ["string", "null"]}, "dirty": {"type": ["boolean", "null"]}}),
    "versions": {"type": "object", "additionalProperties": _TEXT},
    "device": _TEXT,
    "intervals": {"type": "object", "additionalProperties": {
        "type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}},
    "notes": {"type": "string"},
}
_COST = {"seconds": {"type": "number", "minimum": 0}, "parameters": _fields({"all": _COUNT, "trainable": _COUNT})}
SCHEMA = _fields(_SHARED | _COST | {
    "protocol": _fields({"split": {"enum": list(SPLITS)}, "ties": _RULE, "selected_on": _TEXT}),
    "metrics": {"type": "object", "propertyNames": _RULE, "minProperties": 1,
                "additionalProperties": _NUMBERS},
    "ceiling": _NUMBERS, "chance": _NUMBERS,
}, ranks=_fields({"file": _TEXT, "sha256": _SHA256}))
CAPTION_SCHEMA = _fields(_SHARED | {
    "kind": {"const": "captions"},
    "protocol": _fields({"split": {"enum": list(SPLITS)}, "images": {"type": "integer", "minimum": 1},
                         "tokenizer": {"enum": ["PTB", "rules"]}, "selected_on": _TEXT}),
    "metrics": {"type": "object", "propertyNames": {"enum": list(CAPTION_METRICS)}, "minProperties": 1,
                "additionalProperties": {"type": "number", "minimum": 0}},
}, **_COST)


# writing ------------------------------------------------------------------------------------------
def new(config, **fields) -> dict:
    """A record with what every run shares filled in: schema, git state, versions, the hash of `config`.

    config  dict or dataclass of plain values
    fields  needed: notebook, system, profile, set, data_fingerprint, seed, seconds,
            parameters {all, trainable}, protocol {split, ties, selected_on}, metrics {tie rule: numbers};
            optional: variant, device, weights [{name, source, sha256, kind}], intervals (by the rule in
            protocol), ceiling, chance, notes
    """
    return {"ceiling": {}, "chance": {}} | _shared(config) | fields


def new_captions(config, **fields) -> dict:
    """As `new` for generated captions: protocol {split, images, tokenizer, selected_on}, metrics {pycocoevalcap's name:
    fraction} and intervals of the same names; seconds and parameters where they are known; no ranks, ceiling or chance."""
    return {"kind": "captions"} | _shared(config) | fields


def _shared(config) -> dict:
    config = asdict(config) if is_dataclass(config) else dict(config)
    shared = {"schema": VERSION, "config": config, "config_sha256": config_sha256(config),
              "git": _git_state(), "versions": _versions(), "device": f"cpu ({platform.machine()})"}
    return shared | {"variant": "", "weights": [], "intervals": {}, "notes": ""}


def write(folder: Path | str, record: dict, ranks: Mapping[str, np.ndarray]) -> Path:
    """Writes `<notebook>-seed<seed>[-<variant>].json` and its ranks as `.npz`; returns the JSON's path.

    ranks  `Recall.arrays()` under the rule in `protocol`, and `owner` (M,)

    UserError, and nothing written, if the record does not fit the schema or its ranks give other metrics.
    """
    record = _plain({key: value for key, value in record.items() if key != "ranks"})
    _validate(record, "The record")
    _agree(record, ranks, "The record")
    path = Path(folder) / f"{file_stem(record)}.json"
    _keep_others(path, record)
    beside = path.parent / f"{path.stem}.npz"
    with atomic_write(path) as text, atomic_write(beside) as arrays:
        with open(arrays, "wb") as file:
            np.savez_compressed(file, **ranks)
        record["ranks"] = {"file": beside.name, "sha256": hashlib.sha256(arrays.read_bytes()).hexdigest()}
        text.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return path


def write_captions(folder: Path | str, record: dict) -> Path:
    """Writes a caption record as `write` does, without ranks; returns its path."""
    record = _plain(record)
    _validate(record, "The record")
    path = Path(folder) / f"{file_stem(record)}.json"
    _keep_others(path, record)
    with atomic_write(path) as text:
        text.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return path


def file_stem(record: dict) -> str:
    stem = f"{record['notebook']}-seed{record['seed']}"
    return f"{stem}-{record['variant']}" if record["variant"] else stem


def config_sha256(config: dict) -> str:
    """Hash of the configuration, independent of the order of its keys."""
    text = json.dumps(_plain(config, "config"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# reading ------------------------------------------------------------------------------------------
def _paths(where: Path | str | Iterable[Path | str]) -> list[Path]:
    """The record files in a folder, however deep, or in a list of folders and files."""
    places = [where] if isinstance(where, (str, Path)) else list(where)
    found = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"{place} does not exist; a run writes its records to runs/<profile>/records.")
        found += sorted(place.rglob("*-seed*.json")) if place.is_dir() else [place]
    if not found:
        raise UserError(f"There is no record in {', '.join(map(str, places))}; run a notebook first.")
    return found


def read(where: Path | str | Iterable[Path | str], kind: str = "retrieval") -> list[dict]:
    """The records of a kind ("retrieval" or "captions") in a folder or in a list of folders and files; UserError on any
    record that does not fit."""
    return [record for record in map(_read_one, _paths(where)) if kind_of(record) == kind]


def kind_of(record: dict) -> str:
    return record.get("kind", "retrieval")


def read_recall(path: Path | str) -> tuple[Recall, np.ndarray]:
    """(recall, owner) of the record file at `path`, for `recall.bootstrap` and `recall.paired_test`.

    UserError if the ranks are missing, or are not those that the record was written with.
    """
    path = Path(path)
    record = _read_one(path)
    ranks = path.parent / f"{path.stem}.npz"
    if not ranks.is_file():
        raise UserError(f"{path} lacks its ranks {ranks.name}; copy them too, or run the notebook again.")
    if hashlib.sha256(ranks.read_bytes()).hexdigest() != record.get("ranks", {}).get("sha256"):
        raise UserError(f"{ranks} does not hold the ranks of {path.name}; run the notebook again.")
    with np.load(ranks, allow_pickle=False) as file:
        arrays = dict(file)
    _agree(record, arrays, str(path))
    return Recall.from_arrays(record["protocol"]["ties"], arrays), arrays["owner"]


# the leaderboard ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Claim:
    """Numbers that others published, in percent, with R@1, R@5, R@10 of each direction."""

    system: str
    set: str
    i2t: tuple[float, float, float]
    t2i: tuple[float, float, float]
    mR: float
    source: str
    caveat: str

    @property
    def metrics(self) -> dict[str, float]:
        keys = [f"{direction}_R@{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]
        return dict(zip(keys, self.i2t + self.t2i)) | {"mR": self.mR}


_PIR = "Pan et al., ACM MM 2023, table 1"
_PE = "Yuan et al., TGRS 61 (2023), tables I-III"
_RS5M = "; the same in the RS5M README (github.com/om-ai-lab/RS5M)"
_OTHERS = "training split, selection and tie rule were not checked"
_CHOSEN = "ties by sort order; chosen on the test split; an independent re-run over five seeds gives mR"
_CLIP = "CLIP ViT-B/32; by the code's history chosen on a fifth of train and val together"

CLAIMS = (  # rows of published tables; the caveat says where no second source prints the same
    Claim("AMFMN (sim)", "rsicd", (5.21, 14.72, 21.57), (4.08, 17.00, 30.60), 15.53,
          f"{_PIR}; the same in {_PE}", _OTHERS),
    Claim("GaLR", "rsicd", (6.59, 19.85, 31.04), (4.69, 19.48, 32.13), 18.96, _PIR + _RS5M, _OTHERS),
    Claim("SWAN", "rsicd", (7.41, 20.13, 30.86), (5.56, 22.26, 37.41), 20.61, _PIR + _RS5M, _OTHERS),
    Claim("VSE2 (CL)", "rsicd", (10.52, 25.07, 36.78), (6.11, 23.64, 38.28), 23.40, _PIR,
          "read in that table alone; PIR's baseline, Swin-T and BERT, in PIR's protocol"),
    Claim("PIR", "rsicd", (9.88, 27.26, 39.16), (6.97, 24.56, 38.92), 24.46, _PIR + _RS5M,
          f"trained on 7862 of the images; {_CHOSEN} 23.66 +- 0.47"),
    Claim("PE-RSITR", "rsicd", (14.13, 31.51, 44.78), (11.63, 33.92, 50.73), 31.12, _PE + _RS5M, _CLIP),
    Claim("AMFMN (sim)", "rsitmd", (10.63, 24.78, 41.81), (11.51, 34.69, 54.87), 29.72,
          f"{_PIR}; the same in {_PE}", _OTHERS),
    Claim("GaLR", "rsitmd", (14.82, 31.64, 42.48), (11.15, 36.68, 51.68), 31.41, _PIR + _RS5M, _OTHERS),
    Claim("SWAN", "rsitmd", (13.35, 32.15, 46.90), (11.24, 40.40, 60.60), 34.11, _PIR + _RS5M, _OTHERS),
    Claim("PIR", "rsitmd", (18.14, 41.15, 52.88), (12.17, 41.68, 63.41), 38.24, _PIR + _RS5M,
          f"trained on 3435 of the images; {_CHOSEN} 37.78 +- 0.81"),
    Claim("PE-RSITR", "rsitmd", (23.67, 44.07, 60.36), (20.10, 50.63, 67.97), 44.47, _PE + _RS5M, _CLIP),
    Claim("CABIR", "ucm", (15.17, 45.71, 72.85), (12.67, 54.19, 89.23), 48.30, _PE,
          f"read in that table alone; {_OTHERS}"),
    Claim("PE-RSITR", "ucm", (22.71, 55.81, 80.33), (18.82, 62.84, 93.72), 55.71, _PE,
          f"read in that table alone, another has the two directions swapped; {_CLIP}"),
)

_BLOCK = ["profile", "set", "split", "data", "ties"]
_ROW = ["system", "variant", "seed", "notebook"]


def leaderboard(records: Iterable[dict]) -> pd.DataFrame:
    """Rows (system, variant, seed, notebook); columns ((profile, set, split, data, ties), number).

    A column speaks of one profile, one split of one set of one fingerprint (`data`, shortened), one tie rule.
    Rows "chance" and, by expectation, "ceiling" stand where records know them. A set that papers report on
    has a block of profile "published". The interval of mR stands with the rule that it was computed for.
    """
    return pd.concat(_blocks(records), axis=1, sort=False, names=[*_BLOCK, "number"])


def table(records: Iterable[dict], markdown: bool = False) -> str:
    """The leaderboard to read: one table for each block, with what it may be compared with; captions at the end."""
    records, parts = list(records), []
    captions = [record for record in records if kind_of(record) == "captions"]
    retrieval = [record for record in records if kind_of(record) != "captions"]
    for (profile, name, split, data, ties), block in (_blocks(retrieval) if retrieval or not captions else {}).items():
        heading, notes = f"{name} {split} split, profile {profile}, ties by {ties} rule, data {data}", []
        if profile == "published":
            heading, block = f"{name}, as published", block.droplevel(_ROW[1:])
            notes = [f"{c.system}: {c.source}; {c.caveat}." for c in CLAIMS if c.set == name]
        elif name == "scenes":
            notes = ["The set is generated: its numbers compare with each other, never with a paper's."]
        block = _readable(block)
        parts += [f"### {heading}" if markdown else heading,
                  _markdown(block) if markdown else block.to_string(index=False)]
        parts += ["\n".join(f"- {note}" for note in notes)] * bool(notes)
    for (profile, name, split, data), block in caption_blocks(captions).items():
        heading = f"{name} {split} split, captions, scores x 100, profile {profile}, data {data}"
        parts += [f"### {heading}", _markdown(block)] if markdown else [heading, block.to_string(index=False)]
    return "\n\n".join(parts) + "\n"


def caption_blocks(records: Iterable[dict]) -> dict[tuple, pd.DataFrame]:
    """(profile, set, split, data) -> caption records that may be compared, as text: scores x 100 with their intervals."""
    blocks: dict[tuple, dict[tuple, dict]] = {}
    for record in records:
        block = (record["profile"], record["set"], record["protocol"]["split"], record["data_fingerprint"][:12])
        rows, row = blocks.setdefault(block, {}), tuple(record[name] for name in _ROW)
        _only_once(rows, row)
        ends = {name: " [{:.1f}, {:.1f}]".format(*(100 * end for end in record["intervals"][name]))
                for name in record["intervals"]}
        rows[row] = {name: f"{100 * record['metrics'][name]:.1f}{ends.get(name, '')}"
                     for name in CAPTION_METRICS if name in record["metrics"]}
        rows[row]["tokenizer"] = record["protocol"]["tokenizer"]
    return {block: pd.DataFrame(list(rows.values()), index=pd.MultiIndex.from_tuples(rows, names=_ROW)).fillna("")
            .reset_index() for block, rows in blocks.items()}


def _only_once(rows: dict, row: tuple) -> None:
    if row in rows:
        raise UserError(f"Two records tell of {' '.join(map(str, row))} in one profile; "
                        "read only one of their folders.")


def _blocks(records: Iterable[dict]) -> dict[tuple, pd.DataFrame]:
    """(profile, set, split, data, ties) -> rows of what may be compared."""
    blocks: dict[tuple, dict[tuple, dict]] = {}
    for record in records:
        for ties, numbers in record["metrics"].items():
            data, protocol = record["data_fingerprint"][:12], record["protocol"]
            block = (record["profile"], record["set"], protocol["split"], data, ties)
            rows, row = blocks.setdefault(block, {}), tuple(record[name] for name in _ROW)
            _only_once(rows, row)
            bounds = ("chance", "ceiling") if ties == "expectation" else ("chance",)
            rows |= {(bound, "", "", ""): record[bound] for bound in bounds if record[bound]}
            rows[row] = numbers | {"selected on": protocol["selected_on"]}
            if ties == protocol["ties"] and "mR" in record["intervals"]:
                rows[row] |= dict(zip(("mR low", "mR high"), record["intervals"]["mR"]))
    if not blocks:
        raise UserError("There is no record yet; run a notebook that trains or evaluates first.")
    for name in sorted({block[1] for block in blocks} & {claim.set for claim in CLAIMS}):
        claimed = {(claim.system, "", "", ""): claim.metrics for claim in CLAIMS if claim.set == name}
        blocks["published", name, "test", "", "as published"] = claimed
    return {block: pd.DataFrame(list(rows.values()), index=pd.MultiIndex.from_tuples(rows, names=_ROW))
            for block, rows in blocks.items()}


def _readable(block: pd.DataFrame) -> pd.DataFrame:
    """Recalls with two decimals, mR with its interval in one column, no medians, nothing undefined."""
    numbers = [name for name in block if re.fullmatch(r"(i2t|t2i)_R@\d+|mR", name)]
    shown = block[numbers].map(lambda value: "" if pd.isna(value) else f"{value:.2f}")
    if "mR low" in block:
        known = block["mR low"].notna()
        ends = block.loc[known, ["mR low", "mR high"]].values
        shown.loc[known, "mR"] += [f" [{low:.1f}, {high:.1f}]" for low, high in ends]
    if "selected on" in block:
        shown["selected on"] = block["selected on"].fillna("")
    return shown.rename(columns=lambda name: name.replace("_", " ")).reset_index()


def _markdown(frame: pd.DataFrame) -> str:
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


# the command line ---------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    """Shows the records in the folders named, or checks them (1 if one is at fault), or tables them."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers records", description=main.__doc__)
    parser.add_argument("command", choices=("show", "check", "table"))
    parser.add_argument("folder", nargs="+", help="e.g. runs/default/records or data/results")
    parser.add_argument("--format", choices=("text", "markdown"), default="text", help="of the table")
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        return _check(arguments.folder)
    records = [*read(arguments.folder), *read(arguments.folder, "captions")]
    if arguments.command == "table":
        print(table(records, markdown=arguments.format == "markdown"), end="")
    else:
        print("\n\n".join(map(_shown, records)))
    return 0


def _check(folders: list[str]) -> int:
    problems, found = [], _paths(folders)
    for path in found:
        try:
            if kind_of(_read_one(path)) == "retrieval":
                read_recall(path)
        except UserError as error:
            problems.append(str(error))
    print("\n".join([*problems, f"{len(found)} records, {len(problems)} with a problem."]))
    return 1 if problems else 0


def _shown(record: dict) -> str:
    git, protocol = record["git"], record["protocol"]
    lines = [f"{file_stem(record)}: {record['system']} {record['variant']}".rstrip(),
             f"profile {record['profile']}, set {record['set']}, data {record['data_fingerprint'][:12]}",
             f"{protocol['split']} split, selected on {protocol['selected_on']}"]
    if "parameters" in record:
        lines.append("{all:,} parameters, {trainable:,} trainable".format(**record["parameters"]))
    took = f"{record['seconds']:.0f} s " if "seconds" in record else ""
    lines += [f"{took}on {record['device']}",
              f"revision {(git['revision'] or 'unknown')[:12]}{' with local changes' if git['dirty'] else ''}"]
    lines += [f"weights {w['name']} ({w['kind']}): {w['source']} {w['sha256'][:12]}".rstrip()
              for w in record["weights"]]
    if kind_of(record) == "captions":
        named = {f"captions of {protocol['images']} images, x 100": {k: 100 * v for k, v in record["metrics"].items()}}
    else:
        named = {f"ties by {ties} rule": numbers for ties, numbers in record["metrics"].items()}
        named |= {bound: record[bound] for bound in ("ceiling", "chance")}
    for name, numbers in named.items():
        lines.append(f"{name}: " + (", ".join(f"{key} {value:.2f}" for key, value in numbers.items()) or "-"))
    return "\n  ".join(lines + [record["notes"]] * bool(record["notes"]))


# what a record must be ----------------------------------------------------------------------------
def _read_one(path: Path) -> dict:
    try:
        record = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); delete it and run its notebook again.") from error
    _validate(record, str(path))
    return record


def _validate(record: dict, where: str) -> None:
    version = record.get("schema") if isinstance(record, dict) else None
    if version != VERSION:
        raise UserError(f"{where} has schema {version}; this version of nbhelpers knows schema {VERSION}.")
    schema = CAPTION_SCHEMA if kind_of(record) == "captions" else SCHEMA
    if error := best_match(Draft202012Validator(schema).iter_errors(record)):
        field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path).lstrip(".")
        raise UserError(f"{where} does not fit the schema{f' at {field}' if field else ''}: {error.message}.")
    problems = {
        "config_sha256 is not the hash of config": config_sha256(record["config"]) != record["config_sha256"],
        "more parameters are trainable than there are":
            "parameters" in record and record["parameters"]["trainable"] > record["parameters"]["all"],
        "its metrics lack the tie rule of its protocol":
            schema is SCHEMA and record["protocol"]["ties"] not in record["metrics"],
        "an interval's low end lies above its high end":
            any(low > high for low, high in record["intervals"].values()),
    }
    for problem in (problem for problem, present in problems.items() if present):
        raise UserError(f"{where} contradicts itself: {problem}.")


def _agree(record: dict, ranks: Mapping[str, np.ndarray], where: str) -> None:
    """UserError unless the ranks give the metrics that the record states."""
    missing = [name for name in ("ks", "owner", *QUERY_ARRAYS) if name not in ranks]
    if missing:
        raise UserError(f"The ranks of {where[0].lower() + where[1:]} lack {', '.join(missing)}; "
                        "give Recall.arrays() and owner.")
    ties = record["protocol"]["ties"]
    for key, value in Recall.from_arrays(ties, ranks).metrics.items():
        stated = record["metrics"][ties].get(key)
        if stated is None or not math.isclose(stated, value, abs_tol=1e-6):
            raise UserError(f"{where} states {key} {stated} by the {ties} rule, but its ranks give {value}.")


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
        raise UserError(f"{path} holds a record of {others[0]} '{before[others[0]]}', and this one is of "
                        f"'{record[others[0]]}'; give it another variant or folder.")


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
        raise UserError(f"{where} is a {type(value).__name__}; a record holds plain numbers and text only.")
    return value


def _git_state() -> dict:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                              timeout=20, check=True)
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
