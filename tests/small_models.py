"""Small models of random weights in the public forms of open_clip and transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import open_clip
import torch
from safetensors.torch import save_file
from transformers import (
    AlignConfig,
    AlignModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from nbhelpers.papers import clip
from nbhelpers.towers import checkpoints
from nbhelpers.towers.starting_weights import Start, Tower

SPOKEN = ["[PAD]", "[UNK]", "[CLS]", "many", "boats", "hill", "a"]
SPOKEN += ["red", "green", "blue", "grey", "field", "place"]
WORDS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 48},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2, "context_length": 20, "vocab_size": 49408},
}


def small_clip(**changes) -> open_clip.CLIP:
    torch.manual_seed(1)
    return open_clip.CLIP(**(CONFIG | changes)).eval()


def write_open_clip(folder, model, config=CONFIG):
    folder.mkdir(parents=True)
    about = {"model_cfg": config, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def bert_words(folder, kind):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {w: i for i, w in enumerate(SPOKEN)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = ["input_ids"] if kind == "siglip" else ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    ).save_pretrained(folder)


def write_hugging_face(folder, kind: str):
    torch.manual_seed(2)
    if kind == "clip":
        text = WORDS | {"vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 2}
        model = CLIPModel(
            CLIPConfig(
                text_config=text | {"intermediate_size": 64},
                vision_config=WORDS | {"image_size": 32, "patch_size": 16},
                projection_dim=16,
            )
        )
        images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    elif kind == "siglip":
        text = WORDS | {"vocab_size": 40, "max_position_embeddings": 16}
        model = SiglipModel(
            SiglipConfig(
                text_config=text | {"intermediate_size": 64, "projection_size": 32},
                vision_config=WORDS | {"image_size": 32, "patch_size": 16, "intermediate_size": 64},
            )
        )
        images = SiglipImageProcessor(size={"height": 32, "width": 32})
    else:
        text = WORDS | {"vocab_size": 40, "intermediate_size": 64, "max_position_embeddings": 512}
        from transformers import EfficientNetImageProcessor

        vision = {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.1}
        vision["initializer_range"] = 0.3
        model = AlignModel(
            AlignConfig(
                text_config=text, vision_config=vision | {"hidden_dim": 640}, projection_dim=80
            )
        )
        images = EfficientNetImageProcessor(size={"height": 32, "width": 32})
    model.eval().save_pretrained(folder)
    images.save_pretrained(folder)
    bert_words(folder, kind)
    return model.eval()


def random_start(folder):
    """What 12_starting_weights writes for pe_rsitr in the tiny size, with a CLIP at random."""
    torch.manual_seed(3)
    state = clip.CLIP(clip.CLIPConfig(clip="clip_standin")).clip.state_dict()
    file = checkpoints.save_checkpoint(folder / "clip.safetensors", state, {"name": "clip"})
    begin = replace(
        Start.for_checkpoint("clip_standin", folder),
        options={"clip": "clip_standin"},
        towers={"clip": Tower.stand_in("clip_standin", file, "a test")},
    )
    return begin.write(folder / "pe_rsitr-seed0.json")
