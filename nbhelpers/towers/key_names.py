"""Rename published weights to the names of the modules that `backbones` builds.

Each layout of files has its rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nbhelpers.towers import ift_names, vilt_names
from nbhelpers.towers.checkpoints import read_state_dict, rename

Rules = list[tuple[str, str | None]]

# EfficientNet-Lite0 as its package names it -> timm's tf_efficientnet_lite0. Block number ->
# "stage.block":
_LITE0_BLOCKS: list[str] = []
for _stage, _count in enumerate((1, 2, 2, 3, 3, 4, 1)):
    _LITE0_BLOCKS += [f"{_stage}.{_block}" for _block in range(_count)]
LITE0_RULES: Rules = [
    (r"^_conv_stem\.", "conv_stem."),
    (r"^_bn0\.", "bn1."),
    (r"^_conv_head\.", "conv_head."),
    (r"^_bn1\.", "bn2."),
    (r"^_fc\.", "classifier."),
    (r"^_blocks\.0\._project_conv\.", "blocks.0.0.conv_pw."),  # the first block has no expansion
    (r"^_blocks\.0\._bn", "blocks.0.0.bn"),
    (r"\._project_conv\.", ".conv_pwl."),
    (r"\._bn2\.", ".bn3."),
    (r"\._depthwise_conv\.", ".conv_dw."),
    (r"\._bn1\.", ".bn2."),
    (r"\._expand_conv\.", ".conv_pw."),
    (r"\._bn0\.", ".bn1."),
    *((rf"^_blocks\.{number}\.", f"blocks.{place}.") for number, place in enumerate(_LITE0_BLOCKS)),
]

# BERT as published (with or without heads, with TensorFlow's names in LayerNorm) -> transformers'
# BertModel
BERT_RULES: Rules = [
    (r"^(cls\.|(bert\.)?pooler\.|(bert\.)?embeddings\.position_ids$)", None),
    (r"^bert\.", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
]

# How the names of a layout begin, once no prefix of training code stands before them.
BERT_STARTS = ("bert.", "embeddings.")
CLIP_STARTS = ("visual.", "vision_model.", "text_model.", "class_embedding", "conv1.")

# CLIP of open_clip or of OpenAI, with what its archives keep beside the weights
CLIP_RULES: Rules = [
    (r"^(input_resolution|context_length|vocab_size)$", None),
    (r"(^|\.)attn_mask$", None),
]

# CLIP of Hugging Face -> open_clip's, once its three attention projections are one
HF_CLIP_RULES: Rules = [
    (r"\.position_ids$", None),
    (r"^text_model\.", ""),
    (r"^vision_model\.", "visual."),
    (r"embeddings\.class_embedding$", "class_embedding"),
    (r"embeddings\.patch_embedding\.", "conv1."),
    (r"embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"embeddings\.token_embedding\.", "token_embedding."),
    (r"encoder\.layers\.", "transformer.resblocks."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm", ".ln_"),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.pre_layrnorm\.", ".ln_pre."),
    (r"\.post_layernorm\.", ".ln_post."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^visual_projection\.weight$", "visual.proj"),
]


def lite0_state(path: Path | str) -> dict[str, Tensor]:
    """Return the package's EfficientNet-Lite0 under timm's names.

    Its pixels are (x - 0.5) / 0.5, x in [0, 1].
    """
    return rename(read_state_dict(path, "_conv_stem."), LITE0_RULES)


def bert_state(path: Path | str) -> dict[str, Tensor]:
    """Return a published BERT (file or folder) under the names of `backbones.bert`."""
    return rename(read_state_dict(path, *BERT_STARTS), BERT_RULES)


def clip_state(path: Path | str) -> dict[str, Tensor]:
    """Return a published CLIP under the names of open_clip.

    The file is open_clip's or fine-tuned with it, OpenAI's archive, or Hugging Face's. No file
    holds the activation that it was trained with.
    """
    state = rename(read_state_dict(path, *CLIP_STARTS), CLIP_RULES)
    if "visual_projection.weight" not in state:
        return state
    turned = {
        name: value.t() if name.endswith("_projection.weight") else value
        for name, value in state.items()
    }
    return rename(_packed(turned), HF_CLIP_RULES)


def _packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join q_proj, k_proj and v_proj of each attention to the one in_proj of torch's own."""
    packed = {}
    for name, value in state.items():
        if found := re.fullmatch(r"(.+\.)([qkv])_proj\.(weight|bias)", name):
            start, which, kind = found.groups()
            if which == "q" and all(f"{start}{other}_proj.{kind}" in state for other in "kv"):
                packed[f"{start}in_proj_{kind}"] = torch.cat(
                    [state[f"{start}{each}_proj.{kind}"] for each in "qkv"]
                )
        else:
            packed[name] = value
    return packed


# CLIP's image tower of open_clip -> the vision model of transformers, once its one attention
# projection is three
CLIP_VISION_RULES: Rules = [
    (r"^visual\.", ""),
    (r"^(ln_post\.|proj$)", None),
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_", ".layer_norm"),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def clip_vision_state(path: Path | str, blocks: int) -> dict[str, Tensor]:
    """Return the first `blocks` blocks of a CLIP's image tower.

    They are named as in `backbones.clip_vision`. The file is any that `clip_state` reads, or holds
    the tower alone.
    """
    state = clip_state(path)
    visual = {name: value for name, value in state.items() if name.startswith("visual.")}
    return clip_vision_state_of(visual or state, blocks)


def clip_vision_state_of(state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Do the same as `clip_vision_state` from the tensors of open_clip's image tower."""
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        if joined := re.fullmatch(r"(.+\.attn\.)in_proj_(weight|bias)", name):
            for which, part in zip("qkv", value.chunk(3), strict=False):
                split[f"{joined[1]}{which}_proj.{joined[2]}"] = part
        else:
            split[name] = value
    named = rename(split, CLIP_VISION_RULES)
    return {
        name: value
        for name, value in named.items()
        if not (found := re.match(r"encoder\.layers\.(\d+)\.", name)) or int(found[1]) < blocks
    }


def ift_state(path: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a published BERT that BITA's transformer starts from."""
    return ift_names.from_bert(read_state_dict(path, *BERT_STARTS))


def opt_state(path: Path | str) -> dict[str, Tensor]:
    """Return a published OPT under the names of `OPTForCausalLM`.

    Its output layer is its word embedding.
    """
    state = rename(
        read_state_dict(path, "model.decoder.", "decoder."),
        [(r"^(model\.)?decoder\.", "model.decoder.")],
    )
    return {"lm_head.weight": state["model.decoder.embed_tokens.weight"]} | state


def clip_resnet_state(path: Path | str) -> dict[str, Tensor]:
    """Return the image tower of a published CLIP ResNet-50 without its last projection.

    That one leads into the CLIP's own width.
    """
    seen = {name: value for name, value in clip_state(path).items() if name.startswith("visual.")}
    return rename(seen, [(r"^visual\.", ""), (r"^attnpool\.c_proj\.", None)])


def vilt_state(path: Path | str) -> dict[str, Tensor]:
    """Return a published ViLT, of its authors or transformers, under the names of `ViltModel`.

    Heads are dropped.
    """
    state = vilt_names.read_trunk(read_state_dict(path))
    return rename(state, [(r"^rank_output\.", None), (r"^vilt\.", "")])


def vilt_rank_state(path: Path | str) -> dict[str, Tensor]:
    """Return weight and bias of a ViLT's rank head, else of the match row of its matching head.

    Empty if the file has neither.
    """
    state = vilt_names.read_trunk(read_state_dict(path))
    return {
        name.removeprefix("rank_output."): value
        for name, value in state.items()
        if name.startswith("rank_output.")
    }


# What `Known.layout` and `Tower.layout` name; "": the file has our module's names already.
LAYOUTS: dict[str, Callable[[Path | str], dict[str, Tensor]]] = {
    "": read_state_dict,
    "lite0": lite0_state,
    "bert": bert_state,
    "clip": clip_state,
    "clip_resnet": clip_resnet_state,
    "vilt": vilt_state,
    "vilt_rank": vilt_rank_state,
    "ift": ift_state,
    "opt": opt_state,
    "clip_vision_3": partial(clip_vision_state, blocks=3),
    "clip_vision_21": partial(clip_vision_state, blocks=21),
}
