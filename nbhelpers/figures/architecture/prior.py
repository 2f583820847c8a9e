"""Draw the two systems with a scene prior: PIR and PIR-CLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from nbhelpers.figures.architecture.drawing import Arrow, Box, Diagram, shape
from nbhelpers.figures.style import styled

if TYPE_CHECKING:
    from nbhelpers.figures.architecture.sizes import CLIPSizes, PIRSizes
    from nbhelpers.papers.pir import PIRConfig
    from nbhelpers.papers.pir_clip import PIRCLIPConfig

WIDTH = 12.4
DATA, TOWER, MIDDLE, SELECT, EMBED = 0.8, 2.66, 5.48, 8.42, 11.33  # the columns
IMAGE, PRIOR, TEXT = 4.4, 2.85, 1.05  # the rows
BETWEEN = (IMAGE + TEXT) / 2  # where the losses stand
TOP = 5.35  # where the global token passes over the boxes


@styled
def pir() -> Figure:
    """Draw PIR at the size of the paper."""
    from nbhelpers.figures.architecture import sizes  # which needs torch
    from nbhelpers.papers.pir import PIRConfig

    config = PIRConfig.paper()
    towers = sizes.of_pir(config)
    return Diagram(
        (WIDTH, 5.5),
        _pir_image_boxes(config, towers) + _pir_text_boxes(config),
        _pir_image_arrows(config, towers) + _pir_text_arrows(config, towers),
        note="B: pairs in a batch, L: words of a caption",
    ).draw()


def _pir_image_boxes(c: PIRConfig, towers: PIRSizes) -> list[Box]:
    pixels = shape("B", 3, towers.image, towers.image)
    prior = "trained" if c.finetune_prior else "frozen"
    scenes = "trained on the\nscenes of AID"
    kept = f"b = softmax(S c); of\n{c.candidates} tokens {c.filter_size} stay"
    layers = f"{c.instru_num} layers: c asks,\nthe tokens answer"
    attention = "SelfAttention\nCrossAttention"
    return [
        Box("image", (DATA, IMAGE), 1.36, "image", pixels, look="data"),
        Box("vision", (TOWER, IMAGE), 1.85, "Swin-T", "image tower", "PIR.vision_encoder"),
        Box("prior", (TOWER, PRIOR), 1.85, "ResNet-50", scenes, "PIR.conv_encoder", prior),
        Box(
            "project",
            (MIDDLE, (IMAGE + PRIOR) / 2),
            1.75,
            "projections",
            "S: image tokens\nc: instruction",
            "PIR.instruct",
            height=IMAGE - PRIOR + 0.9,
        ),
        Box("belief", (SELECT, IMAGE), 1.8, "VIR: belief", kept, "select_tokens", "rule"),
        Box("pae", (SELECT, PRIOR), 1.8, "VIR: Spatial-PAE", layers, attention, "idea"),
        Box("v", (EMBED, IMAGE), 1.95, "image embedding", "norm(g + head(F₀))", "PIR.embed_images"),
    ]


def _pir_image_arrows(c: PIRConfig, towers: PIRSizes) -> list[Arrow]:
    width = c.embed_dim
    asked = f"S {shape('B', towers.tokens, width)}\nc {shape('B', 1, width)}"
    kept = f"F {shape('B', c.filter_size, width)}"
    over = ((MIDDLE, TOP), (EMBED, TOP))
    return [
        Arrow("image:right", "vision:left"),
        Arrow("image:bottom", "prior:left"),
        Arrow("vision:right", "project:left", shape("B", towers.tokens, towers.vision)),
        Arrow("prior:right", "project:left", shape("B", towers.prior)),
        Arrow("project:right", "belief:left", asked),
        Arrow("project:right", "pae:left", f"c {shape('B', 1, width)}"),
        Arrow("belief:bottom", "pae:top", kept),
        Arrow("pae:right", "v:left", kept, piece=1),
        Arrow(
            "project:top", "v:top", f"g, the global token: {shape('B', width)}", over, place="below"
        ),
        Arrow("v:bottom", "loss:top", shape("B", width)),
    ]


def _pir_text_boxes(c: PIRConfig) -> list[Box]:
    cycles = f"{c.cycle_num} cycles: the state\nasks its own words"
    attention = "SelfAttention\nCrossAttention"
    losses = "contrastive_loss\naffiliation_loss"
    return [
        Box("caption", (DATA, TEXT), 1.36, "caption", shape("B", "L"), look="data"),
        Box("text", (TOWER, TEXT), 1.85, "BERT-base", "text tower", "PIR.text_encoder"),
        Box("words", (MIDDLE, TEXT), 1.75, "projection", "of every word", "PIR.text_proj"),
        Box("lca", (SELECT, TEXT), 1.8, "LCA", cycles, attention, "idea"),
        Box("t", (EMBED, TEXT), 1.95, "text embedding", "norm(t₀ + head(l₀))", "PIR.embed_texts"),
        Box("loss", (EMBED, BETWEEN), 1.75, "losses", "pairs, and classes", losses, "loss"),
    ]


def _pir_text_arrows(c: PIRConfig, towers: PIRSizes) -> list[Arrow]:
    words = shape("B", "L", c.embed_dim)
    return [
        Arrow("caption:right", "text:left"),
        Arrow("text:right", "words:left", shape("B", "L", towers.text)),
        Arrow("words:right", "lca:left", f"t {words}"),
        Arrow("lca:right", "t:left", f"l {words}"),
        Arrow("t:top", "loss:bottom", shape("B", c.embed_dim)),
    ]


@styled
def pir_clip() -> Figure:
    """Draw PIR-CLIP at the size of the paper."""
    from nbhelpers.figures.architecture import sizes  # which needs torch
    from nbhelpers.papers.pir_clip import PIRCLIPConfig

    config = PIRCLIPConfig.paper()
    towers = sizes.of_clip(config)
    return Diagram(
        (WIDTH, 5.05),
        _pir_clip_image_boxes(config, towers) + _pir_clip_text_boxes(towers),
        _pir_clip_image_arrows(towers) + _pir_clip_text_arrows(towers),
        note="B: pairs in a batch",
    ).draw()


def _pir_clip_image_boxes(c: PIRCLIPConfig, towers: CLIPSizes) -> list[Box]:
    pixels = shape("B", 3, towers.image, towers.image)
    belief = "X: image tokens\ny: instruction token\nb = softmax(X y)"
    weights = "w = 1/√(1 + place)\nX′ = norm((b + w) X)"
    blocks = f"{towers.layers} blocks read [y; X′]\n{shape('B', 1 + towers.tokens, towers.vision)}"
    pooled = "norm(output at y)"
    return [
        Box("image", (DATA, IMAGE), 1.36, "image", pixels, look="data"),
        Box("patches", (TOWER, IMAGE), 1.85, "patches", "of CLIP ViT-B/32", "clip.image_tokens"),
        Box(
            "prior",
            (TOWER, PRIOR),
            1.85,
            "ResNet-50",
            "instruction encoder",
            "PIRCLIP.res_visual",
            "frozen" if c.freeze_instruction else "trained",
        ),
        Box(
            "belief",
            (MIDDLE, (IMAGE + PRIOR) / 2),
            1.75,
            "belief",
            belief,
            "PIRCLIP.instruct",
            "idea",
            height=IMAGE - PRIOR + 0.9,
        ),
        Box("soft", (SELECT, IMAGE), 1.85, "soft belief", weights, "soft_belief", "rule"),
        Box("blocks", (SELECT, PRIOR), 1.85, "image tower", blocks, "PIRCLIP.pooled"),
        Box("v", (EMBED, IMAGE), 2.0, "image embedding", pooled, "PIRCLIP.embed_images"),
    ]


def _pir_clip_image_arrows(towers: CLIPSizes) -> list[Arrow]:
    tokens = shape("B", towers.tokens, towers.vision)
    ranked = f"X {tokens}\nb {shape('B', towers.tokens)}"
    return [
        Arrow("image:right", "patches:left"),
        Arrow("image:bottom", "prior:left"),
        Arrow("patches:right", "belief:left", tokens),
        Arrow("prior:right", "belief:left", shape("B", towers.embed_dim)),
        Arrow("belief:right", "soft:left", ranked),
        Arrow("belief:right", "blocks:left", f"y {shape('B', 1, towers.vision)}"),
        Arrow("soft:bottom", "blocks:top", f"X′ {tokens}"),
        Arrow("blocks:right", "v:left", shape("B", towers.embed_dim), piece=1),
        Arrow("v:bottom", "loss:top", shape("B", towers.embed_dim)),
    ]


def _pir_clip_text_boxes(towers: CLIPSizes) -> list[Box]:
    blocks = f"{towers.layers} causal blocks,\nlast word"
    losses = "contrastive_loss\naffiliation_loss"
    return [
        Box("caption", (DATA, TEXT), 1.36, "caption", shape("B", towers.words), look="data"),
        Box("words", (TOWER, TEXT), 1.85, "words", "of CLIP", "clip.text_tokens"),
        Box("text", (SELECT, TEXT), 1.85, "text tower", blocks, "clip.pool_text"),
        Box("t", (EMBED, TEXT), 2.0, "text embedding", "norm", "PIRCLIP.embed_texts"),
        Box("loss", (EMBED, BETWEEN), 1.75, "losses", "pairs, and classes", losses, "loss"),
    ]


def _pir_clip_text_arrows(towers: CLIPSizes) -> list[Arrow]:
    words = shape("B", towers.words, towers.text)
    return [
        Arrow("caption:right", "words:left"),
        Arrow("words:right", "text:left", words),
        Arrow("text:right", "t:left", shape("B", towers.embed_dim)),
        Arrow("t:top", "loss:bottom", shape("B", towers.embed_dim)),
    ]
