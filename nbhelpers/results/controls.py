"""The runs by their names, and the control of each: one table for notebooks, leaderboard and pages.

A run is known by (notebook, variant), as in its record; the variant of a notebook's main run is "".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Key = tuple[str, str]

NAMES: dict[Key, str] = {
    ("20_pir", ""): "PIR",
    ("20_pir", "frozen_towers"): "PIR, all towers frozen",
    ("20_pir", "vir_lca"): "PIR without affiliation",
    ("20_pir", "vir"): "PIR without affiliation, LCA",
    ("20_pir", "baseline"): "PIR without affiliation, LCA, VIR",
    ("20_pir", "frozen"): "frozen towers, small heads",
    ("21_pir_clip", ""): "PIR-CLIP",
    ("21_pir_clip", "plain"): "CLIP, fine-tuned as PIR-CLIP",
    ("21_pir_clip", "token"): "PIR-CLIP, token alone",
    ("21_pir_clip", "belief"): "PIR-CLIP without affiliation",
    ("21_pir_clip", "by-rank"): "PIR-CLIP, weights by rank",
    ("22_pe_rsitr", ""): "PE-RSITR",
    ("22_pe_rsitr", "zero_shot"): "CLIP, zero-shot",
    ("22_pe_rsitr", "linear_probe"): "CLIP, linear probe",
    ("22_pe_rsitr", "lora"): "CLIP, LoRA",
    ("22_pe_rsitr", "adaptformer"): "CLIP, AdaptFormer",
    ("22_pe_rsitr", "full"): "CLIP, fine-tuned as PE-RSITR",
    ("22_pe_rsitr", "cross-only"): "PE-RSITR, cross-modal loss alone",
    ("22_pe_rsitr", "random-start"): "PE-RSITR, random start",
    ("23_cfitr", ""): "CFITR",
    ("23_cfitr", "coarse_only"): "CFITR, codes alone",
    ("23_cfitr", "exhaustive"): "CFITR, all pairs reranked",  # before 25_two_stage_search was
    ("23_cfitr", "transductive"): "CFITR, PPSR over test queries",
    ("23_cfitr", "no_lfem"): "CFITR without LFEM",
    ("25_two_stage_search", "exhaustive"): "CFITR, all pairs reranked",
    ("50_score_captions", ""): "nearest training image",
    ("50_score_captions", "bita"): "BITA",
    ("50_score_captions", "bita-no-stage1"): "BITA without stage 1",
    ("50_score_captions", "bita-attention"): "BITA, self-attention",
    ("50_score_captions", "bita-none"): "BITA, no mixing, no stage 1",
    ("50_score_captions", "bita-two-queries"): "BITA, two queries",
    ("50_score_captions", "left_out_reference"): "left-out reference",
    ("50_score_captions", "most_frequent"): "most frequent caption",
}

# Run -> its control: the same data, towers and settings without the part that the run adds. For a
# part that is taken
# away the control is the whole system. A run that is not here has no control.
CONTROLS: dict[Key, Key] = {
    ("20_pir", ""): ("20_pir", "frozen"),
    ("20_pir", "baseline"): ("20_pir", "frozen"),
    ("20_pir", "vir"): ("20_pir", "baseline"),
    ("20_pir", "vir_lca"): ("20_pir", "vir"),
    ("20_pir", "frozen_towers"): ("20_pir", "vir_lca"),
    ("21_pir_clip", ""): ("21_pir_clip", "plain"),
    ("21_pir_clip", "token"): ("21_pir_clip", "plain"),
    ("21_pir_clip", "belief"): ("21_pir_clip", "token"),
    ("21_pir_clip", "by-rank"): ("21_pir_clip", ""),
    ("22_pe_rsitr", ""): ("22_pe_rsitr", "full"),
    ("22_pe_rsitr", "linear_probe"): ("22_pe_rsitr", "zero_shot"),
    ("22_pe_rsitr", "lora"): ("22_pe_rsitr", "zero_shot"),
    ("22_pe_rsitr", "adaptformer"): ("22_pe_rsitr", "zero_shot"),
    ("22_pe_rsitr", "full"): ("22_pe_rsitr", "zero_shot"),
    ("22_pe_rsitr", "cross-only"): ("22_pe_rsitr", ""),
    ("22_pe_rsitr", "random-start"): ("22_pe_rsitr", ""),
    ("23_cfitr", ""): ("23_cfitr", "coarse_only"),
    ("23_cfitr", "exhaustive"): ("23_cfitr", "coarse_only"),
    ("23_cfitr", "transductive"): ("23_cfitr", ""),
    ("23_cfitr", "no_lfem"): ("23_cfitr", ""),
    ("25_two_stage_search", "exhaustive"): ("23_cfitr", "coarse_only"),
    ("50_score_captions", "bita"): ("50_score_captions", ""),
    ("50_score_captions", "bita-no-stage1"): ("50_score_captions", "bita"),
    ("50_score_captions", "bita-attention"): ("50_score_captions", "bita"),
    ("50_score_captions", "bita-none"): ("50_score_captions", "bita"),
    ("50_score_captions", "bita-two-queries"): ("50_score_captions", "bita"),
}

MAIN_RUNS: tuple[Key, ...] = (
    ("20_pir", ""),
    ("21_pir_clip", ""),
    ("22_pe_rsitr", ""),
    ("23_cfitr", ""),
)
PIR_STEPS: tuple[Key, ...] = (  # from two frozen towers to PIR, one part at a time
    ("20_pir", "frozen"),
    ("20_pir", "baseline"),
    ("20_pir", "vir"),
    ("20_pir", "vir_lca"),
    ("20_pir", "frozen_towers"),
    ("20_pir", ""),
)


def key_of(record: Mapping) -> Key:
    """Return the notebook and the variant of a record."""
    return record["notebook"], record["variant"]


def name_of(record: Mapping) -> str:
    """Return the name of a record's run.

    The system for a main run, else the name in NAMES, else system and variant.
    """
    system, variant = record["system"], record["variant"]
    return NAMES.get(key_of(record), f"{system}, {variant}") if variant else system


def with_controls(runs: Iterable[Key] = MAIN_RUNS) -> dict[Key, str]:
    """Names of the runs, each behind its control."""
    names: dict[Key, str] = {}
    for run in runs:
        control = CONTROLS.get(run, run)
        names |= {control: NAMES[control], run: NAMES[run]}
    return names


def controls_by_name(runs: Iterable[Key] = MAIN_RUNS) -> dict[str, str]:
    """Name of a run -> name of its control."""
    return {NAMES[run]: NAMES[CONTROLS[run]] for run in runs if run in CONTROLS}
