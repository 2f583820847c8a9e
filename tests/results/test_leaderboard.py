"""The leaderboard: nothing is mixed, every number comes from a record, exports say the same, README
and cards are current.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nbhelpers.__main__ import main
from nbhelpers.data import layouts
from nbhelpers.errors import UserError
from nbhelpers.metrics import audit, recall
from nbhelpers.paths import repository_root
from nbhelpers.results import cards, exports, leaderboard, pages, records
from nbhelpers.results.class_lines import CLASS_ONLY
from nbhelpers.results.published import CAPTION_CLAIMS, CLAIMS
from nbhelpers.runs import batch

OWNER = np.repeat(np.arange(20), 5)
COMMITTED = repository_root() / "data" / "results"


def found(seed=0, gain=0.3):
    similarity = np.random.default_rng(seed).random((20, 100))
    similarity[OWNER, np.arange(100)] += gain
    return recall.evaluate(similarity.round(1), OWNER)


def write(folder, seed=0, gain=0.3, run=found, **changes):
    """A record of PIR on generated data with its ranks; gain, how good it is."""
    result = run(seed, gain)
    made = records.new(
        **{
            "config": {"width": 64},
            "notebook": "20_pir",
            "system": "PIR",
            "profile": "default",
            "set": "scenes",
            "data_fingerprint": "a" * 64,
            "seed": seed,
            "seconds": 10.0 + seed,
            "parameters": {"all": 1000, "trainable": 600},
            "metrics": {"expectation": result.metrics, "released": result.metrics | {"mR": 1.5}},
            "ceiling": {"mR": 90.0},
            "protocol": {"split": "test", "ties": "expectation", "selected_on": "val"},
            "chance": recall.chance(OWNER),
            "class_only": {"mR": 40.0},
            "intervals": recall.bootstrap(result, OWNER, samples=50),
            "weights": [
                {
                    "name": "vision_encoder: lite0",
                    "source": "package",
                    "sha256": "b" * 64,
                    "kind": "package",
                }
            ],
        }
        | changes
    )
    return records.write(folder, made, result.arrays() | {"owner": OWNER})


def boards(folder):
    return leaderboard.boards(exports.read([folder]))


# ---- what may stand side by side
def test_no_table_mixes_profiles_sets_splits_or_fingerprints(tmp_path):
    kinds = [
        {},
        {"profile": "other"},
        {"set": "own"},
        {"data_fingerprint": "c" * 64},
        {"protocol": {"split": "val", "ties": "expectation", "selected_on": "val"}},
    ]
    for number, kind in enumerate(kinds):
        write(tmp_path / str(number), seed=number, **kind)
    made = boards(tmp_path)
    assert (
        len(made)
        == len(kinds)
        == len({board.heading for board in made})
        == len({board.stem for board in made})
    )
    for number, board in enumerate(made):
        assert board.rows.seeds.dropna().tolist() == [str(number)]
        assert board.rows.mR["PIR"] == found(number).metrics["mR"]


def test_each_tie_rule_has_a_column_of_its_own(tmp_path):
    released = {"split": "test", "ties": "released", "selected_on": "val"}
    by_rule = recall.evaluate(np.eye(20)[:, OWNER], OWNER, ties="released")
    write(tmp_path)
    write(
        tmp_path,
        variant="vir",
        run=lambda *_: by_rule,
        protocol=released,
        metrics={"released": by_rule.metrics},
    )
    (board,) = boards(tmp_path)
    theirs = board.rows.loc["PIR without affiliation, LCA"]
    bounds = dict.fromkeys(leaderboard.BOUNDS.values(), 0)
    assert board.rows["mR released"].to_dict() | bounds == bounds | {
        "PIR": 1.5,
        "PIR without affiliation, LCA": by_rule.metrics["mR"],
    }
    assert theirs[["mR", "mR low", "i2t_R@1"]].isna().all() and theirs.alike == ""
    assert board.shown.loc["PIR without affiliation, LCA", ["mR", "95 % interval"]].tolist() == [
        "",
        "",
    ]


def test_interval_bounds_cost_and_origin_stand_in_the_row(tmp_path):
    path = write(tmp_path, checkpoint="checkpoints/pir-1/model.safetensors")
    (board,) = boards(tmp_path)
    row, record = board.rows.loc["PIR"], records.read_one(path)
    assert [row["mR low"], row["mR high"]] == record["intervals"]["mR"]
    assert (row.trained, row.parameters, row.seconds, row["selected on"]) == (
        600,
        1000,
        10.0,
        "val",
    )
    assert row["started from"] == "package: lite0" and row.checkpoint == record["checkpoint"]
    assert (
        board.rows.mR["ceiling of the split"] == 90
        and board.rows.mR["chance"] == recall.chance(OWNER)["mR"]
    )
    assert board.rows.mR["class only"] == 40 and leaderboard.CLASS_ONLY_NOTE in board.notes
    assert board.files == ((path,), (), (), ())
    assert any("generated" in note for note in board.notes)
    low, high = record["intervals"]["mR"]
    assert board.shown.loc["PIR", ["mR", "95 % interval", "trained / all parameters"]].tolist() == [
        f"{record['metrics']['expectation']['mR']:.1f}",
        f"[{low:.1f}, {high:.1f}]",
        "600 / 1,000",
    ]


def test_seeds_become_mean_and_spread_and_the_interval_of_the_mean(tmp_path):
    for seed in range(3):
        write(tmp_path, seed)
    (board,) = boards(tmp_path)
    row, runs = board.rows.loc["PIR"], [found(seed) for seed in range(3)]
    each = [run.metrics["mR"] for run in runs]
    assert (
        row.seeds == "0 1 2"
        and row.mR == pytest.approx(np.mean(each))
        and row["mR spread"] == pytest.approx(np.std(each, ddof=1))
    )
    assert row.seconds == 11 and len(board.files[0]) == 3
    mean = recall.Recall.from_arrays(
        "expectation",
        {key: np.mean([run.arrays()[key] for run in runs], 0) for key in runs[0].arrays()},
    )
    assert (row["mR low"], row["mR high"]) == pytest.approx(recall.bootstrap(mean, OWNER)["mR"])
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d", board.shown.mR["PIR"])
    assert any("standard deviation over the seeds" in note for note in board.notes)


def test_runs_of_two_configurations_are_two_rows(tmp_path):
    write(tmp_path / "a"), write(tmp_path / "b", 1, config={"width": 65})
    (board,) = boards(tmp_path)
    assert [
        name for name in board.rows.index if name.startswith("PIR (20_pir, config ")
    ] == board.rows.index[:2].tolist()
    assert board.rows["mR spread"].isna().all()


def test_letters_tell_what_cannot_be_told_apart(tmp_path):
    (
        write(tmp_path, gain=0.9),
        write(tmp_path, gain=0.9, variant="vir"),
        write(tmp_path, gain=0.0, variant="frozen", system="frozen towers"),
    )
    (board,) = boards(tmp_path)
    assert board.rows.alike.dropna().to_dict() == {
        "PIR": "a",
        "PIR without affiliation, LCA": "a",
        "frozen towers, small heads": "b",
    }
    assert any("cannot be told apart" in note for note in board.notes)


def test_without_ranks_or_common_queries_there_are_no_letters_and_a_note_says_why(tmp_path):
    write(tmp_path).with_suffix(".npz").unlink()
    write(tmp_path, variant="vir")
    (board,) = boards(tmp_path)
    assert set(board.rows.alike.dropna()) == {""} and any(
        "ranks of two are needed" in note for note in board.notes
    )
    shutil.rmtree(tmp_path)
    write(tmp_path), write(tmp_path, 1, variant="vir")
    (board,) = boards(tmp_path)
    assert any(
        "No groups were formed" in note and "no seed in common" in note for note in board.notes
    )


def test_what_was_chosen_on_its_own_split_is_called_so(tmp_path):
    write(tmp_path, protocol={"split": "test", "ties": "expectation", "selected_on": "test"})
    (board,) = boards(tmp_path)
    assert any(
        "Chosen on the very split it is measured on, and so too good: PIR." in note
        for note in board.notes
    )


def test_a_record_read_twice_or_none_at_all_is_refused(tmp_path):
    write(tmp_path / "a"), write(tmp_path / "b")
    with pytest.raises(UserError, match="Two records tell of PIR, seed 0, in one profile"):
        boards(tmp_path)
    with pytest.raises(UserError, match="There is no record yet"):
        leaderboard.boards([])


# ---- what papers claim
def test_generated_data_stand_beside_no_paper_and_real_data_beside_verified_claims(tmp_path):
    (
        write(tmp_path / "scenes"),
        write(tmp_path / "ucm", set="ucm", profile="ucm"),
        write(tmp_path / "rsicd", set="rsicd", profile="rsicd"),
    )
    assert "published" not in leaderboard.table(exports.read([tmp_path / "scenes"]))
    ucm = leaderboard.table(exports.read([tmp_path / "ucm"]))
    assert (
        "ucm, as published" in ucm
        and "55.71" in ucm
        and "48.30" in ucm
        and "24.46" not in ucm
        and "here they are 1680 of ucm" in ucm
    )
    rsicd = exports.markdown(boards(tmp_path / "rsicd"))
    assert (
        "| PIR | 9.88 / 27.26 / 39.16 |" in rsicd
        and "7862" in rsicd
        and "chosen on the test split" in rsicd
    )


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.system}-{claim.set}")
def test_a_claimed_mean_is_the_mean_of_its_six_numbers_and_has_a_source(claim):
    assert claim.mR == pytest.approx(np.mean(claim.i2t + claim.t2i), abs=0.011)
    assert claim.source and claim.caveat
    assert list(claim.i2t) == sorted(claim.i2t) and list(claim.t2i) == sorted(claim.t2i)


def captions(folder, seed, score, **changes):
    made = records.new(
        {"beams": 5},
        kind="captions",
        **(
            {
                "notebook": "50_score_captions",
                "system": "BITA",
                "variant": "bita",
                "profile": "nwpu",
                "set": "nwpu",
                "seed": seed,
                "data_fingerprint": "a" * 64,
                "protocol": {
                    "split": "test",
                    "images": 20,
                    "tokenizer": "PTB",
                    "selected_on": "val",
                },
                "metrics": {"Bleu_4": 0.3, "CIDEr": score},
                "intervals": {"CIDEr": (score - 0.1, score + 0.1)},
            }
            | changes
        ),
    )
    return records.write(folder, made)


def test_claims_of_two_protocols_never_share_a_table(tmp_path):
    write(tmp_path, set="rsicd", profile="rsicd")
    published = [board for board in boards(tmp_path) if "as published" in board.heading]
    named = {board.heading: set(board.shown.system) for board in published if "mR" in board.shown}
    assert named["rsicd, as published, protocol released"] == {"PIR", "VSE2 (CL)"}
    assert {"RemoteCLIP B/32", "CLIP B/32"} <= named["rsicd, as published"]
    assert len({board.stem for board in published}) == len(published)
    assert any("was not stated" in note for note in published[0].notes)


def test_claims_say_what_a_model_was_trained_on():
    told = {(claim.system, claim.set): claim.caveat for claim in CLAIMS}
    assert len(told) == len(CLAIMS)
    assert "zero-shot" in told["CLIP B/32", "rsicd"]
    assert "contains this one" in told["RemoteCLIP L/14", "ucm"]
    assert "tuned on this set" in told["GeoRSCLIP-FT (RSITMD)", "rsitmd"]


def test_captions_stand_in_a_table_of_their_own_beside_their_own_claims(tmp_path):
    captions(tmp_path, 0, 0.9), captions(tmp_path, 1, 1.1)
    captions(tmp_path, 0, 0.2, system="most frequent caption", variant="most_frequent")
    board, published = boards(tmp_path)
    assert board.rows.CIDEr.to_dict() == {"BITA": 100, "most frequent caption": 20}
    assert board.shown.CIDEr.tolist() == [
        "100.0",
        "20.0 [10.0, 30.0]",
    ] and board.shown.seeds.tolist() == ["0 1", "0"]
    assert (
        published.heading == "nwpu, captions, as published"
        and published.shown.SPICE.tolist() == ["33.65"]
    )
    assert "(50_score_captions-seed1-bita.json)" in exports.markdown([board], tmp_path)


def test_claimed_caption_scores_are_whole_and_have_a_source():
    assert all(
        len(claim.scores) == len(records.CAPTION_METRICS) and claim.source and claim.caveat
        for claim in CAPTION_CLAIMS
    )
    assert all(
        list(claim.scores[:4]) == sorted(claim.scores[:4], reverse=True) for claim in CAPTION_CLAIMS
    )


# ---- exports
AWKWARD = {"system": "A_b & 5% | {x}", "set": "ucm", "profile": "ucm"}


def cells(markdown):
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]
    return [[cell.replace("\\|", "|") for cell in row] for row in rows]


def test_markdown_parses_back_and_links_each_seed_to_its_record(tmp_path):
    write(tmp_path / "records", **AWKWARD), write(tmp_path / "records", 1, **AWKWARD)
    board, *_ = boards(tmp_path / "records")
    assert cells(exports.markdown([board]))[2:] == board.shown.values.tolist()
    header, rule, *body = cells(exports.markdown([board], tmp_path))
    back = pd.DataFrame(body, columns=header)
    assert (
        set(rule) == {"---"}
        and back.drop(columns="seeds").values.tolist()
        == board.shown.drop(columns="seeds").values.tolist()
    )
    assert re.findall(r"\[(\d)\]\(([^)]*)\)", back.seeds[0]) == [
        (str(seed), f"records/20_pir-seed{seed}.json") for seed in (0, 1)
    ]
    assert all(
        (tmp_path / target).is_file() for target in re.findall(r"\]\(([^)]*)\)", back.seeds[0])
    )


def test_csv_parses_back_to_six_decimals(tmp_path):
    path = write(tmp_path / "records", **AWKWARD)
    board, published = boards(tmp_path / "records")
    back = pd.read_csv(io.StringIO(exports.csv(board, tmp_path)), index_col="name")
    record = records.read_one(path)
    assert (
        back.mR[AWKWARD["system"]] == round(record["metrics"]["expectation"]["mR"], 6)
        and back.trained[AWKWARD["system"]] == 600
    )
    assert back.records[AWKWARD["system"]] == "records/20_pir-seed0.json"
    assert set(back[["profile", "set", "split", "data"]].drop_duplicates().values.ravel()) == {
        "ucm",
        "test",
        "a" * 12,
    }
    claimed = pd.read_csv(io.StringIO(exports.csv(published)), index_col="name")
    assert claimed.mR["PE-RSITR"] == 55.71 and claimed.source.notna().all()


def test_latex_is_balanced_and_escaped(tmp_path):
    write(tmp_path, **AWKWARD)
    made = boards(tmp_path)
    text = exports.latex(made)
    bare = re.sub(r"(?m)^%.*$", "", text)
    assert bare.count("{") - bare.count(r"\{") == bare.count("}") - bare.count(r"\}")
    for name in ("table*", "tabular"):
        assert bare.count(rf"\begin{{{name}}}") == bare.count(rf"\end{{{name}}}") == len(made)
    assert r"A\_b \& 5\% | \{x\}" in bare and not re.search(
        r"(?<!\\)[#_$~^]", bare.replace("$\\pm$", "")
    )
    for board, part in zip(made, bare.split(r"\toprule")[1:], strict=False):
        rows = [line for line in part.split(r"\bottomrule")[0].splitlines() if line.endswith(r"\\")]
        assert len(rows) == len(board.shown) + 1
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {
            len(set(board.shown) - {"seeds", "started from"}) - 1
        }
    assert f"% {AWKWARD['system']}: 20_pir-seed0.json from package: " in text


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="there is no pdflatex on the PATH")
def test_latex_compiles(tmp_path):
    for seed in (0, 1):
        write(tmp_path / "records", seed, **AWKWARD)
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}"
        f"{exports.latex(boards(tmp_path / 'records'))}\\end{{document}}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1500:]


def test_the_command_line_tables_and_exports(tmp_path, capsys):
    write(tmp_path / "records", set="ucm")
    for form, sign in (("text", "image to text"), ("markdown", "| --- |"), ("latex", r"\toprule")):
        assert main(["records", "table", str(tmp_path / "records"), "--format", form]) == 0
        assert sign in capsys.readouterr().out
    assert (
        main(["records", "export", str(tmp_path / "records"), "--out", str(tmp_path / "out")]) == 0
    )
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert written == {
        "leaderboard.md",
        "leaderboard.tex",
        "ucm-test-default-aaaaaa.csv",
        "ucm-published.csv",
        *(f"cards/{paper}.md" for paper in cards.PAPERS),
    }
    assert all(
        line.startswith(str(tmp_path / "out")) for line in capsys.readouterr().out.splitlines()
    )


# ---- cards
PARTS = [
    "Data, and whether one can get them",
    "Weights, and whether one can get them",
    "Hardware",
    "Deviations",
    "Known bugs of the released code",
    "The numbers",
]


@pytest.mark.parametrize("paper", cards.PAPERS)
def test_a_card_is_one_page_with_all_its_parts(tmp_path, paper):
    system, (notebook, *_) = cards.PAPERS[paper]
    (
        write(tmp_path, notebook=notebook, system=system),
        write(tmp_path, notebook="99_other", system="sixth system", gain=0.9),
    )
    read = exports.read([tmp_path])
    card = cards.card(paper, read, leaderboard.boards(read), tmp_path)
    assert (
        re.findall(r"(?m)^## (.+)$", card) == PARTS
        and len(card.splitlines()) <= 90
        and "$" not in card
    )
    mine = found().metrics["mR"]
    assert (
        f"| {mine:.1f} |" in card
        and "sixth system" not in card
        and "- scenes, profile default: 1 records on cpu" in card
    )
    empty = cards.card(paper, [], [], tmp_path)
    assert (
        "No record of it" in empty
        and "no run is recorded" in empty
        and f"| {mine:.1f} |" not in empty
    )


@pytest.mark.parametrize("paper", ["pir_clip", "cfitr"])
def test_a_paper_without_a_verified_table_is_given_no_number(paper):
    assert "as published" not in cards.card(paper, [], [], ".") and not leaderboard.claimed(
        cards.PAPERS[paper][0]
    )


# ---- what is committed
def test_the_results_page_is_current():
    page = repository_root() / "data/results/README.md"
    content = page.read_text("utf-8")
    assert pages.renewed(content, page.parent) == content, (
        "run `python -m nbhelpers records readme`"
    )


@pytest.mark.parametrize(
    "folder",
    sorted(path.parent for path in COMMITTED.rglob("leaderboard.md")),
    ids=lambda folder: folder.name,
)
def test_committed_exports_are_current(folder, tmp_path):
    copy = tmp_path / folder.relative_to(repository_root())
    shutil.copytree(folder, copy)
    for path in pages.write([copy], copy):
        assert path.read_text("utf-8") == (folder / path.relative_to(copy)).read_text("utf-8"), (
            f"run `python -m nbhelpers records export {folder.relative_to(repository_root())} --out"
            f" {folder.relative_to(repository_root())}`"
        )


def test_the_readme_is_renewed_between_its_marks_alone(tmp_path):
    write(tmp_path / "results")
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- records: results -->\nold\n<!-- end of records -->\nafter\n")
    assert pages.readme(page) and not pages.readme(page)
    content = page.read_text()
    assert content.startswith("before\n<!-- records: results -->\n") and content.endswith(
        "\n<!-- end of records -->\nafter\n"
    )
    assert (
        f"| {found().metrics['mR']:.1f} |" in content
        and "old" not in content
        and "(results/20_pir-seed0.json)" in content
    )
    # the whole tables stand in leaderboard.md
    assert "R@1" not in content and "started from" not in content
    write(tmp_path / "results", 1)
    assert pages.readme(page) and "±" in page.read_text()
    page.write_text("no marks")
    with pytest.raises(UserError, match="There are no marks"):
        pages.readme(page)


def test_the_notebook_reads_the_records_of_a_real_set(tmp_path, monkeypatch):
    """Published values stand beside these, in tables that have neither seeds nor revision."""
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    shutil.copytree(
        COMMITTED / "ucm",
        tmp_path / "runs" / "ucm" / "records",
        ignore=shutil.ignore_patterns("heads", "times", "cards"),
    )
    batch.execute(
        batch.NOTEBOOKS / "90_leaderboard.ipynb",
        tmp_path / "90.ipynb",
        {"PROFILE": "ucm", "SET": "ucm", "DATA": str(tmp_path)},
    )
    said = (tmp_path / "90.ipynb").read_text()
    assert "ucm, as published" in said and "chosen on the very split that is reported: none" in said


# ---- the class-only line
def test_a_published_split_has_its_class_only_line_without_data(tmp_path):
    ucm = next(key for key in CLASS_ONLY if key.startswith("c0196431ac2a"))
    write(tmp_path, set="ucm", data_fingerprint=ucm, class_only={})
    board = next(board for board in boards(tmp_path) if "published" not in board.heading)
    assert list(board.rows.index) == ["PIR", *leaderboard.BOUNDS.values()]
    assert board.rows.mR["class only"] == CLASS_ONLY[ucm]["mR"]


def test_where_no_class_is_known_there_is_no_such_line(tmp_path):
    write(tmp_path, class_only={})
    (board,) = boards(tmp_path)
    assert "class only" not in board.rows.index and leaderboard.CLASS_ONLY_NOTE not in board.notes


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["rsicd", "ucm", "rsitmd"])
def test_the_lines_of_published_splits_are_those_of_their_data(name):
    path = Path(os.environ["NBHELPERS_TEST_DATA"]) / f"dataset_{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} in NBHELPERS_TEST_DATA")
    test = layouts.read(path).split("test")
    found, known = audit.class_only(test), CLASS_ONLY[test.fingerprint()]
    assert {metric: found[metric] for metric in known} == pytest.approx(known, abs=1e-4)
