"""A checkpoint in use: loaded with what it is fed, and evaluated on a folder of images and a
caption file.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from closeness import assert_close
from PIL import Image
from release_files import write_release

import nbhelpers
from nbhelpers.__main__ import main
from nbhelpers.data import layouts
from nbhelpers.data.archives import open_images
from nbhelpers.data.catalog import DataSet
from nbhelpers.data.decoding import decode
from nbhelpers.data.images import resize
from nbhelpers.data.pixel_cache import DecodedCache
from nbhelpers.data.scenes import generate
from nbhelpers.data.table import CaptionTable
from nbhelpers.data.tokenization import CLIPTokenizer, train_tokenizer
from nbhelpers.errors import UserError
from nbhelpers.metrics import caption_scores, recall
from nbhelpers.papers import bita, cfitr, pe_rsitr, pir, pir_clip
from nbhelpers.papers.clip import CLIP, CLIPConfig
from nbhelpers.results import records
from nbhelpers.runs.start import Run
from nbhelpers.systems import evaluation, image_folder, trained_systems
from nbhelpers.tasks import (
    caption_stages,
    caption_tokens,
    captioning,
    retrieval,
    stand_ins,
    two_stage,
)
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.towers import backbones, checkpoints
from nbhelpers.towers.starting_weights import Start, Tower


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("systems")


@pytest.fixture(scope="module")
def captions(folder):
    """24 generated images, 8 of them in each split, five captions each."""
    return generate.write_dataset(folder / "scenes", 24)


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
    return checkpoints.save_checkpoint(
        path, model, {"system": name, "model": asdict(model.config)} | meta
    )


@pytest.fixture(scope="module")
def checkpoint(words, folder):
    """A PIR on stand-in towers and its start."""
    words.write(folder / "run/starting/pir-seed0.json")
    torch.manual_seed(0)
    tokenizer = words.read_tokenizer()
    return save(
        folder, "pir", pir.PIR(pir.PIRConfig.tiny(tokenizer.vocab_size)), tokenizer=tokenizer.sha256
    )


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
    return [
        image for image in json.loads(captions.read_text())["images"] if image["split"] == split
    ]


# ---- load
def test_a_system_encodes_as_the_evaluation_of_the_notebooks_does(
    trained, checkpoint, table, pictures, words, tmp_path
):
    files = list(table.images.file)
    data = DataSet(table, DecodedCache.build(open_images(pictures), files, tmp_path), None, [])
    model = pir.read(checkpoint)[0]
    expected = RetrievalTask(
        data, words.read_tokenizer(), backbones.image_input("swin_standin")
    ).embeddings(model, "test")
    test = table.split("test")
    store = open_images(pictures)
    paths = [pictures / store.locate(file) for file in test.images.file]
    found = trained.encode_images(paths), trained.encode_texts(list(test.captions.text))
    assert found[0].dtype == np.float32 and found[0].shape == (8, 64) and found[1].shape == (40, 64)
    assert_close(found[0], expected.images)
    assert_close(found[1], expected.texts)
    assert_close(trained.encode_images([decode(path.read_bytes(), "") for path in paths]), found[0])


def test_batches_change_nothing_and_sizes_may_differ(trained, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 130, 90, 3), dtype=np.uint8)
    mixed = [*pixels[:3], pixels[3, :50], resize(pixels[4], 112)]
    whole = trained.encode_images(mixed), trained.encode_texts(["a pond", "", "two"])
    monkeypatch.setattr(trained_systems, "BATCH", 2)
    for one, other in zip(
        whole,
        (trained.encode_images(mixed), trained.encode_texts(["a pond", "", "two"])),
        strict=True,
    ):
        assert_close(one, other)
        assert_close(np.linalg.norm(one, axis=1), np.ones(len(one)))


def test_what_cannot_be_encoded(trained, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    for wrong, words in (
        (tmp_path / "a.png", "a.png is not an image file"),
        (tmp_path / "b.png", "b.png does not exist; check the path"),
    ):
        with pytest.raises(UserError, match=words):
            trained.encode_images([wrong])
    for encode in (trained.encode_images, trained.encode_texts):
        with pytest.raises(UserError, match="nothing to encode"):
            encode([])


def test_embeddings_that_are_not_finite_are_ranked_nowhere(trained, captions, pictures, tmp_path):
    with torch.no_grad():
        trained.model.vision_proj.weight[0] = torch.nan
        trained.model.text_proj.weight[0] = torch.nan
    picture = np.zeros((112, 112, 3), np.uint8)
    for ask in (
        lambda: trained.encode_images([picture]),
        lambda: trained.encode_texts(["a pond"]),
        lambda: image_folder.search(trained, pictures, "a green pond"),
    ):
        with pytest.raises(UserError, match="by pir of .*model.safetensors hold NaN or infinity"):
            ask()
    with pytest.raises(UserError, match="The embeddings hold NaN or infinity"):
        evaluation.evaluate(trained, captions, pictures, cache=tmp_path)


def test_advice_fp32_or_another_checkpoint_lets_a_search_rank(trained, checkpoint, pictures):
    trained.model.vision_proj.weight.data *= 1e6  # beyond what 16 bits hold
    advice = "give another checkpoint, or compute in fp32, outside torch.autocast."
    with torch.autocast("cpu", torch.float16), pytest.raises(UserError, match=advice):
        image_folder.search(trained, pictures, "a green pond")
    assert image_folder.search(trained, pictures, "a green pond").score.notna().all()
    trained.model.vision_proj.weight.data[0] = torch.nan
    with pytest.raises(UserError, match=advice):
        image_folder.search(trained, pictures, "a green pond")
    another = nbhelpers.load("pir", checkpoint)
    assert image_folder.search(another, pictures, "a green pond").score.notna().all()


def test_weights_that_are_not_finite_are_one_line_at_the_command(
    checkpoint, pictures, tmp_path, capsys
):
    state, about = checkpoints.load_checkpoint(checkpoint)
    state["vision_proj.weight"][0] = torch.nan
    broken = checkpoints.save_checkpoint(tmp_path / "nan.safetensors", state, about)
    assert (
        main(
            [
                "search",
                "--system",
                "pir",
                "--checkpoint",
                str(broken),
                "--images",
                str(pictures),
                "--text",
                "a red field",
            ]
        )
        == 1
    )
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.count("\n") == 1
        and "nan.safetensors: 'vision_proj.weight' holds NaN or infinity" in err
    )


def test_wrong_checkpoints(checkpoint, folder, tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    other = save(folder, "pir_clip", pir_clip.PIRCLIP(pir_clip.PIRCLIPConfig.tiny()))
    for arguments, words in (
        (("pire", checkpoint), "no system 'pire'; choose one of pir, pir_clip"),
        (("pir", tmp_path / "none.safetensors"), "no weight file .*none.safetensors"),
        (("pir", tmp_path), "holds none of model.safetensors"),
        (("pir", tmp_path / "text.pt"), "text.pt"),
        (("pir", other), "checkpoint of something else .system: file 'pir_clip', wanted 'pir'"),
        (
            ("pir_clip", checkpoint),
            "checkpoint of something else .system: file 'pir', wanted 'pir_clip'",
        ),
    ):
        with pytest.raises(UserError, match=words):
            nbhelpers.load(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there(checkpoint):
    with pytest.raises(UserError, match="device is 'cuda', but torch sees no CUDA device"):
        nbhelpers.load("pir", checkpoint, device="cuda")


def test_the_tokenizer_of_a_stand_in_is_that_of_its_run(checkpoint, words, folder, tmp_path):
    moved = Path(shutil.copy(checkpoint, tmp_path / "model.safetensors"))
    with pytest.raises(
        UserError,
        match="0 starts that may be its own; name the file that 12_starting_weights wrote",
    ):
        nbhelpers.load("pir", moved)
    own = folder / "run/starting/pir-seed0.json"
    assert nbhelpers.load("pir", moved, own).tokenizer.sha256 == words.read_tokenizer().sha256
    other = Start(
        str(train_tokenizer(["of another set"], tmp_path / "tokenizer.json")), 32, {}, fixed=True
    )
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
    write_release(pir.read(checkpoint)[0], path)
    released = nbhelpers.load("pir", path)
    assert released.about["release"]
    assert np.array_equal(released.encode_texts(["a pond"]), trained.encode_texts(["a pond"]))


# ---- evaluate
def test_every_image_and_caption_of_the_split_counts(trained, captions, pictures, table):
    found = evaluation.evaluate(trained, captions, pictures)
    test = table.split("test")
    assert found.table.fingerprint() == test.fingerprint()
    store = open_images(pictures)
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


def test_one_caption_for_each_image_is_a_caption_and_not_its_letters(
    trained, captions, pictures, tmp_path
):
    images = listed(captions)
    for image in images:
        image["sentences"] = image["sentences"][:1]
    result = evaluation.evaluate(trained, put(tmp_path / "dataset.json", images), pictures).results(
        "expectation"
    )["pir"]
    texts = trained.encode_texts([image["sentences"][0]["raw"] for image in images])
    store = open_images(pictures)
    similarity = (
        trained.encode_images([store.read(image["filename"]) for image in images]) @ texts.T
    )
    assert result.metrics == pytest.approx(recall.evaluate(similarity, np.arange(8)).metrics)


def test_an_image_that_is_listed_twice_counts_once_with_all_its_captions(
    trained, captions, pictures, tmp_path
):
    images = listed(captions)
    first, second = (
        images[0] | {"sentences": images[0]["sentences"][part]} for part in (slice(2), slice(2, 5))
    )
    found = evaluation.evaluate(
        trained, put(tmp_path / "dataset.json", [first, *images[1:], second]), pictures
    )
    assert (
        len(found.table) == 8
        and len(found.table.captions) == 40
        and "1 images were listed again" in found.notes[0]
    )
    whole = evaluation.evaluate(trained, captions, pictures)
    assert found.table.fingerprint() == whole.table.fingerprint()
    assert found.results("expectation")["pir"].metrics == pytest.approx(
        whole.results("expectation")["pir"].metrics
    )
    with pytest.raises(UserError, match="listed twice"):  # anywhere else it is a mistake
        layouts.read(tmp_path / "dataset.json")
    # and in two splits it is one here too
    with pytest.raises(UserError, match="into a second split"):
        evaluation.evaluate(
            trained, put(tmp_path / "dataset.json", [*images, first | {"split": "train"}]), pictures
        )


def test_a_gallery_of_one_image(trained, captions, pictures, tmp_path):
    frame = evaluation.evaluate(
        trained, put(tmp_path / "dataset.json", listed(captions)[:1]), pictures
    ).recalls()
    assert (frame.loc["pir"] == 100).all() and (frame.loc["chance"].dropna() == 100).all()


def test_what_cannot_be_evaluated(trained, captions, pictures, tmp_path):
    images = listed(captions)
    lost = [images[0] | {"filename": "lost_1.jpg"}, *images[1:]]
    for arguments, words in (
        ((captions, pictures, "dev"), "no image in split 'dev'; it has test, train, val"),
        (
            (put(tmp_path / "train.json", listed(captions, "train")), pictures),
            "no image in split 'test'",
        ),
        ((put(tmp_path / "dataset.json", lost), pictures), "lost_1.jpg is not in .*images"),
        ((put(tmp_path / "strange.json", "pond"), pictures), "none of the known layouts"),
        ((tmp_path / "none.json", pictures), "none.json does not exist"),
        ((captions, tmp_path / "none"), "none does not exist; name the folder, zip or tar"),
    ):
        with pytest.raises(UserError, match=words):
            evaluation.evaluate(trained, *arguments)


def test_an_image_outside_the_split_may_be_missing(trained, captions, pictures, tmp_path):
    store = open_images(pictures)
    for image in listed(captions):
        name = store.locate(image["filename"])
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(pictures / name, tmp_path / "images" / name)
    assert len(evaluation.evaluate(trained, captions, tmp_path / "images").table) == 8


# ---- the other systems
def test_pir_clip(captions, pictures, folder):
    torch.manual_seed(0)
    model = pir_clip.PIRCLIP(pir_clip.PIRCLIPConfig.tiny()).eval()
    system = nbhelpers.load("pir_clip", save(folder, "pir_clip", model))
    assert (
        isinstance(system.tokenizer, CLIPTokenizer)
        and system.tokenizer.max_length == 40
        and system.image.size == 112
    )
    with torch.inference_mode():
        expected = model.encode_texts(*CLIPTokenizer(40)(["A pond.", "two"]))
    assert_close(system.encode_texts(["A pond.", "two"]), expected)
    assert evaluation.evaluate(system, captions, pictures).recalls().loc["pir_clip", "mR"] > 0


def clip_start(folder) -> Start:
    """A Start that brings a CLIP of random weights."""
    torch.manual_seed(0)
    base = CLIP(CLIPConfig.tiny())
    path = checkpoints.save_checkpoint(folder / "clip", base.clip, {})
    return Start(
        "clip",
        40,
        {"clip": Tower.stand_in("clip", path, "a test")},
        fixed=True,
        options={"clip": "clip_standin"},
    )


def system_files(name, folder, checkpoint):
    """The checkpoint of a dual encoder in a run of its own, which brings what it needs."""
    if name == "pir":
        return checkpoint
    torch.manual_seed(0)
    if name == "pir_clip":
        return save(folder, name, pir_clip.PIRCLIP(pir_clip.PIRCLIPConfig.tiny()))
    start = clip_start(folder)
    start.write(folder / "run/starting/pe_rsitr-seed0.json")
    model = start.build(lambda: pe_rsitr.PERSITR(pe_rsitr.PERSITRConfig.tiny()), seed=1)
    return save(folder, name, model)


@pytest.mark.parametrize("name", ["pir", "pir_clip", "pe_rsitr"])
def test_bench_of_a_checkpoint_gives_our_own_evaluation(
    name, checkpoint, captions, pictures, tmp_path, capsys
):
    path = system_files(name, tmp_path, checkpoint)
    own = evaluation.evaluate(nbhelpers.load(name, path, device="cpu"), captions, pictures)
    model, of = f"{name}={path}", f"{captions}={pictures}"
    assert main(["bench", "--model", model, "--set", of, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = {row["model"]: row for row in found["tables"][0]["rows"]}[model]
    right = own.results("expectation")[name].metrics
    recalls = [key for key in right if "_R@" in key or key == "mR"]
    assert len(recalls) == 7
    assert [row[key] for key in recalls] == pytest.approx([right[key] for key in recalls])
    record = records.read_checked(found["records"][0])
    assert record["metrics"]["expectation"]["mR"] == pytest.approx(right["mR"], abs=1e-9)
    argv = ["eval", "--system", name, "--checkpoint", str(path), "--captions", str(captions)]
    assert main([*argv, "--images", str(pictures), "--device", "cpu", "--json"]) == 0
    short = {row["name"]: row for row in json.loads(capsys.readouterr().out)["recalls"]}[name]
    assert short["mR"] == pytest.approx(row["mR"], abs=1e-9)


def test_pe_rsitr_stands_on_the_clip_of_its_start(captions, pictures, folder, tmp_path):
    start = clip_start(tmp_path)
    base = start.fill(CLIP(CLIPConfig.tiny()))
    model = start.build(lambda: pe_rsitr.PERSITR(pe_rsitr.PERSITRConfig.tiny()), seed=1).eval()
    checkpoint = save(folder, "pe_rsitr", model)
    with pytest.raises(UserError, match="0 starts that may be its own"):
        nbhelpers.load("pe_rsitr", checkpoint)
    system = nbhelpers.load("pe_rsitr", checkpoint, start.write(tmp_path / "start.json"))
    assert torch.equal(system.model.clip.token_embedding.weight, base.clip.token_embedding.weight)
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    assert np.array_equal(
        system.encode_images([pixels]),
        trained_systems.System(
            "", model, system.tokenizer, system.image, {}, tmp_path
        ).encode_images([pixels]),
    )
    assert evaluation.evaluate(system, captions, pictures).recalls().loc["pe_rsitr", "mR"] > 0


@pytest.fixture(scope="module")
def two_stages(words, folder):
    """A CFITR that has learned nothing, beside no record."""
    torch.manual_seed(0)
    words.write(folder / "run/starting/cfitr-seed0.json")
    tokenizer = words.read_tokenizer()
    model = cfitr.CFITR(cfitr.CFITRConfig.tiny(tokenizer.vocab_size)).eval()
    return nbhelpers.load("cfitr", save(folder, "cfitr", model, tokenizer=tokenizer.sha256))


@pytest.fixture
def recorded(two_stages, words, captions, pictures, tmp_path):
    """The same in a run whose notebook recorded 3 candidates and stored its training queries:
    (system, run, task).
    """
    run, table = tmp_path / "run", layouts.read(captions)
    words.write(run / "starting/cfitr-seed0.json")
    path = checkpoints.save_checkpoint(
        run / "checkpoints/cfitr-1/model.safetensors", two_stages.model, two_stages.about
    )
    data = DataSet(
        table,
        DecodedCache.build(open_images(pictures), list(table.images.file), tmp_path),
        None,
        [],
    )
    task = RetrievalTask(data, two_stages.tokenizer, two_stages.image, workers=1)
    notebook = Run(
        "23_cfitr", SimpleNamespace(profile="run", set="scenes", seed=0, k=3), "cpu", tmp_path
    )
    place = two_stage.store_folder(run, two_stages.model)
    stores, banks = (
        two_stage.write_stores(two_stages.model, task, split, place / split, split == "test")
        for split in ("test", "train")
    )
    ranking = two_stage.rank(two_stages.model, stores, task.table("test").owner(), 3, banks)
    rules = {rule: ranking.results(3, rule)["PPSR online + fine"] for rule in recall.TIES}
    retrieval.write_record(
        notebook,
        two_stages.model,
        task,
        retrieval.Origin("CFITR", "", [], 1.0, "checkpoints/cfitr-1/model.safetensors"),
        rules,
    )
    return nbhelpers.load("cfitr", path), run, ranking


def test_cfitr_is_evaluated_in_its_two_stages(two_stages, captions, pictures):
    found = evaluation.evaluate(two_stages, captions, pictures)
    frame = found.recalls("released")
    assert list(frame.index) == ["cfitr, coarse", "cfitr", "chance"]
    assert found.how == "70 candidates, column means of PPSR from training queries"
    coarse, fine = found.results("expectation").values()
    # every image is a candidate: reranked by the single stream
    assert not np.array_equal(coarse.t2i_ranks, fine.t2i_ranks)
    only = evaluation.evaluate(
        two_stages, captions, pictures, two_stages=two_stage.TwoStages(1)
    ).results("released")["cfitr"]
    # of one candidate nothing is found further down
    assert (only.t2i_hits[:, 0] == only.t2i_hits[:, -1]).all()
    with pytest.raises(UserError, match="at least one candidate, not 0"):
        two_stage.TwoStages(0)
    with pytest.raises(UserError, match="PPSR is 'of'; choose one of online, transductive, none"):
        two_stage.TwoStages(5, "of")


def test_cfitr_is_evaluated_as_its_record_was_written(
    recorded, captions, pictures, tmp_path, capsys
):
    """Its candidates, its training queries, its rule for equal captions; also where the captions
    have no training split.
    """
    system, run, _ = recorded
    (expected,) = records.read(run / "records")
    only_test = put(tmp_path / "test.json", listed(captions))
    for listing in (captions, only_test):
        argv = [
            "eval",
            "--system",
            "cfitr",
            "--checkpoint",
            str(system.checkpoint),
            "--captions",
            str(listing),
            "--images",
            str(pictures),
            "--out",
            str(tmp_path / listing.stem),
        ]
        assert main(argv) == 0
        assert (
            "cfitr: 3 candidates, column means of PPSR from training queries\n"
            in capsys.readouterr().out
        )
        (written,) = records.read(tmp_path / listing.stem)
        assert (
            written["metrics"] == expected["metrics"]
            and written["notes"] == "3 candidates, column means of PPSR from training queries"
        )
    assert main([*argv, "--k", "5", "--ppsr", "transductive"]) == 0
    assert (
        "cfitr: 5 candidates, column means of PPSR from all test queries, as released\n"
        in capsys.readouterr().out
    )


def test_training_queries_are_those_of_the_run_or_of_the_captions(
    recorded, two_stages, captions, pictures, tmp_path, capsys
):
    system, run, _ = recorded
    three = two_stage.TwoStages(3)
    of_run, of_captions = (
        evaluation.evaluate(one, captions, pictures, two_stages=three)
        for one in (system, two_stages)
    )
    assert (
        of_run.results("expectation")["cfitr"].metrics
        == of_captions.results("expectation")["cfitr"].metrics
    )
    only_test = put(tmp_path / "test.json", listed(captions))
    argv = [
        "eval",
        "--system",
        "cfitr",
        "--checkpoint",
        str(two_stages.checkpoint),
        "--captions",
        str(only_test),
        "--images",
        str(pictures),
    ]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "no train split; give --ppsr transductive, as released, or --ppsr none." in said
    )
    for ppsr in ("transductive", "none"):
        assert main([*argv, "--ppsr", ppsr]) == 0


def test_stages_are_asked_of_cfitr_alone(checkpoint, captions, pictures, capsys):
    assert main(arguments(checkpoint, captions, pictures, "--k", "5")) == 1
    assert capsys.readouterr().err == "pir searches in one stage; leave --k and --ppsr to cfitr.\n"


def test_a_search_of_cfitr_answers_as_its_evaluation(
    recorded, captions, pictures, table, tmp_path, capsys
):
    """Candidates and order are those that the record counts; the test images lie in a folder of
    their own.
    """
    system, run, ranking = recorded
    test = table.split("test")
    for file in test.images.file:
        (tmp_path / "test").mkdir(exist_ok=True)
        shutil.copy(pictures / file, tmp_path / "test")
    names = open_images(tmp_path / "test").names
    assert names == sorted(test.images.file)
    for text in (0, 7, 23):
        mask = two_stage.chosen(ranking.coarse["PPSR online"][1].T, 3)[text]
        scores = np.where(mask, ranking.fine[:, text], -np.inf)
        expected = [test.images.file[row] for row in np.argsort(-scores, kind="stable")[:3]]
        found = image_folder.search(system, tmp_path / "test", test.captions.text[text], 3)
        assert list(found.file) == expected
        np.testing.assert_allclose(found.score, np.sort(scores)[::-1][:3], atol=1e-3)
    argv = [
        "search",
        "--system",
        "cfitr",
        "--checkpoint",
        str(system.checkpoint),
        "--images",
        str(tmp_path / "test"),
        "--text",
        "a pond",
    ]
    assert main(argv) == 0
    assert (
        "cfitr reads the sentence with 10 candidates, chosen by hash code; column means of PPSR"
        " from the training" in capsys.readouterr().out
    )
    assert "no PPSR" in image_folder.searched(
        replace(system, checkpoint=tmp_path / "a/b/model.safetensors")
    )


# ---- BITA
@pytest.fixture(scope="module")
def told(table, words, folder):
    """A BITA that has learned nothing, and its start: (checkpoint, model, words of its decoder)."""
    texts = [bita.clean_bita_caption(text) for text in table.captions.text]
    pairs = stand_ins.train_byte_pairs(
        [*texts, *(f"a photo of {text}" for text in texts)], folder / "lm/tokenizer.json", 300
    )
    decoder = caption_tokens.DecoderTokenizer(pairs, "opt_standin")
    torch.manual_seed(0)
    language = checkpoints.save_checkpoint(
        folder / "lm/decoder", backbones.language_model("opt_standin", decoder.vocab_size), {}
    )
    image = checkpoints.save_checkpoint(folder / "clip", backbones.clip("clip_standin"), {})
    towers = {
        "visual_encoder": replace(Tower.stand_in("clip", image, "random"), layout="clip_vision_3"),
        "opt_model": Tower.stand_in("lm", language, "random"),
    }
    start = Start(words.tokenizer, 32, towers, fixed=True, sep=True)
    start.write(folder / "run/starting/bita-seed0.json")
    model = caption_stages.fill_frozen(
        start, bita.Captioner(bita.BITAConfig.tiny(40, decoder.vocab_size))
    ).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter))  # so that what is said depends on the image
    return save(folder, "bita", model, stage="finetune"), model, decoder


def test_bita_writes_the_captions_that_its_notebook_writes(told, table, pictures, words, tmp_path):
    checkpoint, model, decoder = told
    files = list(table.images.file)
    data = DataSet(table, DecodedCache.build(open_images(pictures), files, tmp_path), None, [])
    task = captioning.CaptionTask(
        data, model.config, caption_tokens.Tokenizers(words.read_tokenizer(), decoder), workers=1
    )
    expected = task.describe(model, "test", beams=2, longest=6).captions
    store, test = open_images(pictures), table.split("test")
    paths = [pictures / store.locate(file) for file in test.images.file]
    system = nbhelpers.load("bita", checkpoint)
    found = system.caption(paths, beams=2, longest=6)
    assert dict(zip(test.images.image_id, found, strict=True)) == expected and len(set(found)) > 1
    assert (
        system.caption([decode(path.read_bytes(), "") for path in paths], beams=2, longest=6)
        == found
    )
    unprompted = nbhelpers.load(
        "bita", save(checkpoint.parents[3], "bita-stage2", model, system="bita", stage="stage2")
    )
    without = task.describe(model, "test", prompt=False, beams=2, longest=6).captions
    assert unprompted.caption(paths, beams=2, longest=6) == list(without.values())


def test_equal_images_get_equal_captions(told, table, pictures, words, tmp_path, monkeypatch):
    """Each passes the decoder once, in the notebook's function and in the command's."""
    checkpoint, model, decoder = told
    files = list(table.split("test").images.file[:3])
    images = pd.DataFrame(
        {
            "image_id": [str(number) for number in range(7)],
            "file": [files[number % 3] for number in range(7)],
            "split": "test",
            "scene": "x",
        }
    )
    repeated = CaptionTable(
        "repeated", images, pd.DataFrame({"image_id": images.image_id, "text": "a pond"})
    )
    data = DataSet(repeated, DecodedCache.build(open_images(pictures), files, tmp_path), None, [])
    said, say = [], captioning.say
    monkeypatch.setattr(
        captioning,
        "say",
        lambda model, vision, *more, **options: (
            said.append(len(vision)) or say(model, vision, *more, **options)
        ),
    )
    task = captioning.CaptionTask(
        data, model.config, caption_tokens.Tokenizers(words.read_tokenizer(), decoder), workers=1
    )
    found = list(task.describe(model, "test", beams=2, longest=6).captions.values())
    paths = [pictures / open_images(pictures).locate(file) for file in images.file]
    assert nbhelpers.load("bita", checkpoint).caption(paths, beams=2, longest=6) == found
    assert (
        said == [3, 3]
        and found == [found[number % 3] for number in range(7)]
        and len(set(found)) > 1
    )


def test_what_cannot_be_captioned(told, trained, captions, pictures, folder, tmp_path):
    checkpoint, model, _ = told
    system = nbhelpers.load("bita", checkpoint)
    picture = np.zeros((20, 20, 3), np.uint8)
    for call, words in (
        (lambda: trained.caption([picture]), "pir retrieves and writes no captions; load bita"),
        (
            lambda: system.encode_images([picture]),
            "bita writes captions and encodes nothing; load one of pir, ",
        ),
        (lambda: system.encode_texts(["a pond"]), "bita writes captions and encodes nothing"),
        (
            lambda: evaluation.evaluate(system, captions, pictures),
            "`caption` writes them and `score` evaluates them",
        ),
        (lambda: system.caption([]), "nothing to encode"),
        (lambda: system.caption([picture], beams=0), "beams is 0, .* all must be at least 1"),
        (lambda: system.caption([picture], longest=3), "longest 3 and shortest 4"),
        (
            lambda: nbhelpers.load(
                "bita", save(folder, "stage1", bita.Aligner(model.config), system="bita")
            ),
            "stage 1 of BITA, which",
        ),
    ):
        with pytest.raises(UserError, match=words):
            call()
    moved = Path(shutil.copy(checkpoint, tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="0 starts that may be its own"):
        nbhelpers.load("bita", moved)


def test_captions_of_a_folder_are_those_that_score_reads(
    told, captions, pictures, table, tmp_path, capsys
):
    argv = ["caption", "--checkpoint", str(told[0]), "--images", str(pictures), "--beams", "1"]
    assert main([*argv, "--captions", str(captions), "--out", str(tmp_path / "said.json")]) == 0
    assert capsys.readouterr() == (f"8 captions are in {tmp_path / 'said.json'}.\n", "")
    said = caption_scores.read_captions(tmp_path / "said.json")
    assert list(said) == list(table.split("test").images.image_id)
    assert (
        main(
            [
                "score",
                "--captions",
                str(tmp_path / "said.json"),
                "--references",
                str(captions),
                "--metrics",
                "Bleu",
                "--samples",
                "10",
            ]
        )
        == 0
    )
    assert "8 images, 40 references" in capsys.readouterr().out
    assert main(argv) == 0
    everything = json.loads(capsys.readouterr().out)["captions"]
    assert len(everything) == 24 and everything.items() >= said.items()


# ---- what a run trained
def test_what_a_run_trained_is_found_by_its_record(checkpoint, told, folder):
    run = folder / "run"
    note, said = run / "records/20_pir-seed0.json", run / "captions/24_bita-seed0.json"
    with pytest.raises(UserError, match="run has no trained pir of seed 0 yet; run 20_pir first"):
        trained_systems.trained(run, "pir")
    put(note, [])
    with pytest.raises(
        UserError, match="names no checkpoint that is there; run 20_pir again, without CHECKPOINT"
    ):
        trained_systems.trained(run, "pir")
    note.write_text('{"checkpoint": "checkpoints/gone/model.safetensors"}')
    with pytest.raises(UserError, match=r"that is there \(checkpoints/gone/model.safetensors\)"):
        trained_systems.trained(run, "pir")
    note.write_text("[")
    with pytest.raises(UserError, match="20_pir-seed0.json cannot be read .*; run 20_pir again"):
        trained_systems.trained(run, "pir")
    note.write_text(json.dumps({"checkpoint": "checkpoints/pir/model.safetensors"}))
    assert trained_systems.trained(run, "pir").checkpoint == checkpoint
    said.parent.mkdir()
    said.write_text(json.dumps({"checkpoint": "checkpoints/bita/model.safetensors"}))
    assert trained_systems.trained(str(run), "bita").checkpoint == told[0]
    with pytest.raises(UserError, match="no trained pir of seed 1 yet"):
        trained_systems.trained(run, "pir", 1)
    with pytest.raises(UserError, match="no system 'clip'"):
        trained_systems.trained(run, "clip")


# ---- search
def test_a_second_question_encodes_no_image_again(trained, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    first = image_folder.search(trained, folder, "a green pond", 5)
    encode, seen = trained.model.encode_images, []

    def counted(pixels):
        seen.append(len(next(iter(pixels.values())) if isinstance(pixels, dict) else pixels))
        return encode(pixels)

    monkeypatch.setattr(trained.model, "encode_images", counted)
    again = image_folder.search(trained, folder, "a green pond", 5)
    assert not seen and again.equals(first)
    Image.new("RGB", (64, 64), (0, 90, 0)).save(folder / "new.png")
    found = image_folder.search(trained, folder, "a green pond", 99)
    assert seen and len(found) == 25


def test_many_sentences_are_read_from_standard_input(
    trained, pictures, checkpoint, tmp_path, monkeypatch, capsys
):
    """Each is answered as by itself, from images that are opened once."""
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    argv = ["search", "--system", "pir", "--checkpoint", str(checkpoint), "--top", "3"]
    argv += ["--images", str(pictures)]
    alone = ""
    for sentence in ("a green pond", "a red roof"):
        assert main([*argv, "--text", sentence]) == 0
        alone += capsys.readouterr().out
    opened = []
    real = image_folder.open_images
    monkeypatch.setattr(image_folder, "open_images", lambda path: opened.append(path) or real(path))
    monkeypatch.setattr("sys.stdin", io.StringIO("a green pond\n\na red roof\n"))
    assert main([*argv, "--text", "-"]) == 0
    assert capsys.readouterr().out == alone and len(opened) == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("a green pond\n?!\na red roof\n"))
    assert main([*argv, "--text", "-"]) == 1
    said = capsys.readouterr()
    assert said.out == alone and "1 of 3 sentences got no answer" in said.err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main([*argv, "--text", "-"]) == 1
    assert "holds no sentence; write one a line" in capsys.readouterr().err


def test_embeddings_of_a_file_are_searched_as_the_images_are(
    trained, pictures, checkpoint, tmp_path, monkeypatch, capsys
):
    """With ids and without, also through lists, whose recall is said."""
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    names = open_images(pictures).names
    vectors = trained.encode_images([pictures / name for name in names])
    np.save(tmp_path / "v.npy", vectors)
    np.savez(tmp_path / "v.npz", ids=np.array(names), vectors=vectors)
    right = image_folder.search(trained, pictures, "a green pond", 5)
    found = image_folder.search_embeddings(trained, tmp_path / "v.npz", "a green pond", 5)
    assert list(found.file) == list(right.file)
    assert_close(found.score, right.score)
    plain = image_folder.search_embeddings(trained, tmp_path / "v.npy", "a green pond", 5)
    assert [names[int(row)] for row in plain.file] == list(right.file)
    monkeypatch.setattr("nbhelpers.tasks.nearest.FLAT", 20)
    monkeypatch.setattr("nbhelpers.tasks.nearest.SAMPLES", 5)
    argv = ["search", "--system", "pir", "--checkpoint", str(checkpoint), "--text", "a green pond"]
    assert main([*argv, "--embeddings", str(tmp_path / "v.npz"), "--top", "5"]) == 0
    said = capsys.readouterr().out
    assert "24 vectors lie in 5 lists" in said and "% of what comparing with all finds" in said
    np.save(tmp_path / "w.npy", vectors[:, :5])
    assert main([*argv, "--embeddings", str(tmp_path / "w.npy")]) == 1
    assert "numbers and the gallery has 5 a vector" in capsys.readouterr().err
    assert main(argv) == 2
    assert "Give one of --images and --embeddings" in capsys.readouterr().err


def test_a_second_question_to_cfitr_encodes_its_candidates_alone(
    two_stages, pictures, tmp_path, monkeypatch
):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    model, seen = two_stages.model, []
    first = image_folder.search(two_stages, pictures, "a green pond", 3)
    features = model.image_features
    monkeypatch.setattr(
        model, "image_features", lambda pixels: seen.append(len(pixels)) or features(pixels)
    )
    again = image_folder.search(two_stages, pictures, "a green pond", 3)
    assert again.equals(first) and sum(seen) == 24  # all are candidates
    np.save(tmp_path / "v.npy", np.ones((3, 4)))
    with pytest.raises(UserError, match="reads an image together with a sentence"):
        image_folder.search_embeddings(two_stages, tmp_path / "v.npy", "a green pond")


def test_the_best_images_of_a_folder_come_first(trained, pictures, checkpoint, capsys):
    store = open_images(pictures)
    images = trained.encode_images([store.read(name) for name in store.names])
    scores = images @ trained.encode_texts(["a green pond"])[0]
    found = image_folder.search(trained, pictures, "a green pond", 5)
    order = np.argsort(-scores, kind="stable")[:5]
    assert list(found.file) == [store.names[row] for row in order]
    assert_close(found.score, scores[order])
    alike = image_folder.search(trained, pictures, pictures / store.names[3], 99)
    assert (
        len(alike) == 24
        and alike.file[0] == store.names[3]
        and alike.score[0] == pytest.approx(1, abs=1e-5)
    )
    assert (
        main(
            [
                "search",
                "--system",
                "pir",
                "--checkpoint",
                str(checkpoint),
                "--images",
                str(pictures),
                "--text",
                "a green pond",
                "--top",
                "5",
            ]
        )
        == 0
    )
    printed = [
        line.split() for line in capsys.readouterr().out.splitlines() if line.split()[0].isdigit()
    ]
    assert [line[2] for line in printed] == list(found.file) and printed[0][:2] == [
        "1",
        f"{found.score[0]:.4f}",
    ]


def test_cfitr_reads_image_and_sentence_together(two_stages, pictures, monkeypatch):
    """Never more than a batch of images at once."""
    system, model, tokenizer, sizes = two_stages, two_stages.model, two_stages.tokenizer, []
    features = model.image_features
    monkeypatch.setattr(
        model, "image_features", lambda pixels: sizes.append(len(pixels)) or features(pixels)
    )
    for module in (trained_systems, image_folder):
        monkeypatch.setattr(module, "BATCH", 5)
    found = image_folder.search(system, pictures, "a green pond", 3)
    # for their codes and, as all are candidates, once more
    assert max(sizes) == 5 and sum(sizes) == 48
    store, (ids, mask) = open_images(pictures), tokenizer([tokenizer.clean("a green pond")])
    with torch.inference_mode():
        text = model.text_states(**model.text_features(ids, mask), mask=mask)
        pixels = system.pixels(map(store.read, store.names))
        states = model.image_states(**model.image_features(pixels))
        scores = model.score_pairs(
            states, text.expand(len(states), -1, -1), mask.expand(len(states), -1)
        ).numpy()
    order = np.argsort(-scores)[:3]
    assert two_stage.K >= 24 and list(found.file) == [store.names[row] for row in order]
    # states are stored in 16 bits
    np.testing.assert_allclose(found.score, scores[order], atol=1e-2)


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--text", " "], "nothing to search for"),
        (["--text", "a green field", "--top", "0"], "ask for at least 1"),
        (["--image", "none.png"], "none.png does not exist"),
        (["--text", "a green field", "--images", "none"], "none does not exist"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(more, sentence, checkpoint, pictures, capsys):
    assert (
        main(
            [
                "search",
                "--system",
                "pir",
                "--checkpoint",
                str(checkpoint),
                "--images",
                str(pictures),
                *more,
            ]
        )
        == 1
    )
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and sentence in err


def test_without_a_checkpoint_the_run_is_asked(pictures, capsys):
    argv = ["search", "--system", "pir", "--images", str(pictures), "--text", "pond"]
    assert main([*argv, "--profile", "ucm", "--seed", "2"]) == 1
    assert "runs/ucm has no trained pir of seed 2 yet; run 20_pir first" in capsys.readouterr().err
    assert main([*argv, "--start", "here.json"]) == 1
    assert "--start belongs to a --checkpoint" in capsys.readouterr().err


# ---- the command line
def arguments(checkpoint, captions, pictures, *more):
    return [
        "eval",
        "--system",
        "pir",
        "--checkpoint",
        str(checkpoint),
        "--captions",
        str(captions),
        "--images",
        str(pictures),
        *more,
    ]


def test_the_table_is_printed_and_the_record_written(
    checkpoint, captions, pictures, trained, tmp_path, capsys
):
    assert (
        main(
            arguments(
                checkpoint, captions, pictures, "--out", str(tmp_path / "out"), "--split", "val"
            )
        )
        == 0
    )
    out, err = capsys.readouterr()
    frame = evaluation.evaluate(trained, captions, pictures, "val").recalls()
    assert (
        err == "" and "val: 8 images, 40 captions; recalls in percent, ties by expectation" in out
    )
    row = next(line for line in out.splitlines() if line.startswith("pir")).split()
    assert row[1:] == [f"{value:.2f}" for value in frame.loc["pir"]]
    (record,) = records.read(tmp_path / "out")
    assert (
        record["metrics"]["expectation"]["mR"] == frame.loc["pir", "mR"]
        and record["protocol"]["split"] == "val"
    )
    assert record["weights"][0]["sha256"] == checkpoints.sha256(checkpoint) and set(
        record["metrics"]
    ) == set(recall.TIES)
    assert record["intervals"]["mR"] == [frame.loc["pir", "mR low"], frame.loc["pir", "mR high"]]
    result, owner = records.read_recall(tmp_path / "out" / "eval-seed0-pir.json")
    assert result.metrics["mR"] == frame.loc["pir", "mR"] and len(owner) == 40


def test_the_released_rule_can_be_asked_for(
    checkpoint, captions, pictures, trained, tmp_path, capsys
):
    assert (
        main(
            arguments(
                checkpoint, captions, pictures, "--ties", "released", "--out", str(tmp_path / "out")
            )
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "ties by released" in out and "ceiling" not in out
    (record,) = records.read(tmp_path / "out")
    assert record["protocol"]["ties"] == "released"


def test_a_mistake_is_one_line_and_leaves_nothing(checkpoint, captions, pictures, tmp_path, capsys):
    only_test = put(tmp_path / "test.json", listed(captions))
    wrong = ["--split", "val", "--out", str(tmp_path / "out")]
    assert main(arguments(checkpoint, only_test, pictures, *wrong)) == 1
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.count("\n") == 1
        and "no image in split 'val'" in err
        and not (tmp_path / "out").exists()
    )


# ---- images of a list are its own
class Colours:
    """Stands for a system: the caption of an image is its first value, and it has no model."""

    def caption(self, pictures):
        return [str(pixels[0, 0, 0]) for pixels in pictures]

    def _must_have(self, *arguments):
        pass


def squares(folder, values: dict[str, int]):
    """A folder of plain grey images: file name -> value."""
    for name, value in values.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (value,) * 3).save(folder / name)
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {"a/1.png": 1, "b/1.png": 2},
        {"1.png": 1, "1.bmp": 2, "2.png": 3},
        {"a/1.png": 1, "a/1.bmp": 2},
        {"a/x.png": 1, "A/X.png": 2},
    ],
)
def test_no_image_of_a_folder_is_lost_among_its_namesakes(tmp_path, values):
    found = image_folder.caption_folder(Colours(), squares(tmp_path / "x", values))
    assert sorted(found.values()) == sorted(str(value) for value in values.values())


def captions_of(path, files: dict[str, str]):
    lines = [f"{file},{split},some words" for file, split in files.items()]
    path.write_text("\n".join(["image,split,caption", *lines]) + "\n")
    return path


def test_the_captions_of_a_list_are_of_its_own_images(tmp_path):
    folder = squares(tmp_path / "x", {"a/1.png": 1, "b/1.png": 2, "b/2.png": 3})
    files = {"a/1.tif": "test", "b/1.tif": "test", "b/2.tif": "train"}
    found = image_folder.caption_folder(Colours(), folder, captions_of(tmp_path / "c.csv", files))
    assert found == {"a/1": "1", "b/1": "2"}
    (folder / "a" / "1.png").unlink()
    with pytest.raises(UserError, match="^a/1.tif is not in .*, where b/1.png lies in"):
        image_folder.caption_folder(Colours(), folder, tmp_path / "c.csv")


@pytest.mark.parametrize(
    "use",
    [
        lambda captions, folder: image_folder.caption_folder(Colours(), folder, captions),
        lambda captions, folder: evaluation.evaluate(
            Colours(), captions, folder, cache=folder.parent
        ),
    ],
)
def test_the_other_splits_of_a_list_tell_which_folders_count(tmp_path, use):
    """Of test alone, b/ might be a folder around all images."""
    folder = squares(tmp_path / "x", {"b/1.png": 1, "b/2.png": 2})
    captions = captions_of(tmp_path / "c.csv", {"a/1.png": "test", "b/2.png": "train"})
    with pytest.raises(UserError, match="^a/1.png is not in .*, where b/1.png lies in"):
        use(captions, folder)


def test_results_as_json(checkpoint, captions, pictures, trained, tmp_path, capsys):
    assert main(arguments(checkpoint, captions, pictures, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    frame = evaluation.evaluate(trained, captions, pictures).recalls()
    assert [row["name"] for row in found["recalls"]] == ["pir", "chance", "ceiling"]
    assert found["recalls"][0]["mR"] == pytest.approx(frame.loc["pir", "mR"])
    assert found["recalls"][1]["mR low"] is None and found["images"] == 8
    named = ["--system", "pir", "--checkpoint", str(checkpoint), "--images", str(pictures)]
    assert main(["search", *named, "--text", "a green pond", "--top", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = image_folder.search(trained, pictures, "a green pond", 3)
    assert [row["file"] for row in found["images"]] == list(best.file)
