"""Models of others, written in their public forms with random weights, open by the names in use."""

from __future__ import annotations

import json
import sys
from copy import deepcopy

import numpy as np
import open_clip
import pytest
import torch
from hub_stand_in import Host, constants_of, serving
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from small_models import (
    CONFIG,
    WORDS,
    bert_words,
    small_clip,
    write_hugging_face,
    write_open_clip,
)
from transformers import CLIPImageProcessor

from nbhelpers.errors import UserError
from nbhelpers.towers import open_clip_models
from nbhelpers.towers.any_model import content, open_model

TEXTS = ["Many boats are in a harbor.", "A bare hill.", "many boats " * 60]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    shapes = [(60, 80, 3), (48, 48, 3), (100, 50, 3)]
    return [Image.fromarray(random.integers(0, 255, s, dtype=np.uint8)) for s in shapes]


def test_an_open_clip_folder_gives_what_open_clip_gives(tmp_path, pictures):
    folder = write_open_clip(tmp_path / "small", small_clip())
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    found = open_model(str(folder))
    with torch.inference_mode():
        pixels = torch.stack([transform(picture) for picture in pictures])
        images = theirs.eval().encode_image(pixels, normalize=True).numpy()
        texts = theirs.encode_text(words(TEXTS), normalize=True).numpy()
    np.testing.assert_allclose(found.encode_images(pictures), images, atol=1e-6)
    np.testing.assert_allclose(found.encode_texts(TEXTS), texts, atol=1e-6)
    assert found.encode_images(pictures).dtype == np.float32
    assert found.settings["context"] == 20


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_a_state_dict_fills_a_named_network_of_open_clip(tmp_path, pictures, suffix, monkeypatch):
    register(tmp_path, monkeypatch)
    model, file = small_clip(), tmp_path / f"weights{suffix}"
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"epoch": 3, "state_dict": state}, file)
    found = open_model(f"Small-quickgelu={file}")
    with torch.inference_mode():
        right = model.encode_text(open_clip.get_tokenizer("Small-quickgelu")(TEXTS), normalize=True)
    np.testing.assert_allclose(found.encode_texts(TEXTS), right.numpy(), atol=1e-6)
    assert found.encode_images(pictures).shape == (3, 16)


def register(tmp_path, monkeypatch) -> None:
    """Add the small network to the architectures of open_clip, with both activations."""
    for name, quick in {"Small": False, "Small-quickgelu": True}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(CONFIG | {"quick_gelu": quick}))
    from open_clip import factory

    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path)
    open_clip_models.names.cache_clear()


@pytest.fixture(autouse=True)
def _own_names():
    yield
    open_clip_models.names.cache_clear()


def test_another_image_size_and_context_length_are_those_of_the_weights(
    tmp_path, pictures, monkeypatch
):
    register(tmp_path, monkeypatch)
    vision, text = CONFIG["vision_cfg"] | {"image_size": 64}, CONFIG["text_cfg"]
    model = small_clip(vision_cfg=vision, text_cfg=text | {"context_length": 30})
    save_file(model.state_dict(), tmp_path / "large.safetensors")
    found = open_model(f"Small-quickgelu={tmp_path / 'large.safetensors'}")
    assert found.settings["context"] == 30
    assert found.settings["preprocess"]["size"] == "(64, 64)"
    assert found.encode_images(pictures).shape == (3, 16)


def test_the_activation_comes_from_the_name_or_the_option(tmp_path, monkeypatch):
    register(tmp_path, monkeypatch)
    file = tmp_path / "weights.safetensors"
    save_file(small_clip().state_dict(), file)
    quick = open_model(f"Small-quickgelu={file}")
    asked = open_model(f"Small={file}", "quickgelu")
    exact = open_model(f"Small={file}")
    assert np.array_equal(quick.encode_texts(TEXTS), asked.encode_texts(TEXTS))
    assert not np.allclose(quick.encode_texts(TEXTS), exact.encode_texts(TEXTS), atol=1e-4)
    assert quick.digest == asked.digest != exact.digest
    assert "name Small-quickgelu" in exact.notes[0] and not quick.notes and not asked.notes
    with pytest.raises(UserError, match="Small-quickgelu has QuickGELU.*name Small\\."):
        open_model(f"Small-quickgelu={file}", "gelu")
    with pytest.raises(UserError, match="choose gelu or quickgelu"):
        open_model(f"Small={file}", "relu")


def test_known_weights_with_the_other_activation_are_refused_with_the_right_name(
    tmp_path, monkeypatch
):
    register(tmp_path, monkeypatch)
    file = tmp_path / "RemoteCLIP-ViT-B-32.pt"
    torch.save(small_clip().state_dict(), file)
    with pytest.raises(UserError, match="trained with QuickGELU.*name Small-quickgelu"):
        open_model(f"Small={file}")
    assert not open_model(f"Small-quickgelu={file}").notes
    with pytest.raises(UserError, match="name ViT-B-32-quickgelu"):
        open_model("ViT-B-32,openai")
    with pytest.raises(UserError, match="has no weights laion2b.*name ViT-B-32,laion2b"):
        open_model("ViT-B-32-quickgelu,laion2b_s34b_b79k")


@pytest.mark.parametrize("spec", ["remoteclip_vit_b32", "ViT-B-32-quickgelu,openai"])
def test_public_weights_and_tags_open_what_was_fetched(tmp_path, monkeypatch, spec):
    model, file = small_clip(), tmp_path / "RemoteCLIP-ViT-B-32.pt"
    torch.save(model.state_dict(), file)
    monkeypatch.setenv("NBHELPERS_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(open_clip, "download_pretrained", lambda about: str(file))
    monkeypatch.setattr(open_clip_models, "_config", lambda name: deepcopy(CONFIG))
    found = open_model(spec)
    with torch.inference_mode():
        words = open_clip.get_tokenizer("ViT-B-32", context_length=20)(TEXTS)
        right = model.encode_text(words, normalize=True)
    np.testing.assert_allclose(found.encode_texts(TEXTS), right.numpy(), atol=1e-6)
    with pytest.raises(UserError, match="trained with QuickGELU|has QuickGELU"):
        open_model(spec, "gelu")


def test_weights_of_another_network_are_refused_with_its_name(tmp_path, monkeypatch):
    register(tmp_path, monkeypatch)
    file = tmp_path / "weights.pt"
    torch.save(small_clip().state_dict(), file)
    with pytest.raises(UserError, match=r"does not fit RN50\. Its tensors fit Small"):
        open_model(f"RN50={file}")
    with pytest.raises(UserError, match="write NAME=.* such as Small"):
        open_model(str(file))


@pytest.mark.parametrize("kind", ["clip", "siglip", "align"])
def test_a_hugging_face_folder_uses_its_own_processor_and_tokenizer(tmp_path, pictures, kind):
    model = write_hugging_face(tmp_path / kind, kind)
    from transformers import AutoImageProcessor, AutoTokenizer

    images = AutoImageProcessor.from_pretrained(tmp_path / kind, backend="pil")
    words = AutoTokenizer.from_pretrained(tmp_path / kind)
    longest = {"clip": 12, "siglip": 16, "align": 64}[kind]
    read = words(
        TEXTS, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
    )
    with torch.inference_mode():
        pixels = images(images=pictures, return_tensors="pt")["pixel_values"]
        seen = model.get_image_features(pixel_values=pixels).pooler_output
        said = model.get_text_features(
            **{name: read[name] for name in words.model_input_names if name in read}
        ).pooler_output
    found = open_model(str(tmp_path / kind))
    unit = torch.nn.functional.normalize
    np.testing.assert_allclose(found.encode_images(pictures), unit(seen).numpy(), atol=1e-5)
    np.testing.assert_allclose(found.encode_texts(TEXTS), unit(said).numpy(), atol=1e-5)


def test_a_folder_without_its_tokenizer_is_refused(tmp_path):
    write_hugging_face(tmp_path / "clip", "clip")
    for path in (tmp_path / "clip").glob("*tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="has no tokenizer that knows words"):
        open_model(str(tmp_path / "clip"))


def test_sizes_of_the_weights_count_and_are_said(tmp_path, pictures):
    right = open_model(str(write_open_clip(tmp_path / "right", small_clip())))
    text, vision = dict(CONFIG["text_cfg"]), dict(CONFIG["vision_cfg"])
    other = CONFIG | {
        "text_cfg": text | {"context_length": 77},
        "vision_cfg": vision | {"image_size": 64},
    }
    found = open_model(str(write_open_clip(tmp_path / "other", small_clip(), other)))
    assert "the weights take images of 48 px and a context of 20" in found.notes[0]
    assert not right.notes
    assert np.array_equal(found.encode_images(pictures), right.encode_images(pictures))


def test_what_is_no_dual_encoder_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**WORDS, vocab_size=40, intermediate_size=64)).save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    bert_words(tmp_path, "bert")
    with pytest.raises(UserError, match="BertModel, which does not embed images and texts alike"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="neither open_clip_config.json nor config.json"):
        open_model(str(tmp_path))


MODULE = """
import numpy as np
def encoders():
    return lambda pictures: [[p.width, p.height, 1.0] for p in pictures], lambda texts: np.array(
        [[len(t), 1, 1] for t in texts])
def zeros():
    return lambda pictures: np.zeros((len(pictures), 2)), lambda texts: np.ones((1, 2))
def one():
    return 1
def ended():
    raise SystemExit(3)
def ends_later():
    return lambda pictures: ended(), lambda texts: ended()
"""


def test_a_function_brings_any_model(tmp_path, monkeypatch, pictures):
    (tmp_path / "my_own_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    found = open_model("my_own_model:encoders")
    assert found.encode_images(pictures).shape == (3, 3)
    np.testing.assert_allclose(np.linalg.norm(found.encode_texts(TEXTS), axis=1), 1, rtol=1e-6)
    assert not found.digest and not content(found) and str(tmp_path) not in sys.path
    with pytest.raises(UserError, match="rows of zeros or of NaN for images"):
        open_model("my_own_model:zeros").encode_images(pictures)
    with pytest.raises(UserError, match=r"shape \(1, 2\) for 3 texts"):
        open_model("my_own_model:zeros").encode_texts(TEXTS)
    with pytest.raises(UserError, match="must return two functions"):
        open_model("my_own_model:one")
    with pytest.raises(UserError, match=r"ended cannot be called \(SystemExit: 3\)"):
        open_model("my_own_model:ended")
    with pytest.raises(UserError, match=r"ends_later failed \(SystemExit: 3\)"):
        open_model("my_own_model:ends_later").encode_texts(TEXTS)
    with pytest.raises(UserError, match="cannot be called"):
        open_model("my_own_model:nothing")


def test_a_prompt_surrounds_each_sentence(tmp_path):
    found = open_model(str(write_open_clip(tmp_path / "small", small_clip())))
    asked = found.prompted("an aerial photograph of {}")
    right = found.encode_texts([f"an aerial photograph of {text}" for text in TEXTS])
    assert np.array_equal(asked.encode_texts(TEXTS), right)
    assert content(asked) != content(found)
    with pytest.raises(UserError, match="write {} once"):
        found.prompted("an aerial photograph")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "The name of the model is empty"),
        ("ViT-B-32", "is a network without weights; write ViT-B-32,TAG .* or ViT-B-32=FILE"),
        ("ViT-B32", "There is no model 'ViT-B32'.*Did you mean ViT-B-32"),
        ("ViT-B-32,opena", "Did you mean openai"),
        ("ViT-B-23=some.pt", "Did you mean ViT-B-32"),
        ("ViT-B-32=/no/such.pt", "/no/such.pt does not exist"),
        ("remoteclip_vit_b", "Did you mean remoteclip_vit_b32"),
        ("remoteclip_vit_b32", "The weights 'remoteclip_vit_b32'.*were not found"),
        ("hf-hub:nobody/nothing", "nobody/nothing is not on this machine"),
        ("nobody/nothing", "nobody/nothing is not on this machine"),
        ("ViT-B-32-quickgelu,openai", "not on this machine.*ViT-B-32-quickgelu=FILE"),
    ],
)
def test_a_name_that_leads_to_no_model_is_answered_in_a_sentence(spec, says, monkeypatch, tmp_path):
    monkeypatch.setenv("NBHELPERS_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=says):
        open_model(spec)


def test_a_damaged_folder_is_answered_in_a_sentence(tmp_path):
    folder = write_open_clip(tmp_path / "small", small_clip())
    with pytest.raises(UserError, match="says quick_gelu true; leave --activation out"):
        open_model(str(folder), "gelu")
    (folder / "open_clip_model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(UserError, match="holds none of"):
        open_model(str(folder))
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match="open_clip_config.json is not JSON"):
        open_model(str(folder))


@pytest.mark.parametrize(
    "broken",
    [
        {"model_cfg": {"embed_dim": 16}},
        {"model_cfg": CONFIG | {"vision_cfg": {"layers": "two", "width": 32}}},
        {"model_cfg": CONFIG | {"surprise": 1}},
        {"model_cfg": CONFIG, "preprocess_cfg": {"mode": "L"}},
        {"model_cfg": CONFIG, "preprocess_cfg": 7},
        {"model_cfg": CONFIG, "preprocess_cfg": {"interpolation": 3}},
        {"model_cfg": []},
        [],
    ],
)
def test_a_wrong_configuration_is_answered_in_a_sentence(tmp_path, broken):
    folder = write_open_clip(tmp_path / "small", small_clip())
    (folder / "open_clip_config.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match="cannot be built|is no configuration of open_clip"):
        open_model(str(folder))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    open_model(str(folder))


@pytest.mark.parametrize("kind", ["open_clip", "siglip"])
def test_a_repository_of_the_hub_is_fetched_once_and_then_read_offline(tmp_path, monkeypatch, kind):
    folder = tmp_path / "own"
    if kind == "open_clip":
        write_open_clip(folder, small_clip())
    else:
        write_hugging_face(folder, kind)
    Host.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    Host.files |= {"pytorch_model.bin": b"the same once more", "notes.md": b"for readers"}
    right = content(open_model(str(folder)))
    with serving():
        for name, value in constants_of(Host.port, tmp_path / "home").items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert content(open_model("hf-hub:me/mirror")) == right
        fetched = {name for name, _ in Host.asked}
        with pytest.raises(UserError, match="me/other is not on this machine"):
            open_model("me/other")
    assert "pytorch_model.bin" not in fetched and "notes.md" not in fetched, "weights come once"
    assert content(open_model("me/mirror")) == right, "the host is gone"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert content(open_model("hf-hub:me/mirror")) == right
