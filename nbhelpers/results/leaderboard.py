"""The leaderboard: from records alone to tables of what may stand side by side.

exports.py makes files of them.

Each table is of one profile and one split of one set of one fingerprint. Its R@K, mR, interval and
letters are by expectation over ties; another tie rule has a column of its own, named after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from nbhelpers.errors import UserError
from nbhelpers.metrics import recall, significance
from nbhelpers.metrics.protocols import PROTOCOLS
from nbhelpers.metrics.recall import Recall
from nbhelpers.results.class_lines import CLASS_ONLY
from nbhelpers.results.controls import CONTROLS, key_of, name_of
from nbhelpers.results.published import CAPTION_CLAIMS, CLAIMS, TRAINED_ON, CaptionClaim, Claim
from nbhelpers.results.records import (
    CAPTION_METRICS,
    Record,
    kind_of,
    protocol_of,
    read_recall,
)

RULE = "expectation"
LETTERS = (
    "Rows that share a letter cannot be told apart: paired tests of mR over images, and over seeds"
    " where rows have several in common, at 5 %, corrected for their number by Holm."
)
# field of a record -> its row, from the highest to the lowest
BOUNDS = {"ceiling": "ceiling of the split", "class_only": "class only", "chance": "chance"}
CLASS_ONLY_NOTE = (
    "Class only: a made-up system that knows the scene class of each image and caption, and nothing"
    " else."
)
RECALLS = tuple(f"{direction}_R@{k}" for direction, k in product(("i2t", "t2i"), (1, 5, 10)))


@dataclass(frozen=True, eq=False)
class Board:
    """One table of what may stand side by side.

    stem     names its file
    heading  one line
    rows     unrounded, for programs
    shown    the same to read, as text
    notes    sentences that one must know to read it
    files    the record files of each row, in the order of the seeds; none for rows that no run made
    """

    stem: str
    heading: str
    rows: pd.DataFrame
    shown: pd.DataFrame
    notes: tuple[str, ...]
    files: tuple[tuple[Path, ...], ...]


def boards(records: Iterable[Record]) -> list[Board]:
    """Return the tables of these records, retrieval before captions.

    After those of a real set stand the results that papers report on it.

    UserError if there is no record, or if two tell of one run.
    """
    blocks: dict[tuple, list[Record]] = {}
    for record in sorted(records, key=lambda record: kind_of(record) == "captions"):
        split, data = record["protocol"]["split"], record["data_fingerprint"][:12]
        blocks.setdefault(
            (kind_of(record), record["profile"], record["set"], split, data, protocol_of(record)),
            [],
        ).append(record)
    if not blocks:
        raise UserError("There is no record yet; run a notebook that trains or evaluates first.")
    found = [
        (_captions if block[0] == "captions" else _retrieval)(block[1:], some)
        for block, some in blocks.items()
    ]
    for name in sorted({block[2] for block in blocks}):
        kinds = {block[0] for block in blocks if block[2] == name}
        claims = [claim for claim in CLAIMS if claim.set == name and "retrieval" in kinds]
        captions = [claim for claim in CAPTION_CLAIMS if claim.set == name and "captions" in kinds]
        found += _claims(claims, captions, "system")
    return found


def table(records: Iterable[Record]) -> str:
    """`boards` as text for a screen, without the column of weights, which is wide."""
    parts = []
    for board in boards(records):
        shown = board.shown.drop(columns="started from", errors="ignore")
        widths = [max(map(len, (title, *shown[title]))) for title in shown]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in [list(shown.columns), *shown.values.tolist()]
        ]
        parts += [board.heading, "\n".join(lines), "\n".join(f"- {note}" for note in board.notes)]
    return "\n\n".join(parts) + "\n"


def _retrieval(block: tuple, records: list[Record]) -> Board:
    profile, name, split, data, protocol = block
    runs = _runs(records)
    ranks = {label: _ranks(seeds) for label, seeds in runs.items()}
    rows = pd.DataFrame(
        [_recalls(seeds, ranks[label]) | _cost(seeds) for label, seeds in runs.items()],
        index=pd.Index(runs, name="name"),
    )
    rows["alike"], groups_note = _groups(ranks)
    rows = rows.join(_over_controls(runs, ranks)).rename_axis("name")
    rows = rows.sort_values("mR", ascending=False, kind="stable")
    bounds = {row: _bound(records, field) for field, row in BOUNDS.items()}
    rows = pd.concat(
        [
            rows,
            pd.DataFrame.from_dict(
                {bound: known for bound, known in bounds.items() if known}, "index"
            ).reindex(columns=rows.columns),
        ]
    )
    notes = [
        *_generated(name),
        *([f"Protocol {protocol}: {PROTOCOLS[protocol]}"] if protocol else []),
        "Best mR first, by expectation over ties; in brackets the 95 % interval over test images.",
    ]
    if (rows.seeds.fillna("").str.contains(" ")).any():
        notes.append(
            "± is the standard deviation over the seeds; recalls and interval are then of the mean"
            " over seeds."
        )
    if len(runs) > 1:
        notes.append(groups_note or LETTERS)
    if rows.control.notna().any():
        notes.append(
            "Over its control: the difference of mR to the run that the column control names, over"
            " the same test images and seeds, with the 95 % interval of this one comparison. The"
            " control has the same data and settings without the part that the row is about."
        )
    if BOUNDS["class_only"] in rows.index:
        notes.append(CLASS_ONLY_NOTE)
    notes += _provenance(records)
    files = tuple(tuple(record.path for record in runs.get(label, ())) for label in rows.index)
    return Board(
        f"{name}-{split}-{profile}-{data[:6]}{f'-{protocol}' if protocol else ''}",
        f"{name}, {split} split, profile {profile}, data {data}"
        + (f", protocol {protocol}" if protocol else ""),
        _located(rows, block),
        _show_recalls(rows),
        tuple(notes),
        files,
    )


def _captions(block: tuple, records: list[Record]) -> Board:
    profile, name, split, data, _ = block
    runs = _runs(records)
    rows = pd.DataFrame(
        [_scores(seeds) | _cost(seeds) for seeds in runs.values()],
        index=pd.Index(runs, name="name"),
    )
    if "CIDEr" in rows:
        rows = rows.sort_values("CIDEr", ascending=False, kind="stable")
    shown = pd.DataFrame({"system": rows.index}, rows.index)
    for metric in (metric for metric in CAPTION_METRICS if metric in rows):
        ends = [
            _ends(row.get(f"{metric} low"), row.get(f"{metric} high"), " [{}, {}]")
            for _, row in rows.iterrows()
        ]
        shown[_title(metric)] = [*map(str.__add__, map(_number, rows[metric]), ends)]
    shown["tokens by"] = rows.tokenizer
    notes = [
        *_generated(name),
        "Scores times 100, in brackets the 95 % interval over test images.",
        *_provenance(records),
    ]
    return Board(
        f"{name}-{split}-{profile}-{data[:6]}-captions",
        f"{name}, {split} split, captions, profile {profile}, data {data}",
        _located(rows, block),
        _show_cost(shown, rows),
        tuple(notes),
        tuple(tuple(record.path for record in runs[label]) for label in rows.index),
    )


def claimed(system: str) -> list[Board]:
    """What was published of one system, a row for each set; nothing if no number was verified."""
    claims = [claim for claim in CLAIMS if claim.system == system]
    captions = [claim for claim in CAPTION_CLAIMS if claim.system == system]
    return _claims(claims, captions, "set")


def _claims(claims: list[Claim], captions: list[CaptionClaim], label: str) -> list[Board]:
    """Return a table for each protocol of the claims, and one of captions."""
    protocols = list(dict.fromkeys(claim.protocol for claim in claims))
    found = [
        _claimed([claim for claim in claims if claim.protocol == one], label) for one in protocols
    ]
    return found + ([_claimed_captions(captions, label)] if captions else [])


def _claimed(claims: list[Claim], label: str) -> Board:
    """label: "system" of the claims on one set, "set" of the claims of one system."""
    protocol = claims[0].protocol
    told = (
        f"Protocol {protocol}: {PROTOCOLS[protocol]}"
        if protocol
        else "How ties and equal captions were counted was not stated, and the same weights may"
        " differ by several points."
    )
    shown = {
        title: [" / ".join(f"{claim.metrics[key]:.2f}" for key in keys) for claim in claims]
        for title, keys in _directions()
    }
    trained = ", ".join(
        f"{TRAINED_ON[name]} of {name}" for name in dict.fromkeys(claim.set for claim in claims)
    )
    return _published(
        claims,
        label,
        "as published" + (f", protocol {protocol}" if protocol else ""),
        pd.DataFrame([claim.metrics for claim in claims]),
        pd.DataFrame(shown | {"mR": [f"{claim.mR:.2f}" for claim in claims]}),
        [
            "The test images are the same as here, the training images need not be: here they are"
            f" {trained}.",
            told,
        ],
    )


def _claimed_captions(claims: list[CaptionClaim], label: str) -> Board:
    rows = pd.DataFrame([claim.scores for claim in claims], columns=CAPTION_METRICS)
    return _published(
        claims,
        label,
        "captions, as published",
        rows,
        rows.map("{:.2f}".format).rename(columns=_title),
        [],
    )


def _published(
    claims: list,
    label: str,
    heading: str,
    rows: pd.DataFrame,
    shown: pd.DataFrame,
    notes: list[str],
) -> Board:
    name, labels = (
        claims[0].set if label == "system" else claims[0].system,
        [getattr(claim, label) for claim in claims],
    )
    about = {"system": [claim.system for claim in claims], "set": [claim.set for claim in claims]}
    rows = rows.assign(
        **about,
        source=[claim.source for claim in claims],
        caveat=[claim.caveat for claim in claims],
    )
    shown.insert(0, label, labels)
    sources = list(dict.fromkeys((claim.source, claim.caveat) for claim in claims))
    whose = ["All"] if len(sources) == 1 < len(claims) else labels
    notes = notes + [
        f"{each}: {claim.source}; {claim.caveat}."
        for each, claim in zip(whose, claims, strict=False)
    ]
    index = pd.Index(labels, name="name")
    return Board(
        f"{name}-{heading.replace(', as ', '-').replace('as ', '').replace(', protocol ', '-')}",
        f"{name}, {heading}",
        rows.set_index(index),
        shown.set_index(index),
        tuple(notes),
        ((),) * len(claims),
    )


# its rows
def _bound(records: list[Record], field: str) -> dict[str, float]:
    """Return the recalls of a bound: of a record, or known of a published split."""
    stated: dict[str, float] = next((record[field] for record in records if record.get(field)), {})
    known = CLASS_ONLY.get(records[0]["data_fingerprint"], {})
    return stated or (known if field == "class_only" else {})


def _runs(records: list[Record]) -> dict[str, list[Record]]:
    """Name of a row -> its records, one for each seed.

    Runs of different configurations are different rows.
    """
    runs: dict[tuple, dict[int, Record]] = {}
    for record in records:
        row = (name_of(record), record["notebook"], record["config_sha256"][:10])
        if record["seed"] in runs.setdefault(row, {}):
            raise UserError(
                f"Two records tell of {row[0]}, seed {record['seed']}, in one profile; "
                "read only one of their folders."
            )
        runs[row][record["seed"]] = record
    names = [name for name, _, _ in runs]
    labels = [
        name if names.count(name) == 1 else f"{name} ({notebook}, config {config})"
        for name, notebook, config in runs
    ]
    return {
        label: [seeds[seed] for seed in sorted(seeds)]
        for label, seeds in zip(labels, runs.values(), strict=True)
    }


def _ranks(seeds: list[Record]) -> tuple[dict[int, Recall], np.ndarray] | None:
    """Return ({seed: recall}, owner) under the expectation rule.

    None where a record counts otherwise or its ranks are missing.
    """
    if any(
        record["protocol"]["ties"] != RULE or not record.path.with_suffix(".npz").is_file()
        for record in seeds
    ):
        return None
    found = [read_recall(record.path) for record in seeds]
    return {record["seed"]: one for record, (one, _) in zip(seeds, found, strict=True)}, found[0][1]


def _recalls(seeds: list[Record], ranks: tuple | None) -> dict:
    """Return R@K and mR, the mean over seeds, with interval and spread.

    By the expectation rule; mR also by the other rules.
    """
    counted = [record["metrics"][RULE] for record in seeds if RULE in record["metrics"]]
    row = {
        key: np.mean([numbers.get(key, np.nan) for numbers in counted or [{}]])
        for key in (*RECALLS, "mR")
    }
    row["mR spread"] = (
        np.std([numbers["mR"] for numbers in counted], ddof=1) if len(counted) > 1 else np.nan
    )
    row["mR low"], row["mR high"] = _interval(seeds, ranks)
    for rule in recall.TIES:
        if rule != RULE:
            found = [record["metrics"][rule]["mR"] for record in seeds if rule in record["metrics"]]
            row[f"mR {rule}"] = np.mean(found) if len(found) == len(seeds) else np.nan
    return row


def _interval(seeds: list[Record], ranks: tuple | None) -> tuple[float, float]:
    """Return the interval of mR.

    One seed: as recorded. Several: of the mean over seeds, from the mean hits of every query.
    """
    if len(seeds) == 1 and seeds[0]["protocol"]["ties"] == RULE:
        return tuple(seeds[0]["intervals"].get("mR", (np.nan, np.nan)))
    if len(seeds) == 1 or ranks is None:
        return np.nan, np.nan
    found, owner = ranks
    arrays = [one.arrays() for one in found.values()]
    mean = {name: np.mean([each[name] for each in arrays], axis=0) for name in arrays[0]}
    return recall.bootstrap(Recall.from_arrays(RULE, mean), owner)["mR"]


def _groups(ranks: dict[str, tuple | None]) -> tuple[list[str], str]:
    """(letters of each row, "" for one without ranks; why there are none at all, or "")."""
    none = ["" for _ in ranks]
    known = {label: found for label, found in ranks.items() if found}
    if len(known) < 2:
        return none, "No row can be compared with another query by query: ranks of two are needed."
    try:
        owners = [owner for _, owner in known.values()]
        if any(not np.array_equal(owner, owners[0]) for owner in owners):
            raise UserError(
                "The ranks of these records are not of the same queries in the same order."
            )
        table = significance.groups(
            {label: found for label, (found, _) in known.items()}, owners[0]
        ).table
    except UserError as error:
        return none, f"No groups were formed: {error}"
    return [table.group.get(label, "") for label in ranks], ""


def _over_controls(runs: dict[str, list[Record]], ranks: dict[str, tuple | None]) -> pd.DataFrame:
    """Return for each row its control and the difference of mR in points, with interval.

    Rows without a control among these runs are left out.
    """
    label_of = {key_of(seeds[0]): label for label, seeds in runs.items() if ranks[label]}
    found = {}
    for key, label in label_of.items():
        control = label_of.get(CONTROLS[key]) if key in CONTROLS else None
        mine, its = ranks[label], ranks.get(control) if control else None
        if mine is None or its is None:
            continue
        (one, owner), (other, _) = mine, its
        try:
            test = significance.paired_test(one, other, owner)
        except UserError:  # no seed in common, or other queries
            continue
        found[label] = [control, test["difference"], test["low"], test["high"]]
    columns = ["control", "over control", "over control low", "over control high"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns)


def _scores(seeds: list[Record]) -> dict:
    """Caption scores times 100, the mean over seeds; intervals of a single one."""
    row: dict = {}
    for metric in CAPTION_METRICS:
        found = [100 * record["metrics"][metric] for record in seeds if metric in record["metrics"]]
        if len(found) == len(seeds):
            row[metric] = np.mean(found)
        if len(seeds) == 1 and metric in seeds[0]["intervals"]:
            row[f"{metric} low"], row[f"{metric} high"] = (
                100 * end for end in seeds[0]["intervals"][metric]
            )
    return row | {"tokenizer": _said(record["protocol"]["tokenizer"] for record in seeds)}


def _cost(seeds: list[Record]) -> dict:
    """What a row cost and where it comes from."""
    first, seconds = seeds[0], [record["seconds"] for record in seeds if "seconds" in record]
    sizes = first.get("parameters", {})
    return {
        "system": first["system"],
        "variant": first["variant"],
        "notebook": first["notebook"],
        "seeds": " ".join(str(record["seed"]) for record in seeds),
        "trained": sizes.get("trainable"),
        "parameters": sizes.get("all"),
        "seconds": np.mean(seconds) if seconds else np.nan,
        "started from": started_from(first),
        "selected on": _said(record["protocol"]["selected_on"] for record in seeds),
        "device": _said(record["device"] for record in seeds),
        "config": first["config_sha256"][:10],
        "revision": _said(_revision(record) for record in seeds),
        "checkpoint": " ".join(record["checkpoint"] for record in seeds if "checkpoint" in record),
        "notes": _said(record["notes"] for record in seeds),
    }


def started_from(record: dict) -> str:
    """The weights by kind: "package: efficientnet_lite0, minilm; stand-in: clip_compact"."""
    kinds: dict[str, list[str]] = {}
    for weight in record["weights"]:
        kinds.setdefault(weight["kind"], []).append(weight["name"].split(": ")[-1])
    return "; ".join(f"{kind}: {', '.join(dict.fromkeys(names))}" for kind, names in kinds.items())


def _revision(record: dict) -> str:
    git = record["git"]
    return f"{(git['revision'] or 'unknown')[:10]}{'+changes' if git['dirty'] else ''}"


def _said(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(filter(None, values)))


def _provenance(records: list[Record]) -> list[str]:
    revisions = pd.Series([_revision(record) for record in records]).value_counts(sort=False)
    chosen = _said(
        on for record in records if (on := record["protocol"]["selected_on"]) != "nothing"
    )
    tested = [
        name_of(record)
        for record in records
        if record["protocol"]["selected_on"] == record["protocol"]["split"]
    ]
    notes = []
    if chosen:
        notes.append(f"Epochs were chosen on {chosen}.")
    notes.append(
        "Code at "
        + ", ".join(f"{name} ({count} records)" for name, count in revisions.items())
        + "."
    )
    if tested:
        notes.append(
            f"Chosen on the very split it is measured on, and so too good: {_said(tested)}."
        )
    return notes


def _generated(name: str) -> list[str]:
    if name != "scenes":
        return []
    return ["The set is generated: its numbers compare with each other, never with a paper's."]


def _located(rows: pd.DataFrame, block: tuple) -> pd.DataFrame:
    profile, name, split, data, _ = block
    rows = rows.rename_axis("name").astype({"trained": "Int64", "parameters": "Int64"})
    return rows.assign(profile=profile, set=name, split=split, data=data)


# to read
def _directions() -> list[tuple[str, tuple[str, ...]]]:
    return [("image to text R@1/5/10", RECALLS[:3]), ("text to image R@1/5/10", RECALLS[3:])]


def _show_recalls(rows: pd.DataFrame) -> pd.DataFrame:
    shown = pd.DataFrame(
        {"system": rows.index} | {title: _triple(rows, keys) for title, keys in _directions()},
        rows.index,
    )
    shown["mR"] = [
        _number(mR) + ("" if pd.isna(spread) else f" ± {spread:.1f}")
        for mR, spread in rows[["mR", "mR spread"]].values
    ]
    shown["95 % interval"] = [
        _ends(low, high, "[{}, {}]") for low, high in rows[["mR low", "mR high"]].values
    ]
    shown["alike"] = rows.alike.fillna("")
    if rows.control.notna().any():
        shown["over its control"] = [
            _over(*row)
            for row in rows[["over control", "over control low", "over control high"]].values
        ]
        shown["control"] = rows.control.fillna("")
    shown["mR, released rule"] = rows["mR released"].map(_number)
    return _show_cost(shown, rows)


def _show_cost(shown: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    shown["trained / all parameters"] = [
        "" if pd.isna(size) else f"{int(trained):,} / {int(size):,}"
        for trained, size in zip(rows.trained, rows.parameters, strict=True)
    ]
    shown["seconds"] = ["" if pd.isna(seconds) else f"{seconds:,.0f}" for seconds in rows.seconds]
    shown["seeds"] = rows.seeds.fillna("")
    shown["started from"] = rows["started from"].fillna("")
    return shown


def _over(points: float, low: float, high: float) -> str:
    return "" if pd.isna(points) else f"{points:+.1f} [{low:+.1f}, {high:+.1f}]"


def _triple(rows: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    numbers = rows[list(keys)].values.astype(float)
    return ["" if np.isnan(row).any() else " / ".join(map(_number, row)) for row in numbers]


def _number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.1f}"


def _ends(low: float | None, high: float | None, form: str) -> str:
    return (
        ""
        if low is None or high is None or pd.isna(low)
        else form.format(_number(low), _number(high))
    )


def _title(metric: str) -> str:
    return metric.replace("Bleu_", "BLEU-").replace("ROUGE_L", "ROUGE-L")
