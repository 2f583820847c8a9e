"""Draw PE-RSITR: one adapter beside all blocks of a frozen CLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from nbhelpers.figures.architecture.drawing import Arrow, Box, Diagram, Frame, shape
from nbhelpers.figures.style import styled

if TYPE_CHECKING:
    from nbhelpers.figures.architecture.sizes import CLIPSizes
    from nbhelpers.papers.pe_rsitr import PERSITRConfig

SIZE = (12.4, 5.9)
DATA, TOKENS, ATTENTION, FFN, POOL = 0.8, 2.65, 5.5, 8.05, 11.25  # the columns
IMAGE, TEXT = 4.95, 1.15  # the rows
BETWEEN = (IMAGE + TEXT) / 2


@styled
def pe_rsitr() -> Figure:
    """Draw PE-RSITR at the size of the paper."""
    from nbhelpers.figures.architecture import sizes  # which needs torch
    from nbhelpers.papers.pe_rsitr import PERSITRConfig

    config = PERSITRConfig.paper()
    towers = sizes.of_clip(config)
    inside = ("attend_image", "ffn_image", "adapter", "attend_text", "ffn_text")
    return Diagram(
        SIZE,
        _image_boxes(towers) + _shared_boxes(config, towers) + _text_boxes(towers),
        _image_arrows(towers) + _text_arrows(towers) + _view_arrows(),
        [Frame("blocks", inside, f"each of the {towers.layers} blocks, in both towers")],
        note="B: pairs in a batch; dashed: in training",
    ).draw()


def _image_boxes(towers: CLIPSizes) -> list[Box]:
    pixels = shape("B", 3, towers.image, towers.image)
    mlp = "x + MLP(LN(x)) + A(x)"
    return [
        Box("image", (DATA, IMAGE), 1.36, "image", pixels, look="data"),
        Box("patches", (TOKENS, IMAGE), 1.75, "patches", "", "clip.image_tokens", "frozen"),
        Box(
            "attend_image",
            (ATTENTION, IMAGE),
            1.5,
            "attention",
            "x + Attn(LN(x))",
            "through_blocks",
            "frozen",
        ),
        Box("ffn_image", (FFN, IMAGE), 1.9, "FFN and adapter", mlp, "PERSITR.adapt", "frozen"),
        Box(
            "v",
            (POOL, IMAGE),
            2.05,
            "image embedding",
            "class token",
            "PERSITR.embed_images",
            "frozen",
        ),
    ]


def _shared_boxes(c: PERSITRConfig, towers: CLIPSizes) -> list[Box]:
    ways = [
        f"{name}: {width} → {c.bottleneck} → {width - c.share_dim} + {c.share_dim} shared"
        for name, width in (("image", towers.vision), ("caption", towers.text))
    ]
    adapter = "\n".join(["A(x): one for all blocks", *ways])
    view = f"dropout {c.view_dropout:g} on\nthe tokens"
    terms = "pairs, image views,\ncaption views"
    middle = (ATTENTION + FFN) / 2
    return [
        Box("view", (TOKENS, BETWEEN), 1.5, "second view", view, "PERSITR.view", "rule"),
        Box("adapter", (middle, BETWEEN), 3.6, "MRS-Adapter", adapter, "MRSAdapter", "idea"),
        Box("loss", (POOL, BETWEEN), 1.9, "HMMC loss", terms, "ranking_loss", "loss"),
    ]


def _text_boxes(towers: CLIPSizes) -> list[Box]:
    mlp = "x + MLP(LN(x)) + A(x)"
    return [
        Box("caption", (DATA, TEXT), 1.36, "caption", shape("B", towers.words), look="data"),
        Box("words", (TOKENS, TEXT), 1.75, "words", "", "clip.text_tokens", "frozen"),
        Box(
            "attend_text",
            (ATTENTION, TEXT),
            1.5,
            "attention",
            "x + Attn(LN(x))",
            "through_blocks",
            "frozen",
        ),
        Box("ffn_text", (FFN, TEXT), 1.9, "FFN and adapter", mlp, "PERSITR.adapt", "frozen"),
        Box(
            "t", (POOL, TEXT), 2.05, "text embedding", "last word", "PERSITR.embed_texts", "frozen"
        ),
    ]


def _image_arrows(towers: CLIPSizes) -> list[Arrow]:
    tokens = shape("B", towers.tokens, towers.vision)
    return [
        Arrow("image:right", "patches:left"),
        Arrow("patches:right", "attend_image:left", tokens),
        Arrow("attend_image:right", "ffn_image:left"),
        Arrow("attend_image:bottom", "adapter:top", f"x {tokens}"),
        Arrow("adapter:top", "ffn_image:bottom:0.3", f"A(x) {tokens}", place="left"),
        Arrow("ffn_image:right", "v:left", tokens),
        Arrow("v:bottom", "loss:top", f"2 × {shape('B', towers.embed_dim)}"),
    ]


def _text_arrows(towers: CLIPSizes) -> list[Arrow]:
    tokens = shape("B", towers.words, towers.text)
    return [
        Arrow("caption:right", "words:left"),
        Arrow("words:right", "attend_text:left", tokens, place="below"),
        Arrow("attend_text:right", "ffn_text:left"),
        Arrow("attend_text:top", "adapter:bottom", f"x {tokens}"),
        Arrow("adapter:bottom", "ffn_text:top:0.3", f"A(x) {tokens}", place="left"),
        Arrow("ffn_text:right", "t:left", tokens, place="below"),
        Arrow("t:top", "loss:bottom", f"2 × {shape('B', towers.embed_dim)}"),
    ]


def _view_arrows() -> list[Arrow]:
    return [
        Arrow("patches:bottom", "view:top", dashed=True),
        Arrow("words:top", "view:bottom", dashed=True),
        Arrow(
            "view:right:0.2", "attend_image:left:-0.15", "second pass", place="left", dashed=True
        ),
        Arrow("view:right:-0.2", "attend_text:left:0.15", "second pass", place="left", dashed=True),
    ]
