"""Write results of `bench` in the forms of others: model cards, the hub's files, MTEB's JSON.

`model-index` is the block of a model card, `.eval_results` the hub's newer files; huggingface_hub
writes both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from nbhelpers.files import atomic_write
from nbhelpers.results.exports import escaped
from nbhelpers.results.records import safe_name

TASK = {"type": "image-text-retrieval", "name": "image-text retrieval"}


def latex(table: pd.DataFrame, caption: str) -> str:
    """Return a booktabs table of text cells for `input` in a paper."""
    rows = [
        [str(name), *map(str, row)] for name, row in zip(table.index, table.values, strict=True)
    ]
    head = [table.index.name or "", *table.columns]
    lines = [" & ".join(map(escaped, row)) + r" \\" for row in [head, *rows]]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escaped(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * table.shape[1]}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def card(record: Mapping[str, Any]) -> str:
    """Return the YAML block of a model card: `model-index` with each recall and mR."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    split, protocol = record["protocol"]["split"], _protocol(record)
    results = [
        EvalResult(
            task_type=TASK["type"],
            task_name=TASK["name"],
            dataset_type=record["set"],
            dataset_name=record["set"],
            dataset_split=split,
            dataset_args={"protocol": protocol, "fingerprint": record["data_fingerprint"]},
            metric_type=name,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, value in _metrics(record).items()
    ]
    index = eval_results_to_model_index(record["system"], results)
    return "---\n" + yaml.safe_dump({"model-index": index}, sort_keys=False) + "---\n"


def eval_results(record: Mapping[str, Any]) -> str:
    """Return the YAML of a file in a model's `.eval_results/`: one entry for mR and each recall."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    notes = f"protocol {_protocol(record)}, {record['protocol']['split']} split, percent"
    entries = [
        EvalResultEntry(record["set"], name, round(value, 4), notes=notes)
        for name, value in _metrics(record).items()
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def mteb(record: Mapping[str, Any], direction: str, ranking: Mapping[str, float]) -> dict[str, Any]:
    """Return one direction as MTEB writes a task; main score nDCG@10, as fractions.

    R@K is MTEB's hit rate.
    direction  i2t or t2i
    ranking    `trec.measures`, in percent; empty where not computed
    """
    metrics = _metrics(record)
    hits = {k: metrics[f"{direction}_R@{k}"] / 100 for k in (1, 5, 10)}
    scores = {f"hit_rate_at_{k}": value for k, value in hits.items()}
    if direction == "t2i":  # one right image, so a hit finds all of them
        scores |= {f"recall_at_{k}": value for k, value in hits.items()}
    for name, value in ranking.items():
        way, _, measure = name.partition("_")
        if way == direction:
            scores[measure.lower().replace("@", "_at_")] = value / 100
    main = scores.get("ndcg_at_10", hits[10])
    part = scores | {"main_score": main, "hf_subset": "default", "languages": ["eng-Latn"]}
    return {
        "dataset_revision": record["data_fingerprint"],
        "task_name": f"{record['set']}{direction.upper()}Retrieval",
        "mteb_version": "none: written by nbhelpers",
        "evaluation_time": record["seconds"],
        "scores": {record["protocol"]["split"]: [part]},
        "protocol": _protocol(record),
    }


def write_all(
    records: Sequence[Mapping[str, Any]],
    rankings: Sequence[Mapping[str, float]],
    mteb_folder: str | None,
    card_folder: str | None,
) -> list[Path]:
    """Write MTEB's JSON files and the blocks of model cards; return the paths."""
    texts: dict[Path, str] = {}
    for record, ranking in zip(records, rankings, strict=True):
        name, stem = safe_name(record["system"]), f"{record['set']}-{_protocol(record)}"
        if mteb_folder:
            for way in ("i2t", "t2i"):
                found = mteb(record, way, ranking)
                texts[Path(mteb_folder) / name / f"{stem}-{way}.json"] = json.dumps(found, indent=1)
        if card_folder:
            folder = Path(card_folder) / name
            texts[folder / f"{stem}-model-index.md"] = card(record)
            texts[folder / ".eval_results" / f"{stem}.yaml"] = eval_results(record)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return list(texts)


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    found = record["metrics"][record["protocol"]["ties"]]
    return {name: value for name, value in found.items() if "median" not in name}


def _protocol(record: Mapping[str, Any]) -> str:
    return record["protocol"].get("name", record["protocol"]["ties"])
