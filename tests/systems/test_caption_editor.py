"""The caption editor: its scores are those of the scorer, and mistakes are sentences."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.text import Text

from nbhelpers.errors import UserError
from nbhelpers.metrics import caption_scores, java
from nbhelpers.systems.caption_editor import LONGEST, CaptionEditor, LiveScores

REFERENCES = {
    "airport": [
        "two white planes are parked near a long building",
        "two airplanes stand beside a terminal",
        "there are two white planes on the apron",
    ],
    "river": ["a green river is between the fields", "there is a river", "a wide green river"],
    "park": ["two blue lakes are in a park", "many trees are in a park", "a park"],
    "road": ["a road is between many trees", "there is a road with two cars", "a long road"],
}
CAPTIONS = [
    "two white planes are parked near a long building",
    "two planes, parked.",
    "white white white planes",
    "building a two near planes long white parked are",
    "a",
    "zebra",
    "there are many trees in the park, and it isn't far to a river",
]


def pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in REFERENCES}


@pytest.fixture
def editor() -> CaptionEditor:
    return CaptionEditor(pictures(), REFERENCES)


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("image", ["airport", "park"])
def test_the_scores_are_those_of_the_scorer(caption, image):
    captions = dict.fromkeys(REFERENCES, "there is a river") | {image: caption}
    metrics = ["Bleu", "ROUGE_L", "CIDEr"]
    expected = caption_scores.score_captions(captions, REFERENCES, metrics).per_image.loc[image]
    found = LiveScores(REFERENCES).score(image, caption)
    assert list(found) == list(LiveScores.METRICS)
    for name in ("ROUGE_L", "CIDEr"):
        assert found[name] == pytest.approx(expected[name], abs=1e-9)
    alone = caption_scores.score_captions({0: caption}, {0: REFERENCES[image]}, ["Bleu"]).corpus
    assert [found[name] for name in caption_scores.BLEU] == pytest.approx(list(alone.values()))


def test_an_empty_caption_scores_nothing_and_a_long_one_is_refused():
    live = LiveScores(REFERENCES)
    assert set(live.score("river", " . ").values()) == {0.0}
    with pytest.raises(UserError, match=f"has {LONGEST + 1} words; give at most {LONGEST}"):
        live.score("river", "a " * (LONGEST + 1))
    with pytest.raises(UserError, match="Image 'sea' has no references"):
        live.score("sea", "a")
    with pytest.raises(UserError, match="no references"):
        LiveScores({})
    with pytest.raises(UserError, match="no picture"):
        CaptionEditor({}, REFERENCES)


def test_a_key_is_answered_within_a_tenth_of_a_second():
    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(300)]
    many = {n: [" ".join(rng.choice(words, 12)) for _ in range(5)] for n in range(1000)}
    live = LiveScores(many)
    began = time.perf_counter()
    for _ in range(10):
        live.score(0, " ".join(words[:12]))
    assert time.perf_counter() - began < 1


def test_typing_changes_bars_and_marks_words_without_a_reference(editor):
    assert editor.shown == "airport" and editor.status.value
    scores = editor.write("two white cars are parked")
    assert 0 < scores["Bleu_1"] < 1 and "nbh-new" in editor.words.value
    assert re.search(r'nbh-new">cars<', editor.words.value)
    assert re.search(r'nbh-known">planes<', editor.words.value) is None
    assert f"<em>{100 * scores['CIDEr']:.1f}</em>" in editor.bars.value
    editor.text.value = "two white planes are parked"
    assert editor.scores["Bleu_1"] > scores["Bleu_1"] and "nbh-new" not in editor.words.value


def test_buttons_take_references_and_images_in_turn(editor):
    for expected in (*REFERENCES["airport"], REFERENCES["airport"][0]):
        editor.sample.click()
        assert editor.text.value == expected
    assert editor.scores["Bleu_4"] == pytest.approx(1, abs=1e-6)
    first = editor.image.value
    for name in ("river", "park", "road", "airport"):
        editor.next.click()
        assert editor.shown == name and REFERENCES[name][0] in editor.list.value
    assert editor.image.value == first
    editor.next.click()
    assert editor.scores["Bleu_4"] < 0.5  # the same caption, another image


def test_mistakes_are_sentences(editor):
    editor.write("a " * (LONGEST + 1))
    assert "give at most" in editor.status.value and editor.scores == {}
    assert editor.bars.value == ""
    editor.write("a road")
    assert "give at most" not in editor.status.value and editor.scores["Bleu_1"] > 0
    editor.choose("sea")
    assert "no picture of image" in editor.status.value and "sea" in editor.status.value
    editor.write("<script>alert(1)</script>")
    assert "<script>" not in editor.words.value


def test_the_figure_shows_what_the_editor_shows(editor):
    editor.write("two planes")
    texts = [text.get_text() for text in editor.figure().findobj(Text)]
    assert any("two planes" in text for text in texts) and "CIDEr" in texts
    assert any(REFERENCES["airport"][1] in text for text in texts)
    assert f"{100 * editor.scores['Bleu_1']:.0f}" in texts


def test_without_a_scorer_there_is_no_meteor(editor):
    assert editor.meteor not in editor.children[1].children
    editor.meteor.click()
    assert "METEOR" not in editor.scores


def test_what_a_scorer_cannot_do_is_a_sentence():
    with caption_scores.CaptionScorer(["ROUGE_L"]) as scorer:
        editor = CaptionEditor(pictures(), REFERENCES, scorer)
        assert editor.meteor in editor.children[1].children
        editor.write("two planes")
        editor.meteor.click()
    assert "METEOR is not among the metrics" in editor.status.value
    assert "METEOR" not in editor.scores and "Bleu_1" in editor.scores


@pytest.mark.skipif(java.find() is None, reason="METEOR needs Java")
def test_meteor_answers_a_button_until_the_next_key():
    texts = [text for own in REFERENCES.values() for text in own]
    with caption_scores.CaptionScorer(["METEOR"], texts=texts) as scorer:
        editor = CaptionEditor(pictures(), REFERENCES, scorer)
        editor.write(REFERENCES["airport"][0])
        editor.meteor.click()
        assert editor.scores["METEOR"] == pytest.approx(1, abs=1e-6)
        assert "METEOR" in editor.bars.value
        editor.write("two planes")
        assert "METEOR" not in editor.scores


# ---- in a browser
@pytest.fixture
def notebook(tmp_path) -> Path:
    """A notebook that shows the editor, in the folder that the server opens."""
    cell = (
        "import numpy as np\nfrom nbhelpers.systems.caption_editor import CaptionEditor\n"
        f"references = {REFERENCES!r}\n"
        "pictures = {name: np.full((64, 64, 3), 90, np.uint8) for name in references}\n"
        "editor = CaptionEditor(pictures, references)\nprint('asked nothing')\neditor"
    )
    path = tmp_path / "root" / "editor.ipynb"
    path.parent.mkdir()
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


@pytest.mark.browser
def test_in_a_browser_scores_follow_the_keys(tmp_path, notebook):
    playwright = pytest.importorskip("playwright.sync_api")
    import test_browser

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with (
        playwright.sync_playwright() as driver,
        test_browser.jupyter_lab(tmp_path, tmp_path) as address,
    ):
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        reader = test_browser.Reader(browser, address.format("lab/tree/editor.ipynb"), tmp_path)
        reader.run_all()
        page, bar = reader.page, reader.page.locator(".nbh-bar em").first
        page.locator(".nbh-editor-caption input").press_sequentially("two white zebras", delay=30)
        page.wait_for_function("document.querySelectorAll('.nbh-new').length === 1")
        assert page.locator(".nbh-bar").count() == len(LiveScores.METRICS)
        before = float(bar.inner_text())
        page.screenshot(path=tmp_path / "typed.png")
        page.click("text=A reference")
        page.wait_for_function("document.querySelectorAll('.nbh-new').length === 0")
        assert float(bar.inner_text()) > before
        page.screenshot(path=tmp_path / "reference.png")
        assert reader.errors == []
        browser.close()
