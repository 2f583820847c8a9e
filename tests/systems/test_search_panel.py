"""The interactive search without a browser: what a gallery finds, what a person is told, what each
click does.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coloured_set import COLOURS, coloured, words
from PIL import Image
from torch import nn

from nbhelpers.data import image_input
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import CLIPTokenizer
from nbhelpers.errors import UserError
from nbhelpers.papers.cfitr import CFITR, CFITRConfig
from nbhelpers.systems import gallery, region_maps, search_panel
from nbhelpers.systems.gallery import Gallery, TwoStageGallery, reading
from nbhelpers.systems.search_panel import SearchPanel, overlay
from nbhelpers.systems.trained_systems import System
from nbhelpers.tasks import two_stage
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.towers import backbones

GREY = torch.tensor([0.5, 0.5, 0.5])


class ByColour(nn.Module):
    """A dual encoder that can be checked by eye: the mean colour of an image, the colour that a
    sentence names.
    """

    def __init__(self, tokenizer):
        super().__init__()
        self.config = SimpleNamespace(freeze_towers=False)
        self.known = nn.Parameter(
            torch.tensor(list(COLOURS.values())) / 255 - GREY, requires_grad=False
        )
        self.ids = {tokenizer.encode([name])[0][1]: row for row, name in enumerate(COLOURS)}

    def encode_images(self, pixels):
        return nn.functional.normalize(pixels.mean((2, 3)) - GREY, dim=1)

    def encode_texts(self, ids, mask):
        rows = [
            [self.known[self.ids[i]] for i in line if i in self.ids] or [GREY]
            for line in ids.tolist()
        ]
        return nn.functional.normalize(
            torch.stack([torch.stack(row).mean(0) for row in rows]), dim=1
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def by_colour(data, tmp_path_factory):
    tokenizer = words(data, tmp_path_factory.mktemp("words"))
    image = image_input.ImageInput(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return System("pir", ByColour(tokenizer).eval(), tokenizer, image, {}, Path("model"))


@pytest.fixture(scope="module")
def colours(by_colour, data):
    return Gallery(by_colour, data)


@pytest.fixture(scope="module")
def two_stages(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    tokenizer = replace_length(words(data, folder))
    torch.manual_seed(0)
    model = CFITR(CFITRConfig.tiny(tokenizer.vocab_size, bits=16, hidden=32)).eval()
    image = backbones.vilt_size("vilt_standin").image
    task = RetrievalTask(data, tokenizer, image, workers=1)
    two_stage.write_stores(model, task, "test", folder / "test")
    two_stage.write_stores(model, task, "train", folder / "train", states=False)
    return System("cfitr", model, tokenizer, image, {}, Path("model")), folder


def replace_length(tokenizer):
    tokenizer.max_length = 32  # what the pooling of a tiny CFITR reads
    return tokenizer


def scenes(found, where):
    return list(where.table.images.scene[found.rows])


# ---- what a gallery finds
def test_a_sentence_finds_the_images_it_names(colours):
    (stage,) = colours.find_images("a green field")
    assert scenes(stage, colours)[:3] == ["green"] * 3 and len(stage.rows) == len(colours) == 12
    assert list(stage.scores) == sorted(stage.scores, reverse=True) and stage.scores[0] > 0.9
    assert (
        list(stage.milliseconds) == ["encode", "compare"] and min(stage.milliseconds.values()) >= 0
    )


def test_a_picture_finds_its_sentences_and_its_like(colours):
    red = colours.table.images.scene.tolist().index("red")
    found = colours.find_sentences(colours.picture(red))
    assert all("red" in sentence for sentence in colours.sentences[found.rows[:4]]) and len(
        found.rows
    ) == len(colours.sentences)
    similar = colours.similar(colours.picture(red))
    assert similar.rows[0] == red and set(scenes(similar, colours)[:3]) == {"red"}


def test_sentences_are_distinct_and_belong_to_all_their_images(colours):
    assert len(set(colours.sentences)) == len(colours.sentences) < len(colours.table.captions)
    own = colours.described_by(" a RED field. ")
    assert set(colours.table.images.scene[own]) == {"red"} and len(own) == 3
    assert len(colours.described_by("a sentence of one's own")) == 0
    assert colours.captions(own[0])[0] == "A red field."


def test_the_place_of_the_right_image(colours):
    (stage,) = colours.find_images("A red field.")
    own = colours.described_by("A red field.")
    assert stage.place(own) == 1 and stage.place(np.array([], int)) is None
    assert stage.place(stage.rows[[4, 7]]) == 5


def test_a_gallery_of_one(by_colour, data):
    images = data.table.images[data.table.images.split == "test"].iloc[[0]]
    own = data.table.captions[data.table.captions.image_id.isin(images.image_id)]
    one = Gallery(by_colour, DataSet(CaptionTable("one", images, own), data.pixels, None, []))
    (stage,) = one.find_images("grey")
    assert list(stage.rows) == [0]
    panel = SearchPanel({"one": lambda: one})
    panel.ask("a grey place")
    assert [shown(tile) for tile in panel.tiles] == [True] + [False] * (len(panel.tiles) - 1)


# ---- two stages
def test_both_stages_are_those_of_the_search(two_stages, data):
    system, folder = two_stages
    found = TwoStageGallery(system, data, folder, candidates=5)
    coarse, fine = found.find_images("A pale red place with 1 trees.")
    assert (
        [coarse.name, fine.name] == ["coarse", "reranked"]
        and set(coarse.rows) == set(fine.rows)
        and len(fine.rows) == 5
    )
    assert list(fine.milliseconds) == ["encode", "coarse", "fine"] and list(
        coarse.milliseconds
    ) == ["encode", "coarse"]
    assert all(np.diff(fine.scores) <= 0) and all(np.diff(coarse.scores) <= 0)
    ids, mask = system.tokenizer([system.tokenizer.clean("A pale red place with 1 trees.")])
    query = two_stage.encode(system.model, system.model.text_features(ids, mask) | {"mask": mask})
    whole = found._images(query)
    assert np.array_equal(whole.rows[0], fine.rows) and np.allclose(whole.scores[0], fine.scores)


def test_a_picture_asks_in_two_stages_and_gets_each_sentence_once(two_stages, data):
    system, folder = two_stages
    found = TwoStageGallery(system, data, folder, candidates=24).find_sentences(data.pixels[3])
    assert len(set(found.rows)) == len(found.rows) and all(np.diff(found.scores) <= 0)


def test_stores_of_another_split_or_model_are_refused(two_stages, data, tmp_path):
    system, folder = two_stages
    fewer = data.table.images.drop(data.table.images.index[data.table.images.split == "test"][0])
    kept = data.table.captions[data.table.captions.image_id.isin(fewer.image_id)]
    with pytest.raises(
        UserError,
        match="hold 12 images and 24 captions, the test split has 11 and 22; run 23_cfitr again",
    ):
        TwoStageGallery(
            system, DataSet(CaptionTable("few", fewer, kept), data.pixels, None, []), folder, 5
        )
    torch.manual_seed(1)
    other = replace(system, model=CFITR(system.model.config).eval())
    with pytest.raises(UserError, match="wants a store under"):
        TwoStageGallery(other, data, folder, 5)
    with pytest.raises(UserError):
        TwoStageGallery(system, data, tmp_path, 5)


# ---- what is read of a sentence
@pytest.mark.parametrize("sentence", ["", "   ", "...", " - / !"])
def test_an_empty_query_is_told(sentence, by_colour):
    for tokenizer in (by_colour.tokenizer, CLIPTokenizer(40)):
        with pytest.raises(UserError, match="nothing to search for; type a sentence"):
            reading(sentence, tokenizer)


def test_unknown_words_are_named(by_colour):
    assert reading("a red field", by_colour.tokenizer) == []
    assert reading("A Red, field!", by_colour.tokenizer) == []
    assert reading("a zebra in a red field", by_colour.tokenizer) == ["unknown here: zebra, in"]
    with pytest.raises(UserError, match=r"none of the words \(zebra, giraffe\)"):
        reading("zebra giraffe", by_colour.tokenizer)
    assert reading("zebra giraffe", CLIPTokenizer(40)) == []


def test_a_thousand_words_are_cut_and_that_is_said(by_colour, colours):
    assert reading("red " * 11, by_colour.tokenizer) == []  # and [CLS]: 12 ids
    assert reading("red " * 12, by_colour.tokenizer) == ["only the first 11 of 12 words were read"]
    assert reading("green " * 1000, CLIPTokenizer(40)) == [
        "only the first 38 of 1000 words were read"
    ]
    (stage,) = colours.find_images("red " * 1000)
    assert scenes(stage, colours)[0] == "red"
    with pytest.raises(UserError, match="at most 20,000"):
        reading("r" * 20_001, by_colour.tokenizer)


# ---- the panel
@pytest.fixture
def panel(colours):
    return SearchPanel({"colours": lambda: colours}, write=lambda picture: "a caption of BITA")


def shown(tile) -> bool:
    return "nbh-empty" not in tile._dom_classes


def right(panel) -> list[int]:
    return [
        place
        for place, tile in enumerate(panel.tiles)
        if shown(tile) and "nbh-right" in tile._dom_classes
    ]


def decoded(widget) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(widget.value)).convert("RGB")).astype(int)


def test_enter_fills_the_grid(panel, colours):
    panel.text.value = "blue"  # what the browser sends on Enter
    assert all(shown(tile) for tile in panel.tiles) and right(panel) == []
    assert {colours.table.images.scene[tile.row] for tile in panel.tiles[:3]} == {"blue"}
    assert np.abs(decoded(panel.tiles[0].image).mean((0, 1)) - COLOURS["blue"]).max() < 20
    assert "ms (encode" in panel.status.value and "nbh-busy" not in panel.status.value
    assert panel.stage.layout.visibility == "hidden"


def test_the_right_images_of_a_caption_are_framed_and_their_place_is_told(panel):
    panel.ask("A red field.")
    assert right(panel) == [0, 1, 2] and "✓" in panel.tiles[0].note.value
    assert "own image is at place 1 of 12" in panel.status.value
    panel.ask("a red field without a full stop")
    assert right(panel) == []


def test_a_caption_of_the_set_is_drawn(panel, colours):
    panel.sample.click()
    assert panel.text.value in colours.sentences and right(panel)
    assert panel.query == panel.text.value


def test_the_button_asks_again_after_a_picture(panel, colours):
    panel.ask("blue")
    panel.ask(colours.picture(0))
    assert not isinstance(panel.query, str)
    panel.go.click()
    assert panel.query == "blue" and "blue" in panel.tiles[0].note.value


def test_enter_asks_again_after_a_picture_though_the_sentence_is_the_same(panel, colours):
    panel.ask("blue")
    panel.ask(colours.picture(0))
    enter(panel)
    assert panel.query == "blue" and "blue" in panel.tiles[0].note.value


def test_enter_asks_no_sentence_twice(panel, colours, monkeypatch):
    asked = []
    monkeypatch.setattr(panel, "_ask", asked.append)
    enter(panel)
    panel.query = "blue"
    panel.text.value = "blue"
    enter(panel)
    assert asked == ["blue"], "its new value asked, and nothing else"


def enter(panel):
    """What a browser sends when Enter is pressed, before a changed value."""
    panel.text._handle_custom_msg({"event": "submit"}, [])


def test_an_empty_question_gets_a_caption_of_the_set_as_an_example(panel, colours):
    panel.ask(colours.picture(0))
    panel.ask("")
    example = re.search(r"for example: (.+?)\.", panel.status.value)[1]
    assert any(sentence.startswith(example) for sentence in colours.sentences)


def test_the_empty_box_suggests_a_caption_of_the_set(colours):
    panel = SearchPanel({"colours": lambda: colours}, example=colours.example)
    assert panel.text.placeholder.endswith(f"for example: {colours.example}")
    assert "example" not in SearchPanel({"colours": lambda: colours}).text.placeholder


def test_a_click_shows_the_map_of_the_words(panel, colours, monkeypatch):
    asked = []
    looked = np.zeros((4, 4))
    looked[0, 3] = 1
    monkeypatch.setattr(
        region_maps,
        "match",
        lambda system, sentence: SimpleNamespace(
            map=lambda method, picture: asked.append((system, sentence, method)) or looked
        ),
    )
    panel.ask("blue")
    panel.tiles[2].button.click()
    assert asked == [(colours.system, "blue", "relevance")]
    assert (
        "nbh-chosen" in panel.tiles[2]._dom_classes
        and "nbh-chosen" not in panel.tiles[0]._dom_classes
    )
    large = decoded(panel.detail.image)
    assert large[:10, -10:].sum() > 1.5 * large[-10:, :10].sum()
    assert all(
        caption in panel.detail.lines.value for caption in colours.captions(panel.tiles[2].row)
    )
    assert np.array_equal(panel.detail.picture, colours.picture(panel.tiles[2].row))


def test_a_system_without_maps_shows_the_picture_all_the_same(panel, monkeypatch):
    def refused(system, sentence):
        raise UserError("This one has no maps.")

    monkeypatch.setattr(region_maps, "match", refused)
    panel.ask("blue")
    panel.tiles[0].button.click()
    assert (
        "This one has no maps." in panel.status.value
        and panel.detail.picture is not None
        and shown(panel.tiles[0])
    )


def test_a_picture_asks_and_gets_sentences_images_and_a_caption(panel, colours):
    panel.ask("blue")
    with_grey = colours.table.images.scene.tolist().index("grey")
    panel.upload.value = [uploaded("grey.png", png(colours.picture(with_grey)))]
    assert panel.tiles[0].row == with_grey and panel.upload.value == ()
    assert "a caption of BITA" in panel.detail.lines.value and "grey" in panel.detail.lines.value
    panel.tiles[3].button.click()  # no words, so no map
    assert "Its captions" in panel.detail.lines.value
    row = panel.tiles[3].row
    panel.detail.button.click()
    assert panel.tiles[0].row == row


def uploaded(name: str, content: bytes) -> dict:
    return {
        "name": name,
        "type": "",
        "size": len(content),
        "content": content,
        "last_modified": datetime.now(),
    }


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def test_both_stages_can_be_watched(two_stages, data, monkeypatch):
    system, folder = two_stages
    panel = SearchPanel(
        {"CFITR": lambda: TwoStageGallery(system, data, folder, candidates=6)}, method=""
    )
    seen = []
    panel.tiles[0].note.observe(lambda change: seen.append(change.new), "value")
    panel.ask("A red field.")
    coarse, fine = panel.stages
    assert panel.stage.layout.visibility == "visible" and panel.stage.value == 1
    assert [tile.row for tile in panel.tiles[:6]] == list(fine.rows) and not any(
        map(shown, panel.tiles[6:])
    )
    # the first stage was shown before
    assert "(was" in panel.tiles[0].note.value and "(was" not in seen[0]
    assert all(part in panel.status.value for part in ("encode", "coarse", "fine"))
    panel.stage.value = 0
    assert [tile.row for tile in panel.tiles[:6]] == list(
        coarse.rows
    ) and "(was" not in panel.tiles[0].note.value
    panel.ask("A blue field.")
    assert panel.stage.value == 1 and [tile.row for tile in panel.tiles[:6]] == list(
        panel.stages[1].rows
    )


def test_another_system_answers_the_same_question_and_is_made_once(colours):
    made = []
    panel = SearchPanel({"one": lambda: colours, "other": lambda: made.append(1) or colours})
    panel.system.value = "other"
    # nothing was asked yet
    assert panel.query is None and made == [] and "Ready" in panel.status.value
    panel.system.value = "one"
    panel.ask("green")
    panel.system.value = "other"
    assert made == [1] and panel.query == "green" and shown(panel.tiles[0])
    panel.ask("blue")
    assert made == [1]


# ---- what goes wrong
def wrong(panel) -> str:
    assert (
        "nbh-wrong" in panel.status.value
        and not any(map(shown, panel.tiles))
        and panel.detail.picture is None
    )
    return panel.status.value


def test_bad_queries_become_a_sentence_and_the_search_goes_on(panel):
    panel.ask("blue")
    panel.ask("zebra")
    assert "none of the words (zebra)" in wrong(panel)
    panel.ask("   ")
    assert "nothing to search for" in wrong(panel)
    panel.ask("<b>red</b> red")
    assert (
        "<b>" not in panel.status.value
        and "&lt;b&gt;" in panel.status.value
        and shown(panel.tiles[0])
    )


def test_the_grid_leaves_no_old_answer_beside_a_mistake(panel):
    panel.ask("A red field.")
    panel.upload.value = [uploaded("notes.txt", b"these are notes")]
    assert "notes.txt is not an image file" in wrong(panel) and panel.upload.value == ()
    panel.upload.value = [uploaded("half.png", png(np.zeros((40, 40, 3), np.uint8))[:60])]
    assert "half.png is damaged" in wrong(panel)
    panel.ask("blue")
    assert shown(panel.tiles[0])


def test_a_system_without_a_checkpoint_says_which_notebook_to_run(colours):
    def missing():
        raise UserError("There is no trained cfitr; run 23_cfitr first.")

    panel = SearchPanel({"one": lambda: colours, "CFITR": missing})
    panel.ask("green")
    panel.system.value = "CFITR"
    assert "run 23_cfitr first" in wrong(panel)
    panel.system.value = "one"
    assert shown(panel.tiles[0])
    nothing = SearchPanel({})
    nothing.ask("green")
    assert "no trained system yet" in wrong(nothing)


def test_an_unforeseen_error_becomes_a_sentence_too(colours):
    def broken():
        raise RuntimeError("out of <memory>")

    panel = SearchPanel({"one": broken})
    panel.ask("green")
    assert "RuntimeError: out of &lt;memory&gt;" in wrong(panel)


# ---- pictures
def test_an_overlay_is_bright_where_the_map_is_and_dark_where_it_speaks_against():
    picture = np.full((30, 60, 3), 100, np.uint8)
    drawn = overlay(picture, np.array([[0.0, 5.0], [-3.0, 0.0]]))
    assert drawn.shape == picture.shape and drawn.dtype == np.uint8
    assert drawn[2, 57].sum() > 300 > drawn[2, 2].sum() and np.array_equal(
        drawn[28, 2], drawn[28, 3]
    )
    nothing = overlay(picture, np.array([[-1.0, -2.0], [-3.0, -1.0]]))
    assert len(np.unique(nothing.reshape(-1, 3), axis=0)) == 1


def test_every_place_of_the_style_is_filled():
    style = search_panel._css()
    assert (
        not any(place in style for place in ("{green}", "{tile}", "{large}", "{columns}"))
        and "repeat(4," in style
    )


def test_times_are_kept_as_a_record(tmp_path):
    times = {"PIR": {"encode": 3.0, "compare": 0.1}}
    path = gallery.write_times(tmp_path / "times" / "60.json", times, profile="default", images=90)
    assert json.loads(path.read_text()) == {
        "profile": "default",
        "images": 90,
        "milliseconds": times,
    }
    with pytest.raises(ValueError):
        gallery.write_times(path, {"PIR": {"encode": float("nan")}})
    assert json.loads(path.read_text())["images"] == 90
