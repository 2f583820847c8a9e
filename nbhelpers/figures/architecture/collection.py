"""Draw the whole collection: what each notebook reads and hands on."""

from __future__ import annotations

from matplotlib.figure import Figure

from nbhelpers.figures.architecture.drawing import Arrow, Box, Diagram, Frame
from nbhelpers.figures.style import styled

SIZE = (12.4, 6.4)
HEIGHT = 0.78  # of a box
TOP, LOW = 6.25, 0.55  # where arrows pass around the systems
PREPARE, TRAIN, MEASURE, BOARD = 1.2, 4.75, 8.3, 11.35  # the columns
ROWS = (5.15, 4.2, 3.25, 2.3, 1.35)  # from top to bottom
SYSTEMS = (
    ("20_pir", "PIR", "a scene prior selects tokens"),
    ("21_pir_clip", "PIR-CLIP", "a soft belief weighs tokens"),
    ("22_pe_rsitr", "PE-RSITR", "an adapter in a frozen CLIP"),
    ("23_cfitr", "CFITR", "hash codes, then reranking"),
    ("24_bita", "BITA", "queries for a frozen decoder"),
)
MEASURES = (
    ("30_evaluate_retrieval\n31_errors_and_significance", "retrieval", ""),
    ("40_attention_and_belief", "where a system looks", "maps, and tests of them"),
    ("50_score_captions", "captions", "of BITA and of baselines"),
    ("25_two_stage_search\n60_search", "search", ""),
    ("32_bring_your_model\n33_ideas", "a model, an idea", ""),
)


@styled
def pipeline() -> Figure:
    """Draw the notebooks from the data to the leaderboard."""
    systems = [
        Box(code, (TRAIN, y), 2.45, term, note, code, "trains", HEIGHT)
        for (code, term, note), y in zip(SYSTEMS, ROWS, strict=True)
    ]
    measures = [
        Box(code, (MEASURE, y), 2.6, term, note, code, "measures", HEIGHT)
        for (code, term, note), y in zip(MEASURES, ROWS, strict=True)
    ]
    frames = [
        Frame("systems", tuple(box.key for box in systems), "five systems"),
        Frame("measures", tuple(box.key for box in measures), "use and measure"),
    ]
    boxes = [*_prepare(), *systems, *measures, *_board()]
    return Diagram(SIZE, boxes, _arrows(), frames, "begin with 00_start_here").draw()


def _prepare() -> list[Box]:
    return [
        Box(
            "audit",
            (PREPARE, ROWS[0]),
            2.0,
            "audit",
            "duplicates, ceilings",
            "11_audit_data",
            "prepares",
        ),
        Box(
            "data",
            (PREPARE, ROWS[2]),
            2.0,
            "data",
            "images and captions",
            "10_prepare_data",
            "prepares",
        ),
        Box(
            "weights",
            (PREPARE, ROWS[4]),
            2.0,
            "starting weights",
            "of every tower",
            "12_starting_weights",
            "prepares",
        ),
    ]


def _board() -> list[Box]:
    return [
        Box(
            "board",
            (BOARD, ROWS[2]),
            1.6,
            "leaderboard",
            "all records",
            "90_leaderboard",
            "measures",
        )
    ]


def _arrows() -> list[Arrow]:
    own, beside = MEASURES[-1][0], (TRAIN + MEASURE) / 2 - 0.15
    return [
        Arrow("data:top", "audit:bottom"),
        Arrow("data:bottom", "weights:top"),
        Arrow("data:right", "systems:left", "images,\ncaptions"),
        Arrow("weights:right", "systems:left", "weights"),
        Arrow("systems:right", "measures:left", "models"),
        Arrow(
            "weights:bottom",
            f"{own}:left",
            "weights and data",
            ((PREPARE, LOW), (beside, LOW), (beside, ROWS[-1])),
        ),
        Arrow("measures:right", "board:left", "records"),
        Arrow("systems:top", "board:top", "records", ((TRAIN, TOP), (BOARD, TOP)), place="below"),
    ]
