"""Any model is fine-tuned by each method, with one checkpoint and one record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from coloured_set import coloured
from PIL import Image
from safetensors.torch import save_file
from small_models import small_clip, write_hugging_face, write_open_clip

from nbhelpers.errors import UserError
from nbhelpers.metrics import recall
from nbhelpers.papers import any_clip
from nbhelpers.papers.any_clip import METHODS, AnyCLIPConfig, ModelTokenizer, image_input
from nbhelpers.results import records
from nbhelpers.runs.commands import main
from nbhelpers.systems.bench_models import Options, encode, open_any
from nbhelpers.tasks.fine_tuning import fine_tune
from nbhelpers.towers.any_model import open_model
from nbhelpers.training.loop import TrainConfig

TEXTS = ["a red field", "a blue place", "many boats"]
KINDS = ("open_clip", "clip", "siglip", "align")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    write_open_clip(folder / "open_clip", small_clip())
    for kind in KINDS[1:]:
        write_hugging_face(folder / kind, kind)
    return {kind: str(folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pixels() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(3)]


def seen(model: any_clip.AnyCLIP, pixels: list, texts: list) -> tuple[torch.Tensor, torch.Tensor]:
    words = ModelTokenizer(model.encoders)
    ids, mask = words.pad(words.encode(texts))
    with torch.inference_mode():
        images = model.encode_images(torch.stack([model.encoders.pixels(one) for one in pixels]))
        return images, model.encode_texts(ids, mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_starts_as_the_model_that_it_is_given(models, pixels, kind, method):
    if (kind, method) == ("align", "adapter"):
        with pytest.raises(UserError, match="use method lora"):
            any_clip.build(AnyCLIPConfig(models[kind], method))
        return
    model, _ = any_clip.build(AnyCLIPConfig(models[kind], method))
    images, texts = seen(model.eval(), pixels, TEXTS)
    plain = open_model(models[kind])
    right = plain.encode_images(pixels) @ plain.encode_texts(TEXTS).T
    np.testing.assert_allclose((images @ texts.T).numpy(), right, atol=2e-5)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    assert (trained == whole - frozen_scales(model)) if method == "full" else trained < whole


def frozen_scales(model) -> int:
    names = ("logit_scale", "logit_bias")
    return sum(p.numel() for n, p in model.network.named_parameters() if n in names)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_image_input_is_that_of_the_transform(models, pixels, kind):
    encoders = open_model(models[kind]).encoders
    found = image_input(encoders)
    picture = pixels[0].resize((found.size, found.size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (found.mean, found.std))
    torch.testing.assert_close(encoders.pixels(picture), (values - mean) / std, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_gives_a_checkpoint_and_a_record_that_agree(models, data, tmp_path, method):
    config = AnyCLIPConfig(models["open_clip"], method, rank=2, bottleneck=8)
    training = TrainConfig(4, 3e-3, 16)
    found = fine_tune(config, data, training, tmp_path, "default")
    record = records.read_checked(found.record)
    assert record["variant"] == f"open_clip-{method}" and (tmp_path / record["checkpoint"]).exists()
    table = data.table.split("test")
    reopened = f"clip={found.checkpoint}"
    outputs = encode(reopened, table, Options(data.pixels, cache=tmp_path / "cache", device="cpu"))
    result = recall.evaluate(outputs.images @ outputs.texts.T, table.owner())
    assert result.metrics["mR"] == pytest.approx(record["metrics"]["expectation"]["mR"], abs=0.5)
    losses = [row["loss"] for row in history(found.checkpoint)]
    assert losses[-1] < losses[0], "the loss falls"
    size = found.checkpoint.stat().st_size
    assert (size > 1e6) == (method == "full"), "only full fine-tuning keeps the whole network"
    again = fine_tune(config, data, training, tmp_path, "default")
    assert not again.trained and again.checkpoint == found.checkpoint


def history(checkpoint: Path) -> list[dict]:
    from nbhelpers.towers import checkpoints

    return checkpoints.load_checkpoint(checkpoint)[1]["history"]


def test_what_is_frozen_stays_as_it_is(models, data, tmp_path):
    before = open_model(models["open_clip"]).encoders.module.state_dict()
    for method in ("linear", "adapter", "lora"):
        config = AnyCLIPConfig(models["open_clip"], method, bottleneck=8)
        found = fine_tune(config, data, TrainConfig(1, 1e-2, 16), tmp_path, "default")
        after = {
            n.replace(".base_layer", ""): v for n, v in found.model.network.state_dict().items()
        }
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_cached_gradients_train_the_same_model(models, data, tmp_path):
    config = AnyCLIPConfig(models["open_clip"], "full")
    losses = []
    for micro_batch in ("whole", "4"):
        training = TrainConfig(2, 1e-3, 16, micro_batch=micro_batch)
        found = fine_tune(config, data, training, tmp_path / micro_batch, "default")
        losses.append([row["loss"] for row in history(found.checkpoint)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_one_command_trains_and_its_advice_opens_the_model(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    data = coloured(tmp_path / "colours")
    file_of = dict(zip(data.table.images.image_id, data.table.images.file, strict=True))
    split_of = dict(zip(data.table.images.image_id, data.table.images.split, strict=True))
    rows = [
        f"{file_of[i]},{t},{split_of[i]}" for i, t in data.table.captions.itertuples(index=False)
    ]
    (tmp_path / "colours.csv").write_text("\n".join(["image,caption,split", *rows]) + "\n")
    (tmp_path / "colours" / "images").rename(tmp_path / "colours_images")
    words = ["train", "--system", "clip", "--set", "colours", "--data", str(tmp_path)]
    words += ["--epochs", "1", "--batch-size", "16", "--method", "lora", "--device", "cpu"]
    assert main([*words, "--model", models["siglip"]]) == 0
    said = capsys.readouterr().out
    assert "mR on test: " in said and (tmp_path / "runs/default/records").is_dir()
    advised = said.split("name it ")[1].strip().removesuffix(".")
    assert open_any(advised, device="cpu").encode_texts(TEXTS).shape == (3, 32)
    assert main(words) == 2
    assert "--system clip trains the model that --model names" in capsys.readouterr().err
    assert main(["train", "--system", "pir", "--model", models["clip"]]) == 2
    assert "belongs to --system clip" in capsys.readouterr().err


def test_a_checkpoint_asks_for_the_model_that_it_was_trained_on(data, tmp_path):
    folder = write_open_clip(tmp_path / "small", small_clip())
    config = AnyCLIPConfig(str(folder), "linear")
    found = fine_tune(config, data, TrainConfig(1, 1e-3, 16), tmp_path, "default")
    other = small_clip()
    with torch.no_grad():
        other.visual.proj.mul_(2)
    before = (folder / "open_clip_model.safetensors").read_bytes()
    save_file(other.state_dict(), folder / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="put the former ones back"):
        any_clip.read(found.checkpoint)
    (folder / "open_clip_model.safetensors").write_bytes(before)
    any_clip.read(found.checkpoint)


def test_wrong_methods_and_functions_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="choose one of full, linear, lora, adapter"):
        AnyCLIPConfig("x", "prompt")
    with pytest.raises(UserError, match="rank is 0"):
        AnyCLIPConfig("x", "lora", rank=0)
    (tmp_path / "my_functions.py").write_text("def f():\n    return list, list\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nothing of it can be trained"):
        any_clip.build(AnyCLIPConfig("my_functions:f"))
