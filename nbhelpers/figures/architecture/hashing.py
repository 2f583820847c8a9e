"""Draw CFITR: a ViLT cut in two, with hash codes between the halves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from nbhelpers.figures.architecture.drawing import Arrow, Box, Diagram, Frame, shape
from nbhelpers.figures.style import styled

if TYPE_CHECKING:
    from nbhelpers.figures.architecture.sizes import ViLTSizes
    from nbhelpers.papers.cfitr import CFITRConfig

SIZE = (12.4, 6.1)
DATA, STATES, LFEM, CODES, COARSE, FINE = 0.8, 2.63, 5.3, 7.0, 9.13, 11.4  # the columns
IMAGE, TEXT = 4.85, 1.5  # the rows
BETWEEN = (IMAGE + TEXT) / 2
TOP, LOW = 5.9, 0.65  # where the stored states pass around the boxes


@styled
def cfitr(candidates: int = 70) -> Figure:
    """Draw CFITR at the size of the paper, with the number of candidates that are reranked."""
    from nbhelpers.figures.architecture import sizes  # which needs torch
    from nbhelpers.papers.cfitr import CFITRConfig

    config = CFITRConfig.paper()
    trunk = sizes.of_cfitr(config)
    return Diagram(
        SIZE,
        _stream_boxes(config, trunk) + _stage_boxes(config, trunk, candidates),
        _stream_arrows(config, trunk) + _stage_arrows(config, trunk),
        [Frame("trunk", ("image_states", "text_states"), "the same weights", pad=0.07)],
        note="B: images or captions, P: pairs",
    ).draw()


def _stream_boxes(c: CFITRConfig, trunk: ViLTSizes) -> list[Box]:
    pixels = shape("B", 3, trunk.image, trunk.image)
    lower = f"layers 0 to {c.split - 1}"
    side = round((trunk.tokens - 1) ** 0.5)
    head = "learned pooling,\nhash head, tanh"
    return [
        Box("image", (DATA, IMAGE), 1.36, "image", pixels, look="data"),
        Box("image_states", (STATES, IMAGE), 1.8, "ViLT", lower, "CFITR.image_states"),
        Box("lfem", (LFEM, IMAGE), 1.05, "LFEM", f"convolves\n{side} × {side}", "LFEM", "idea"),
        Box("image_codes", (CODES, IMAGE), 1.75, "DSHM", head, "CFITR.image_codes", "idea"),
        Box("caption", (DATA, TEXT), 1.36, "caption", shape("B", trunk.words), look="data"),
        Box("text_states", (STATES, TEXT), 1.8, "ViLT", lower, "CFITR.text_states"),
        Box("text_codes", (CODES, TEXT), 1.75, "DSHM", head, "CFITR.text_codes", "idea"),
    ]


def _stage_boxes(c: CFITRConfig, trunk: ViLTSizes, candidates: int) -> list[Box]:
    losses = "triplet_loss\nquantisation_loss\nbalance_loss"
    coarse = f"Hamming distance\nof signs, PPSR:\nthe best {candidates} stay"
    fine = f"ViLT, layers {c.split} to {trunk.layers - 1},\nreads both together"
    own = f"own caption against\n{c.false_texts} false ones"
    return [
        Box("hash_loss", (CODES, BETWEEN), 1.75, "hash losses", "", losses, "loss"),
        Box(
            "coarse",
            (COARSE, BETWEEN),
            1.7,
            "coarse stage",
            coarse,
            "negative_hamming\npost_process",
            "rule",
        ),
        Box("fine", (FINE, BETWEEN), 1.75, "SSM: fine stage", fine, "CFITR.score_pairs", "idea"),
        Box("rerank_loss", (FINE, TEXT), 1.75, "rerank loss", own, "rerank_loss", "loss"),
    ]


def _stream_arrows(c: CFITRConfig, trunk: ViLTSizes) -> list[Arrow]:
    image, text = (shape("B", count, trunk.width) for count in (trunk.tokens, trunk.words))
    code = shape("B", c.bits)
    return [
        Arrow("image:right", "image_states:left"),
        Arrow("image_states:right", "lfem:left", image),
        Arrow("lfem:right", "image_codes:left"),
        Arrow("image_codes:bottom", "hash_loss:top", f"h {code}"),
        Arrow("image_codes:right", "coarse:top", f"h {code}", piece=0),
        Arrow("caption:right", "text_states:left"),
        Arrow("text_states:right", "text_codes:left", text),
        Arrow("text_codes:top", "hash_loss:bottom", f"h {code}"),
        Arrow("text_codes:right", "coarse:bottom", f"h {code}", piece=0, place="below"),
    ]


def _stage_arrows(c: CFITRConfig, trunk: ViLTSizes) -> list[Arrow]:
    image, text = (shape("B", count, trunk.width) for count in (trunk.tokens, trunk.words))
    gap = (COARSE + FINE) / 2
    around = ((STATES, LOW), (gap, LOW), (gap, BETWEEN - 0.3))
    return [
        Arrow("coarse:right", "fine:left", "pairs"),
        Arrow(
            "lfem:top",
            "fine:top",
            f"stored image states {image}",
            ((LFEM, TOP), (FINE, TOP)),
            place="below",
        ),
        Arrow("text_states:bottom", "fine:left:-0.3", f"stored caption states {text}", around),
        Arrow("fine:bottom", "rerank_loss:top", f"scores {shape('P')}"),
    ]
