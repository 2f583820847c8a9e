"""A checkpoint in use: loaded with what it is fed, and evaluated on a folder of images and a caption file."""
from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import nbhelpers
from nbhelpers import backbones, recall, records, systems, weights
from nbhelpers.__main__ import main
from nbhelpers.data import layouts, scenes
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.images import DecodedCache, ImageStore, decode, resize
from nbhelpers.data.loading import CLIPTokenizer, train_tokenizer
from nbhelpers.errors import UserError
from nbhelpers.papers import cfitr, pe_rsitr, pir, pir_clip
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.retrieval import RetrievalTask
from nbhelpers.starting import Start, Tower


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("systems")


@pytest.fixture(scope="module")
def captions(folder):
    """24 generated images, 8 of them in each split, five captions each."""
    return scenes.write_dataset(folder / "scenes", 24)


@pytest.fixture(scope="module")
def pictures(captions):
    return captions.parent / "images"


@pytest.fixture(scope="module")
def table(captions):
    return layouts.read(captions)


@pytest.fixture(scope="module")
def words(table, folder):
    """A Start that brings a tokenizer alone, and which its towers do not change."""
    path = train_tokenizer(list(table.captions.text), folder / "run/starting/scenes-tokenizer.json")
    return Start(str(path), 32, {}, fixed=True)


def save(folder, name, model, **meta):
    """A checkpoint where a run would keep it."""
    path = folder / "run/checkpoints" / name / "model.safetensors"
    state = {key: value for key, value in model.state_dict().items()}
    return weights.save_checkpoint(path, state, {"system": name, "model": asdict(model.config)} | meta)


@pytest.fixture(scope="module")
def checkpoint(words, folder):
    """A PIR on stand-in towers and its start."""
    words.write(folder / "run/starting/pir-seed0.json")
    torch.manual_seed(0)
    tokenizer = words.read_tokenizer()
    return save(folder, "pir", pir.PIR(pir.PIRConfig.tiny(tokenizer.vocab_size)), tokenizer=tokenizer.sha256)


@pytest.fixture
def trained(checkpoint):
    return nbhelpers.load("pir", checkpoint)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))


def put(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images}))
    return path


def listed(captions, split="test"):
    return [image for image in json.loads(captions.read_text())["images"] if image["split"] == split]


# ---- load ----------------------------------------------------------------------------------------------------------------
def test_a_system_encodes_as_the_evaluation_of_the_notebooks_does(trained, checkpoint, table, pictures, words, tmp_path):
    files = list(table.images.file)
    data = DataSet(table, DecodedCache.build(ImageStore.open(pictures), files, tmp_path), None, [])
    model = pir.read(checkpoint)[0]
    expected = RetrievalTask(data, words.read_tokenizer(), backbones.image_input("swin_standin")).embeddings(model, "test")
    test = table.split("test")
    store = ImageStore.open(pictures)
    paths = [pictures / store.locate(file) for file in test.images.file]
    found = trained.encode_images(paths), trained.encode_texts(list(test.captions.text))
    assert found[0].dtype == np.float32 and found[0].shape == (8, 64) and found[1].shape == (40, 64)
    np.testing.assert_allclose(found[0], expected.images, atol=1e-6)
    np.testing.assert_allclose(found[1], expected.texts, atol=1e-6)
    np.testing.assert_allclose(trained.encode_images([decode(path.read_bytes(), "") for path in paths]), found[0], atol=1e-6)


def test_batches_change_nothing_and_sizes_may_differ(trained, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 130, 90, 3), dtype=np.uint8)
    mixed = [*pixels[:3], pixels[3, :50], resize(pixels[4], 112)]
    whole = trained.encode_images(mixed), trained.encode_texts(["a pond", "", "two"])
    monkeypatch.setattr(systems, "BATCH", 2)
    for one, other in zip(whole, (trained.encode_images(mixed), trained.encode_texts(["a pond", "", "two"]))):
        np.testing.assert_allclose(one, other, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)


def test_what_cannot_be_encoded(trained, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    for wrong, words in ((tmp_path / "a.png", "a.png is not an image file"), (tmp_path / "b.png", "b.png cannot be read")):
        with pytest.raises(UserError, match=words):
            trained.encode_images([wrong])
    for encode in (trained.encode_images, trained.encode_texts):
        with pytest.raises(UserError, match="nothing to encode"):
            encode([])


def test_wrong_checkpoints(checkpoint, folder, tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    other = save(folder, "pir_clip", pir_clip.PIRCLIP(pir_clip.PIRCLIPConfig.tiny()))
    for arguments, words in (
            (("pire", checkpoint), "no system 'pire'; choose one of pir, pir_clip"),
            (("pir", tmp_path / "none.safetensors"), "no weight file .*none.safetensors"),
            (("pir", tmp_path), "holds none of model.safetensors"),
            (("pir", tmp_path / "text.pt"), "text.pt"),
            (("pir", other), "checkpoint of something else .system: file 'pir_clip', wanted 'pir'"),
            (("pir_clip", checkpoint), "checkpoint of something else .system: file 'pir', wanted 'pir_clip'")):
        with pytest.raises(UserError, match=words):
            nbhelpers.load(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there(checkpoint):
    with pytest.raises(UserError, match="device is 'cuda', but torch sees no CUDA device"):
        nbhelpers.load("pir", checkpoint, device="cuda")


def test_the_tokenizer_of_a_stand_in_is_that_of_its_run(checkpoint, words, folder, tmp_path):
    moved = Path(shutil.copy(checkpoint, tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="0 starts that may be its own; name the file that 12_starting_weights wrote"):
        nbhelpers.load("pir", moved)
    own = folder / "run/starting/pir-seed0.json"
    assert nbhelpers.load("pir", moved, own).tokenizer.sha256 == words.read_tokenizer().sha256
    other = Start(str(train_tokenizer(["of another set"], tmp_path / "tokenizer.json")), 32, {}, fixed=True)
    with pytest.raises(UserError, match="trained with another tokenizer than that of .*other.json"):
        nbhelpers.load("pir", moved, other.write(tmp_path / "other.json"))
    beside = other.write(own.with_name("pir-seed00.json"))  # comes first by name
    try:
        assert nbhelpers.load("pir", checkpoint).tokenizer.sha256 == words.read_tokenizer().sha256
    finally:
        beside.unlink()


def test_a_release_of_the_authors_loads_too(checkpoint, trained, folder):
    path = folder / "run/checkpoints/release/checkpoint_best.pth"
    path.parent.mkdir(exist_ok=True)
    pir.write_release(pir.read(checkpoint)[0], path)
    released = nbhelpers.load("pir", path)
    assert released.about["release"]
    assert np.array_equal(released.encode_texts(["a pond"]), trained.encode_texts(["a pond"]))


# ---- retrieve ------------------------------------------------------------------------------------------------------------
def test_every_image_and_caption_of_the_split_counts(trained, captions, pictures, table):
    found = systems.retrieve(trained, captions, pictures)
    test = table.split("test")
    assert found.table.fingerprint() == test.fingerprint()
    store = ImageStore.open(pictures)
    images = trained.encode_images([store.read(file) for file in test.images.file])
    similarity = images @ trained.encode_texts(list(test.captions.text)).T
    for ties in ("expectation", "released"):
        expected = recall.evaluate(similarity, test.owner(), ties=ties)
        result, frame = found.results(ties)["pir"], found.recalls(ties)
        assert len(result.i2t_ranks) == 8 and len(result.t2i_ranks) == 40
        assert result.metrics == pytest.approx(expected.metrics)
        assert frame.loc["pir", "mR"] == pytest.approx(expected.metrics["mR"])
        assert frame.loc["pir", "mR low"] <= frame.loc["pir", "mR"] <= frame.loc["pir", "mR high"]
        assert frame.loc["chance", "t2i_R@1"] == pytest.approx(100 / 8)
        assert list(frame.index) == ["pir", "chance"] + ["ceiling"] * (ties == "expectation")


def test_one_caption_for_each_image_is_a_caption_and_not_its_letters(trained, captions, pictures, tmp_path):
    images = listed(captions)
    for image in images:
        image["sentences"] = image["sentences"][:1]
    result = systems.retrieve(trained, put(tmp_path / "dataset.json", images), pictures).results("expectation")["pir"]
    texts = trained.encode_texts([image["sentences"][0]["raw"] for image in images])
    store = ImageStore.open(pictures)
    similarity = trained.encode_images([store.read(image["filename"]) for image in images]) @ texts.T
    assert result.metrics == pytest.approx(recall.evaluate(similarity, np.arange(8)).metrics)


def test_an_image_that_is_listed_twice_counts_once_with_all_its_captions(trained, captions, pictures, tmp_path):
    images = listed(captions)
    first, second = (images[0] | {"sentences": images[0]["sentences"][part]} for part in (slice(2), slice(2, 5)))
    found = systems.retrieve(trained, put(tmp_path / "dataset.json", [first, *images[1:], second]), pictures)
    assert len(found.table) == 8 and len(found.table.captions) == 40 and "1 images were listed again" in found.notes[0]
    whole = systems.retrieve(trained, captions, pictures)
    assert found.table.fingerprint() == whole.table.fingerprint()
    assert found.results("expectation")["pir"].metrics == pytest.approx(whole.results("expectation")["pir"].metrics)
    with pytest.raises(UserError, match="listed twice"):  # anywhere else it is a mistake
        layouts.read(tmp_path / "dataset.json")
    with pytest.raises(UserError, match="listed twice"):  # and in two splits it is one here too
        systems.retrieve(trained, put(tmp_path / "dataset.json", [*images, first | {"split": "train"}]), pictures)


def test_a_gallery_of_one_image(trained, captions, pictures, tmp_path):
    frame = systems.retrieve(trained, put(tmp_path / "dataset.json", listed(captions)[:1]), pictures).recalls()
    assert (frame.loc["pir"] == 100).all() and (frame.loc["chance"].dropna() == 100).all()


def test_what_cannot_be_evaluated(trained, captions, pictures, tmp_path):
    images = listed(captions)
    lost = [images[0] | {"filename": "lost_1.jpg"}, *images[1:]]
    for arguments, words in (
            ((captions, pictures, "dev"), "no image in split 'dev'; it has test, train, val"),
            ((put(tmp_path / "train.json", listed(captions, "train")), pictures), "no image in split 'test'"),
            ((put(tmp_path / "dataset.json", lost), pictures), "lost_1.jpg is not in .*images"),
            ((put(tmp_path / "strange.json", "pond"), pictures), "none of the known layouts"),
            ((tmp_path / "none.json", pictures), "none.json does not exist"),
            ((captions, tmp_path / "none"), "none does not exist; name the folder, zip or tar")):
        with pytest.raises(UserError, match=words):
            systems.retrieve(trained, *arguments)


def test_an_image_outside_the_split_may_be_missing(trained, captions, pictures, tmp_path):
    store = ImageStore.open(pictures)
    for image in listed(captions):
        name = store.locate(image["filename"])
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(pictures / name, tmp_path / "images" / name)
    assert len(systems.retrieve(trained, captions, tmp_path / "images").table) == 8


# ---- the other systems ---------------------------------------------------------------------------------------------------
def test_pir_clip(captions, pictures, folder):
    torch.manual_seed(0)
    model = pir_clip.PIRCLIP(pir_clip.PIRCLIPConfig.tiny()).eval()
    system = nbhelpers.load("pir_clip", save(folder, "pir_clip", model))
    assert isinstance(system.tokenizer, CLIPTokenizer) and system.tokenizer.max_length == 40 and system.image.size == 112
    with torch.inference_mode():
        expected = model.encode_texts(*CLIPTokenizer(40)(["A pond.", "two"]))
    np.testing.assert_allclose(system.encode_texts(["A pond.", "two"]), expected, atol=1e-6)
    assert systems.retrieve(system, captions, pictures).recalls().loc["pir_clip", "mR"] > 0


def test_pe_rsitr_stands_on_the_clip_of_its_start(captions, pictures, folder, tmp_path):
    torch.manual_seed(0)
    base = CLIP(CLIPConfig.tiny())
    path = weights.save_checkpoint(tmp_path / "clip", base.clip, {})
    start = Start("clip", 40, {"clip": Tower.stand_in("clip", path, "a test")}, fixed=True, options={"clip": "clip_standin"})
    model = start.build(lambda: pe_rsitr.PERSITR(pe_rsitr.PERSITRConfig.tiny()), seed=1).eval()
    checkpoint = save(folder, "pe_rsitr", model)
    with pytest.raises(UserError, match="0 starts that may be its own"):
        nbhelpers.load("pe_rsitr", checkpoint)
    system = nbhelpers.load("pe_rsitr", checkpoint, start.write(tmp_path / "start.json"))
    assert torch.equal(system.model.clip.token_embedding.weight, base.clip.token_embedding.weight)
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    assert np.array_equal(system.encode_images([pixels]),
                          systems.System("", model, system.tokenizer, system.image, {}, path).encode_images([pixels]))
    assert systems.retrieve(system, captions, pictures).recalls().loc["pe_rsitr", "mR"] > 0


def test_cfitr_is_evaluated_in_its_two_stages(captions, pictures, words, folder, monkeypatch):
    from nbhelpers import search

    torch.manual_seed(0)
    words.write(folder / "run/starting/cfitr-seed0.json")
    tokenizer = words.read_tokenizer()
    model = cfitr.CFITR(cfitr.CFITRConfig.tiny(tokenizer.vocab_size)).eval()
    system = nbhelpers.load("cfitr", save(folder, "cfitr", model, tokenizer=tokenizer.sha256))
    found = systems.retrieve(system, captions, pictures)
    frame = found.recalls("released")
    assert list(frame.index) == ["cfitr, coarse", "cfitr", "chance"]
    coarse, fine = found.results("expectation").values()
    assert not np.array_equal(coarse.t2i_ranks, fine.t2i_ranks)  # every image is a candidate: reranked by the single stream
    monkeypatch.setattr(search, "K", 1)
    only = systems.retrieve(system, captions, pictures).results("expectation")["cfitr"]
    assert (only.t2i_hits[:, 0] == only.t2i_hits[:, -1]).all()  # of one candidate nothing is found further down


# ---- the command line ----------------------------------------------------------------------------------------------------
def arguments(checkpoint, captions, pictures, *more):
    return ["retrieve", "--system", "pir", "--checkpoint", str(checkpoint), "--captions", str(captions), "--images", str(pictures),
            *more]


def test_the_table_is_printed_and_the_record_written(checkpoint, captions, pictures, trained, tmp_path, capsys):
    assert main(arguments(checkpoint, captions, pictures, "--out", str(tmp_path / "out"), "--split", "val")) == 0
    out, err = capsys.readouterr()
    frame = systems.retrieve(trained, captions, pictures, "val").recalls()
    assert err == "" and "val: 8 images, 40 captions; recalls in percent, ties by expectation" in out
    row = next(line for line in out.splitlines() if line.startswith("pir")).split()
    assert row[1:] == [f"{value:.2f}" for value in frame.loc["pir"]]
    record, = records.read(tmp_path / "out")
    assert record["metrics"]["expectation"]["mR"] == frame.loc["pir", "mR"] and record["protocol"]["split"] == "val"
    assert record["weights"][0]["sha256"] == weights.sha256(checkpoint) and set(record["metrics"]) == set(recall.TIES)
    assert record["intervals"]["mR"] == [frame.loc["pir", "mR low"], frame.loc["pir", "mR high"]]
    result, owner = records.read_recall(tmp_path / "out" / "retrieve-seed0-pir.json")
    assert result.metrics["mR"] == frame.loc["pir", "mR"] and len(owner) == 40


def test_the_released_rule_can_be_asked_for(checkpoint, captions, pictures, trained, tmp_path, capsys):
    assert main(arguments(checkpoint, captions, pictures, "--ties", "released", "--out", str(tmp_path / "out"))) == 0
    out = capsys.readouterr().out
    assert "ties by released" in out and "ceiling" not in out
    record, = records.read(tmp_path / "out")
    assert record["protocol"]["ties"] == "released"


def test_a_mistake_is_one_line_and_leaves_nothing(checkpoint, captions, pictures, tmp_path, capsys):
    wrong = ["--split", "dev", "--out", str(tmp_path / "out")]
    assert main(arguments(checkpoint, captions, pictures, *wrong)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no image in split 'dev'" in err and not (tmp_path / "out").exists()
