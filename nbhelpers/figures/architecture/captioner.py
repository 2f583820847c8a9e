"""Draw BITA: queries and a Fourier transformer between two frozen networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from nbhelpers.figures.architecture.drawing import Arrow, Box, Diagram, Frame, shape
from nbhelpers.figures.style import styled

if TYPE_CHECKING:
    from nbhelpers.figures.architecture.sizes import BITASizes
    from nbhelpers.papers.bita import BITAConfig

SIZE = (12.4, 6.2)
DATA, EMBED, MIX, ATTEND, FFN, HEAD = 0.8, 2.41, 5.05, 6.83, 8.4, 11.3  # the columns
IMAGE, QUERIES, TEXT = 5.55, 3.35, 1.2  # the rows
BETWEEN = (QUERIES + TEXT) / 2


@styled
def bita() -> Figure:
    """Draw BITA at the size of the paper."""
    from nbhelpers.figures.architecture import sizes  # which needs torch
    from nbhelpers.papers.bita import BITAConfig

    config = BITAConfig.paper()
    towers = sizes.of_bita(config)
    return Diagram(
        SIZE,
        _input_boxes(config, towers) + _layer_boxes(config) + _head_boxes(),
        _input_arrows(config, towers) + _layer_arrows() + _head_arrows(config, towers),
        [Frame("ift", ("mix", "attend", "ffn"), f"IFT: {config.layers} such layers", "ift.IFT")],
        note="B: images or captions in a batch",
    ).draw()


def _input_boxes(c: BITAConfig, towers: BITASizes) -> list[Box]:
    pixels = shape("B", 3, towers.image, towers.image)
    queries = shape("1", c.queries, c.width)
    return [
        Box("image", (DATA, IMAGE), 1.36, "image", pixels, look="data"),
        Box(
            "vision", (3.1, IMAGE), 2.6, "CLIP ViT-L/14", "", "ImageReader.image_features", "frozen"
        ),
        Box("queries", (DATA, QUERIES), 1.36, "queries", queries),
        Box("caption", (DATA, TEXT), 1.36, "caption", shape("B", c.text_length), look="data"),
        _tall(
            "embed", EMBED, 1.4, "embedding", "queries, or\nwords with\npositions", "ift.Embeddings"
        ),
    ]


def _layer_boxes(c: BITAConfig) -> list[Box]:
    fourier = "m = Re ℱ(h)\nf = LN(h + m)\nno weights but\nthe norm's"
    read = "the queries\nread the image"
    return [
        _tall("mix", MIX, 1.5, "Fourier mixing", fourier, "ift.Mixing", "idea"),
        Box("attend", (ATTEND, QUERIES), 1.55, "cross-attention", read, "ImageAttention"),
        _tall("ffn", FFN, 1.1, "FFN", "one for\nqueries, one\nfor words", ""),
    ]


def _tall(
    key: str, x: float, width: float, term: str, note: str, code: str, look: str = "trained"
) -> Box:
    height = QUERIES - TEXT + 0.8
    return Box(key, (x, BETWEEN), width, term, note, code, look, height)


def _head_boxes() -> list[Box]:
    return [
        Box("prefix", (8.2, IMAGE), 1.65, "prefix", "stages 2 and 3", "Captioner.prefix"),
        Box(
            "decoder",
            (HEAD, IMAGE),
            2.0,
            "OPT-2.7B",
            "writes the caption",
            "Captioner.opt_model",
            "frozen",
        ),
        Box("words_loss", (HEAD, 4.52), 1.8, "caption loss", "", "Captioner.loss", "loss"),
        Box("v", (HEAD, QUERIES), 2.0, "image embedding", "stage 1", "Aligner.embed_images"),
        Box(
            "loss",
            (HEAD, BETWEEN),
            1.95,
            "contrastive loss",
            "the best query counts",
            "alignment_loss",
            "loss",
        ),
        Box("t", (HEAD, TEXT), 2.0, "text embedding", "stage 1", "Aligner.embed_texts"),
    ]


def _input_arrows(c: BITAConfig, towers: BITASizes) -> list[Arrow]:
    return [
        Arrow("image:right", "vision:left"),
        Arrow("vision:right", "attend:top", shape("B", towers.tokens, towers.vision), piece=0),
        Arrow("queries:right", "embed:left"),
        Arrow("caption:right", "embed:left"),
        Arrow("embed:right:1.07", "mix:left:1.07", shape("B", c.queries, c.width)),
        Arrow("embed:right:-1.07", "mix:left:-1.07", shape("B", c.text_length, c.width)),
    ]


def _layer_arrows() -> list[Arrow]:
    return [
        Arrow("mix:right", "attend:left"),
        Arrow("attend:right", "ffn:left"),
        Arrow("mix:right:-1.07", "ffn:left:-1.07", "words pass by"),
    ]


def _head_arrows(c: BITAConfig, towers: BITASizes) -> list[Arrow]:
    queries = shape("B", c.queries, c.width)
    return [
        Arrow("ffn:top", "prefix:bottom", queries),
        Arrow("prefix:right", "decoder:left", shape("B", c.queries, towers.decoder)),
        Arrow("decoder:bottom", "words_loss:top"),
        Arrow("ffn:right", "v:left", queries),
        Arrow("ffn:right", "t:left", shape("B", c.text_length, c.width)),
        Arrow("v:bottom", "loss:top", shape("B", c.queries, c.embed_dim)),
        Arrow("t:top", "loss:bottom", shape("B", c.embed_dim)),
    ]
