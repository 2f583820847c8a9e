"""Any model encodes a set once; an exported CLIP equals itself through every door."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from coloured_set import coloured
from hub_stand_in import Host, constants_of, serving
from huggingface_hub import constants
from PIL import Image
from small_models import random_start

from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError
from nbhelpers.metrics import recall
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.runs.commands import main
from nbhelpers.systems import bench_models, clip_files
from nbhelpers.systems.bench_models import Options, encode
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.towers import any_model
from nbhelpers.towers.starting_weights import Start, package_start


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return random_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def doors(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("doors")
    return clip_files.export(start, folder / "open_clip", folder / "hugging_face")


@pytest.fixture
def options(data, tmp_path):
    return Options(data.pixels, cache=tmp_path / "cache", device="cpu")


def test_an_exported_clip_equals_itself_through_every_door(data, start, doors, options, tmp_path):
    task = RetrievalTask(data, Start.read(start).read_tokenizer(), clip_input())
    own = task.embeddings(clip_files.starting_clip(start), "test")
    table = data.table.split("test")
    for folder in doors:
        found = encode(str(folder), table, options)
        np.testing.assert_allclose(found.images, own.images, atol=2e-6)
        np.testing.assert_allclose(found.texts, own.texts, atol=2e-6)
        np.save(tmp_path / "images.npy", found.images)
        np.save(tmp_path / "texts.npy", found.texts)
        for again in (found.images @ found.texts.T, from_files(tmp_path)):
            metrics = recall.evaluate(again, own.owner).metrics
            assert metrics == pytest.approx(own.recall().metrics, abs=1e-9)
    assert (
        len({tuple(encode(str(folder), table, options).images[0].round(4)) for folder in doors})
        == 1
    )


def test_three_doors_of_the_command_give_the_mean_of_our_own_evaluation(
    data, start, doors, tmp_path, monkeypatch, capsys
):
    """`bench` on the open_clip form, on the Hugging Face form, and on the vectors as .npy."""
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    task = RetrievalTask(data, Start.read(start).read_tokenizer(), clip_input())
    own = task.embeddings(clip_files.starting_clip(start), "test")
    np.save(tmp_path / "images.npy", own.images)
    np.save(tmp_path / "texts.npy", own.texts)
    captions = written_captions(data, tmp_path / "colours.csv")
    pictures = data.pixels.folder.parent.parent / "images"
    models = [word for folder in doors for word in ("--model", str(folder))]
    outputs = [f"--{name}={tmp_path / name}.npy" for name in ("images", "texts")]
    found = {}
    for words in (
        [*models, "--set", f"{captions}={pictures}", "--device", "cpu"],
        [*outputs, "--captions", str(captions), "--name", "npy"],
    ):
        assert main(["bench", *words, "--json"]) == 0
        (table,) = json.loads(capsys.readouterr().out)["tables"]
        found |= {row["model"]: row["mR"] for row in table["rows"]}
    right = own.recall().metrics["mR"]
    for name in (*map(str, doors), "npy"):
        assert found[name] == pytest.approx(right, abs=1e-9)


def test_a_repository_of_the_hub_and_its_folder_have_one_row(
    data, doors, tmp_path, monkeypatch, capsys
):
    """`bench --model hf-hub:OWNER/NAME`, from a server that stands in for the hub."""
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    Host.files = {path.name: path.read_bytes() for path in doors[0].iterdir()}
    captions = written_captions(data, tmp_path / "colours.csv")
    pictures = data.pixels.folder.parent.parent / "images"
    argv = ["bench", "--set", f"{captions}={pictures}", "--device", "cpu", "--json"]
    models = ["--model", "hf-hub:me/mirror", "--model", str(doors[0])]
    with serving():
        for name, value in constants_of(Host.port, tmp_path / "home").items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert main([*argv, *models]) == 0
        found = json.loads(capsys.readouterr().out)
        rows = {row["model"]: row for row in found["tables"][0]["rows"]}
        one, other = (rows.pop(name) for name in models[1::2])
        assert one | {"model": ""} == other | {"model": ""} and one["mR"] > 0
        assert main([*argv, "--model", "hf-hub:me/other"]) == 1
    assert "me/other is not on this machine" in capsys.readouterr().err


def written_captions(data, path):
    """The table of a set as a CSV file."""
    of = data.table.images.set_index("image_id")
    rows = data.table.captions.join(of, on="image_id")[["file", "text", "split"]]
    rows.set_axis(["image", "caption", "split"], axis=1).to_csv(path, index=False)
    return path


def from_files(folder) -> np.ndarray:
    return np.load(folder / "images.npy") @ np.load(folder / "texts.npy").T


def clip_input():
    from nbhelpers.towers import backbones

    return backbones.clip_size("clip_standin").image


def test_both_exports_open_in_their_own_libraries(doors, start):
    import open_clip
    from transformers import AutoProcessor, CLIPModel

    own = clip_files.starting_clip(start).clip
    theirs = open_clip.create_model(f"local-dir:{doors[0]}").eval()
    words = open_clip.get_tokenizer(f"local-dir:{doors[0]}")(["Many Boats  in a harbor."])
    pixels = torch.rand(2, 3, 112, 112)
    other = CLIPModel.from_pretrained(doors[1]).eval()
    read = AutoProcessor.from_pretrained(doors[1])(
        text=["Many Boats  in a harbor."], return_tensors="pt"
    )
    with torch.inference_mode():
        assert torch.equal(theirs.encode_image(pixels), own.encode_image(pixels))
        right = own.encode_text(words)
        torch.testing.assert_close(other.get_text_features(**read).pooler_output, right)
        torch.testing.assert_close(
            other.get_image_features(pixel_values=pixels).pooler_output, own.encode_image(pixels)
        )


def test_the_command_exports_the_clip_of_a_run(start, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    assert main(["weights", "export", "--start", str(start), "--open-clip", str(folder)]) == 0
    said = capsys.readouterr().out
    model = said.split("--model ")[1].strip().removesuffix(".")
    assert any_model.open_model(model).encode_texts(["A field."]).shape == (1, 64)
    assert main(["weights", "export", "--start", str(start), "--open-clip", str(folder)]) == 1
    assert "exists; name a folder that does not" in capsys.readouterr().err
    assert main(["weights", "export", "--start", str(start)]) == 1
    assert "--open-clip or --hugging-face" in capsys.readouterr().err


def test_a_clip_on_towers_of_packages_has_no_public_form(tmp_path):
    begin = replace(package_start(), options={"clip": "clip_compact"})
    with pytest.raises(UserError, match="has no CLIP"):
        clip_files.export(begin.write(tmp_path / "start.json"), tmp_path / "out")
    model = CLIP(CLIPConfig.compact()).clip
    from nbhelpers.towers import clip_exports

    with pytest.raises(UserError, match="efficientnet_lite0 and minilm.*tiny or paper"):
        clip_exports.write_open_clip(model, "clip_compact", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Counting:
    """A model that counts what it encodes, and stops after `most` images."""

    def __init__(self, most=10**9, name="counting", digest="d"):
        self.seen, self.most = 0, most
        self.model = any_model.AnyModel(name, digest, self.images, self.texts, {})

    def images(self, pictures):
        self.seen += len(pictures)
        if self.seen > self.most:
            raise KeyboardInterrupt
        return np.array([[*np.asarray(one).mean((0, 1)), 1 / 3] for one in pictures])

    def texts(self, texts):
        self.seen += len(texts)
        return np.array([[len(text), 1, 2, 1 / 3] for text in texts])


def test_distinct_images_and_captions_pass_once_and_are_kept(data, options):
    counting, table = Counting(), data.table
    first = encode(counting.model, table, options)
    distinct = len(set(data.pixels.digests)) + table.captions.text.nunique()
    assert counting.seen == distinct
    again = encode(counting.model, table, options)
    assert counting.seen == distinct, "a second encoding reads what is kept"
    assert np.array_equal(first.images, again.images) and first.images.dtype == np.float32
    right = counting.model.encode_texts(list(table.captions.text))
    assert np.array_equal(again.texts, right), "vectors are kept in all their bits"
    for change in ({"prompt": "a photo of {}"}, {"precision": "bf16"}):
        before = counting.seen
        encode(counting.model, table, replace(options, **change))
        assert counting.seen > before
    other = Counting(digest="e")
    encode(other.model, table, options)
    assert other.seen == distinct, "another model has vectors of its own"


def test_an_interrupted_encoding_goes_on(data, options):
    options = replace(options, batch=8)
    stopped = Counting(most=20)
    with pytest.raises(KeyboardInterrupt):
        encode(stopped.model, data.table, options)
    goes_on = Counting()
    found = encode(goes_on.model, data.table, options)
    images = len(set(data.pixels.digests))
    assert goes_on.seen == images - 16 + data.table.captions.text.nunique()
    whole = encode(Counting(digest="e").model, data.table, options)
    assert np.array_equal(found.images, whole.images)


def test_vectors_of_functions_are_not_kept(data, options):
    counting = Counting(digest="")
    encode(counting.model, data.table, options)
    before = counting.seen
    encode(counting.model, data.table, options)
    assert counting.seen == 2 * before


def test_captions_of_equal_tokens_have_equal_rows(data, doors, options):
    images = data.table.images[:2]
    texts = ["A red field.", "a  RED field."]
    captions = data.table.captions[:2].assign(image_id=list(images.image_id), text=texts)
    found = encode(str(doors[0]), CaptionTable("two", images, captions), options)
    assert np.array_equal(found.texts[0], found.texts[1])


def test_pictures_may_be_a_folder_and_rows_follow_the_table(data, doors, options, tmp_path):
    folder = data.pixels.folder.parent.parent / "images"
    table = data.table.split("val")
    turned = CaptionTable("turned", table.images[::-1], table.captions[::-1])
    one = encode(str(doors[0]), table, options)
    other = encode(str(doors[0]), turned, replace(options, pictures=folder))
    np.testing.assert_allclose(one.images[::-1], other.images, atol=1e-6)
    np.testing.assert_allclose(one.texts[::-1], other.texts, atol=1e-6)


def test_a_dual_encoder_of_this_project_is_a_model_like_any_other(data, start, options, tmp_path):
    from nbhelpers.systems.trained_systems import System

    begin, model = Start.read(start), clip_files.starting_clip(start)
    system = System("pe_rsitr", model, begin.read_tokenizer(), clip_input(), {}, tmp_path)
    own = RetrievalTask(data, begin.read_tokenizer(), clip_input()).embeddings(model, "test")
    table = data.table.split("test")
    found = encode(bench_models.of_system("pe_rsitr", system), table, options)
    np.testing.assert_allclose(found.images, own.images, atol=2e-6)
    np.testing.assert_allclose(found.texts, own.texts, atol=2e-6)
    pictures = [Image.fromarray(data.pixels[0])]
    np.testing.assert_allclose(
        system.encode_images([data.pixels[0]]),
        bench_models.of_system("pe_rsitr", system).encode_images(pictures),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("bita", "writes captions and embeds nothing"),
        ("cfitr=some.pth", "eval --system cfitr"),
        ("pir=/no/such.pth", "no weight file /no/such.pth"),
        ("pri", "There is no model 'pri'.*Did you mean pir"),
        ("pir=", "'pir=' is one half of NAME=FILE; write the name of a network"),
        ("clip= ", "one half of NAME=FILE"),
        ("ViT-B-32=", "one half of NAME=FILE"),
        ("=some.pth", "one half of NAME=FILE"),
        (" ", "The name of the model is empty"),
    ],
)
def test_systems_that_embed_nothing_and_wrong_names(spec, says):
    with pytest.raises(UserError, match=says):
        bench_models.open_any(spec)


def test_towers_of_different_widths_are_refused(data, options):
    counting = Counting()
    unlike = replace(counting.model, texts=lambda texts: np.ones((len(texts), 7)), name="unlike")
    with pytest.raises(UserError, match="unlike gives 4 numbers for an image and 7 for a text"):
        encode(unlike, data.table.split("val"), options)


def test_options_that_cannot_be_used(data, options):
    table = data.table.split("val")
    for change, says in [
        ({"precision": "fp16"}, "needs a CUDA GPU"),
        ({"batch": 0}, "encode at least 1"),
        ({"prompt": "no place"}, "write {} once"),
    ]:
        with pytest.raises(UserError, match=says):
            encode(Counting().model, table, replace(options, **change))
