"""Block diagrams name what the package holds, show its sizes, and nothing in them overlaps."""

from __future__ import annotations

import importlib
import itertools
from functools import cache
from types import ModuleType

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor, nn

from nbhelpers import figures
from nbhelpers.figures.architecture.drawing import Arrow, Box, Diagram, route, shape
from nbhelpers.figures.architecture.line_art import BLENDS
from nbhelpers.papers import bita, cfitr, clip, ift, pe_rsitr, pir, pir_clip
from nbhelpers.runs.batch import CHAIN
from nbhelpers.tasks import two_stage

NAMES = ("pipeline", "pir", "pir_clip", "pe_rsitr", "cfitr", "bita")
SYSTEMS = NAMES[1:]
# where names without a module are looked up
MODULES: dict[str, tuple[ModuleType, ...]] = {
    "pir": (pir,),
    "pir_clip": (pir_clip,),
    "pe_rsitr": (pe_rsitr,),
    "cfitr": (cfitr, two_stage),
    "bita": (bita, ift),
}
FROZEN: dict[str, set[str]] = {
    "pir": {"prior"},
    "pir_clip": {"prior"},
    "pe_rsitr": {"patches", "words", "attend_image", "attend_text", "ffn_image", "ffn_text"}
    | {"v", "t"},
    "cfitr": set(),
    "bita": {"vision", "decoder"},
}
BATCH = 3
MOST_BYTES = 60_000


@cache
def drawn(name: str) -> Figure:
    figure = getattr(figures, name)()
    FigureCanvasAgg(figure).draw()
    return figure


def of_kind(figure: Figure, kind, prefix: str) -> dict[str, list]:
    found: dict[str, list] = {}
    for artist in figure.findobj(kind):
        begin, _, key = (artist.get_gid() or "").partition(":")
        if begin == prefix:
            found.setdefault(key, []).append(artist)
    return found


def outlines(name: str) -> dict[str, Bbox]:
    return {
        key: patch.get_window_extent()
        for key, (patch,) in of_kind(drawn(name), FancyBboxPatch, "box").items()
    }


def texts(name: str) -> list[Text]:
    return [text for text in drawn(name).findobj(Text) if text.get_text().strip()]


def pieces(name: str) -> list[Bbox]:
    """Return the straight pieces of all arrows, as boxes without width or height."""
    found = []
    for (line,) in of_kind(drawn(name), Line2D, "arrow").values():
        points = line.axes.transData.transform(line.get_xydata())
        found += [Bbox([a, b]) for a, b in itertools.pairwise(points)]
    return found


def meet(a: Bbox, b: Bbox) -> bool:
    return max(a.xmin, b.xmin) < min(a.xmax, b.xmax) and max(a.ymin, b.ymin) < min(a.ymax, b.ymax)


def inches(name: str, length: float) -> float:
    return length * drawn(name).dpi


@cache
def model(name: str) -> nn.Module:
    """Build a model at the size of the paper, without memory for its weights."""
    classes = {
        "PIR": (pir.PIR, pir.PIRConfig),
        "PIRCLIP": (pir_clip.PIRCLIP, pir_clip.PIRCLIPConfig),
        "PERSITR": (pe_rsitr.PERSITR, pe_rsitr.PERSITRConfig),
        "CFITR": (cfitr.CFITR, cfitr.CFITRConfig),
        "Aligner": (bita.Aligner, bita.BITAConfig),
        "Captioner": (bita.Captioner, bita.BITAConfig),
    }
    kind, config = classes[name]
    with torch.device("meta"):
        return kind(config.paper()).eval()


def resolve(name: str, diagram: str) -> object:
    first, *rest = name.split(".")
    places = [module for module in MODULES[diagram] if hasattr(module, first)]
    found = (
        getattr(places[0], first)
        if places
        else importlib.import_module(f"nbhelpers.papers.{first}")
    )
    for part in rest:
        if not hasattr(found, part):
            found = model(found.__name__)  # made when the model is built
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_monospace_name_is_one_of_the_package(name):
    codes = [text for text in texts(name) if "Mono" in text.get_fontfamily()[0]]
    assert len(codes) >= 8
    for text in codes:
        found = resolve(text.get_text(), name)
        assert callable(found), text.get_text()


def test_the_collection_names_every_notebook():
    codes = [text.get_text() for text in texts("pipeline") if "Mono" in text.get_fontfamily()[0]]
    first, *others = [step.name for step in CHAIN]
    assert sorted(codes) == sorted(others)
    assert any(first in text.get_text() for text in texts("pipeline"))


@pytest.mark.parametrize("name", NAMES)
def test_a_diagram_has_few_boxes_large_letters_and_a_legend(name):
    assert 8 <= len(outlines(name)) <= 14
    assert min(text.get_fontsize() for text in texts(name)) >= 11
    assert 9 <= drawn(name).get_figwidth() <= 12.5
    swatches = set(of_kind(drawn(name), FancyBboxPatch, "swatch"))
    assert swatches == set(of_kind(drawn(name), Text, "legend")) and len(swatches) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_texts_lie_in_their_boxes(name):
    boxes, checked = outlines(name), 0
    for kind in ("term", "note", "code"):
        for key, lines in of_kind(drawn(name), Text, kind).items():
            for text in lines if key in boxes else []:
                extent, around = text.get_window_extent(), boxes[key].padded(-inches(name, 0.02))
                assert around.contains(extent.x0, extent.y0), text.get_text()
                assert around.contains(extent.x1, extent.y1), text.get_text()
                checked += 1
    assert checked >= 2 * len(boxes)


@pytest.mark.parametrize("name", NAMES)
def test_boxes_and_texts_overlap_nothing_and_stay_on_the_page(name):
    page, boxes = drawn(name).bbox, outlines(name)
    for a, b in itertools.combinations(boxes, 2):
        assert not meet(boxes[a].padded(inches(name, 0.05)), boxes[b]), (a, b)
    free = {
        text: text.get_window_extent()
        for text in texts(name)
        if (text.get_gid() or "").split(":")[-1] not in boxes
    }
    for text, extent in free.items():
        assert not [key for key, box in boxes.items() if meet(extent, box)], text.get_text()
        assert not [piece for piece in pieces(name) if crosses(piece, extent)], text.get_text()
    for a, b in itertools.combinations(free, 2):
        assert not meet(free[a], free[b]), (a.get_text(), b.get_text())
    for extent in [*boxes.values(), *free.values()]:
        assert page.contains(extent.x0, extent.y0) and page.contains(extent.x1, extent.y1)


def crosses(piece: Bbox, around: Bbox) -> bool:
    """Tell whether a piece of an arrow passes through a box."""
    inside = piece.padded(0.01)
    return meet(inside, around)


@pytest.mark.parametrize("name", NAMES)
def test_no_arrow_passes_through_a_box_or_along_another(name):
    shrunk = {key: box.padded(-inches(name, 0.03)) for key, box in outlines(name).items()}
    for piece in pieces(name):
        assert not [key for key, box in shrunk.items() if crosses(piece, box)], piece


@pytest.mark.parametrize("name", NAMES)
def test_labels_cross_no_frame(name):
    for frames in of_kind(drawn(name), FancyBboxPatch, "frame").values():
        frame = frames[0].get_window_extent()
        for labels in of_kind(drawn(name), Text, "label").values():
            label = labels[0].get_window_extent()
            inside = frame.contains(label.x0, label.y0) and frame.contains(label.x1, label.y1)
            assert inside or not meet(label, frame), labels[0].get_text()


@pytest.mark.parametrize("name", SYSTEMS)
def test_frozen_boxes_and_no_others_are_hatched(name):
    boxes = of_kind(drawn(name), FancyBboxPatch, "box")
    assert {key for key, (patch,) in boxes.items() if patch.get_hatch()} == FROZEN[name]


def test_what_is_drawn_as_frozen_is_frozen_in_the_model():
    parts = (
        model("PIR").conv_encoder,
        model("PIRCLIP").res_visual,
        model("PERSITR").clip,
        model("Aligner").visual_encoder,
        model("Captioner").opt_model,
    )
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    trained = (
        *model("PIR").vision_encoder.parameters(),
        *model("PERSITR").Uniadapt.parameters(),
        *model("Aligner").Fformer.parameters(),
    )
    assert all(p.requires_grad for p in (*trained, *model("CFITR").parameters()))


def pixels(size: int) -> Tensor:
    return torch.empty(BATCH, 3, size, size, device="meta")


def ids(length: int) -> Tensor:
    return torch.ones(BATCH, length, dtype=torch.long, device="meta")


def tensors_of_pir() -> list[Tensor]:
    net = model("PIR")
    seen = net.image_features(pixels(224))
    tokens, instruction = net.instruct(**seen)
    read = net.text_encoder(input_ids=ids(9)).last_hidden_state
    found = [*seen.values(), tokens, instruction, net.filter_tokens(tokens, instruction)]
    return [*found, net.embed_images(**seen), read, net.text_proj(read), net.embed_texts(read)]


def tensors_of_pir_clip() -> list[Tensor]:
    net, image = model("PIRCLIP"), pixels(224)
    tokens, instruction, logits = net.instruct(image)
    weighted = net.apply_belief(tokens, logits)
    found = [image, net.res_visual(image), tokens, instruction, logits, weighted]
    joined = torch.cat([instruction, weighted], 1)
    return [*found, joined, net.embed_images(image), clip.text_tokens(net.clip, ids(77))]


def tensors_of_pe_rsitr() -> list[Tensor]:
    net, image = model("PERSITR"), pixels(224)
    tokens, words = clip.image_tokens(net.clip, image), clip.text_tokens(net.clip, ids(77))
    # autocast, which the adapter turns off, does not know the device "meta"
    return [image, ids(77), tokens, words, clip.pool_image(net.clip, tokens)]


def tensors_of_cfitr() -> list[Tensor]:
    net, image = model("CFITR"), pixels(384)
    seen, read = net.image_states(image), net.text_states(ids(40), ids(40))
    return [image, ids(40), seen, read, net.image_codes(seen), net.text_codes(read)]


def tensors_of_bita() -> list[Tensor]:
    aligner, image = model("Aligner"), pixels(224)
    seen = aligner.image_features(image)["vision"]
    found = [image, ids(32), seen, aligner.read(seen), aligner.embed_images(seen)]
    return [*found, aligner.embed_texts(ids(32)), model("Captioner").prefix(seen)]


@pytest.mark.parametrize("name", SYSTEMS)
def test_shapes_are_those_of_the_model_at_the_size_of_the_paper(name):
    computed = globals()[f"tensors_of_{name}"]()
    lengths = {9: "L"} if name == "pir" else {}
    wanted = {
        shape("B", *(lengths.get(size, size) for size in tensor.shape[1:])) for tensor in computed
    }
    shown = " ".join(text.get_text() for text in texts(name))
    assert not [one for one in wanted if one not in shown]


def test_the_adapter_shows_the_widths_of_its_matrices():
    adapter = model("PERSITR").Uniadapt
    shown = "\n".join(text.get_text() for text in texts("pe_rsitr"))
    for name, down, up in (
        ("image", adapter.visual_down_proj, adapter.visual_up_proj),
        ("caption", adapter.down_proj, adapter.up_proj),
    ):
        shared = adapter.share_up_proj.out_features
        ways = f"{down.in_features} → {down.out_features} → {up.out_features} + {shared} shared"
        assert f"{name}: {ways}" in shown


def test_numbers_beside_the_shapes_are_those_of_the_configuration():
    shown = {name: " ".join(text.get_text() for text in texts(name)) for name in SYSTEMS}
    config = pir.PIRConfig.paper()
    assert f"{config.candidates} tokens {config.filter_size} stay" in shown["pir"]
    assert f"{config.instru_num} layers" in shown["pir"]
    assert f"{config.cycle_num} cycles" in shown["pir"]
    assert f"dropout {pe_rsitr.PERSITRConfig.paper().view_dropout}" in shown["pe_rsitr"]
    assert f"the best {two_stage.K} stay" in shown["cfitr"]
    assert f"{cfitr.CFITRConfig.paper().false_texts} false ones" in shown["cfitr"]
    assert f"{bita.BITAConfig.paper().layers} such layers" in shown["bita"]


def test_candidates_are_those_that_were_asked_for():
    shown = [text.get_text() for text in figures.cfitr(candidates=25).findobj(Text)]
    assert "the best 25 stay" in shown


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small_and_drawn_again_to_the_same_bytes(name, tmp_path):
    first = figures.save(drawn(name), tmp_path / "first.png")
    second = figures.save(getattr(figures, name)(), tmp_path / "second.png")
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < MOST_BYTES
    with Image.open(first) as image:
        assert image.width == round(150 * drawn(name).get_figwidth())
        assert len(image.convert("RGB").getcolors()) <= sum(steps + 1 for *_, steps in BLENDS)


def boxes_at(**places: tuple[float, float]) -> dict[str, Box]:
    return {key: Box(key, at, 1.0, key, height=1.0) for key, at in places.items()}


@pytest.mark.parametrize(
    ("arrow", "corners"),
    [
        (Arrow("a:right", "b:left"), [(1.5, 1), (3.5, 1)]),
        (Arrow("a:right:0.1", "b:left:0.3"), [(1.5, 1.1), (2.5, 1.1), (2.5, 1.5), (3.5, 1.5)]),
        (Arrow("a:top", "c:left"), [(1, 1.5), (1, 4), (3.5, 4)]),
        (Arrow("a:right", "c:bottom"), [(1.5, 1), (4, 1), (4, 3.5)]),
        (Arrow("a:top", "b:top", via=((1, 2), (4, 2))), [(1, 1.5), (1, 2), (4, 2), (4, 1.7)]),
    ],
)
def test_arrows_run_straight_where_they_can_and_else_round_one_corner_or_two(arrow, corners):
    ends = boxes_at(a=(1, 1), b=(4, 1.2), c=(4, 4))
    assert route(arrow, ends) == [pytest.approx(corner) for corner in corners]


def test_a_diagram_can_be_made_of_any_boxes():
    boxes = list(boxes_at(a=(1, 1), b=(4, 1)).values())
    figure = Diagram((6, 2), boxes, [Arrow("a:right", "b:left", "(B, 2)")]).draw()
    assert "(B, 2)" in [text.get_text() for text in figure.findobj(Text)]
