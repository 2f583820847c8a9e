"""Figures draw what they were given, nothing overlaps or is cut off, and files are small."""

from __future__ import annotations

import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from nbhelpers import figures
from nbhelpers.figures import style
from nbhelpers.figures.style import METRICS

LONG = "A caption that goes on about $5 and $6 airplanes, " * 5
CAPTIONS = ["two planes", LONG, "a road", LONG, "some trees"]


def pictures(count: int, size: int = 96) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return list(coarse.repeat(size // 6, 1).repeat(size // 6, 2))


def history() -> pd.DataFrame:
    epochs = np.arange(1, 9)
    terms = {
        "loss": 5 / epochs,
        "contrastive": 3 / epochs,
        "affiliation": 1 / epochs,
        "triplet": 1 / epochs,
    }
    return pd.DataFrame({"epoch": epochs, "val_mR": [np.nan, 12, 18, 22, 25, 31, 29, 30]} | terms)


def recalls() -> pd.DataFrame:
    rows = [
        {
            "system": system,
            "metric": metric,
            "value": 20 + 6 * i,
            "low": 17 + 6 * i,
            "high": 23 + 6 * i,
            "claimed": 26 + 6 * i if system == "PIR" else np.nan,
        }
        for system in ("PIR", "frozen features, linear head", "frozen features, hidden layer")
        for i, metric in enumerate(METRICS)
    ]
    return pd.DataFrame(rows)


def belief() -> np.ndarray:
    values = np.exp(np.random.default_rng(1).normal(size=50))
    return values / values.sum()


def caption_scores() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"system": system, "metric": metric, "value": 0.3 * i, "low": 0.25 * i, "high": 0.4 * i}
            for system in (
                "caption of the nearest training image",
                "BITA",
                "BITA without alignment",
                "people",
            )
            for i, metric in enumerate(("Bleu_1", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"), 1)
        ]
    )


def tradeoff_points() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "k": [10, 20, 40],
            "mR": [25.0, 30.0, 32.0],
            "i2t_total_ms": [20.0, 35.0, 70.0],
            "t2i_total_ms": [15.0, 30.0, 60.0],
        }
    )


def search_times() -> tuple[pd.DataFrame, pd.DataFrame]:
    sizes = [512, 2048, 8192, 32768]
    times = pd.DataFrame(
        {
            "coarse": [0.1, 0.2, 0.4, 1.6],
            "fine": [20.0] * 4,
            "exhaustive": [400.0, 1600, 6400, 25600],
        },
        sizes,
    )
    return times, pd.DataFrame(
        {name: [True, True, name != "exhaustive", name != "exhaustive"] for name in times}, sizes
    )


def standings() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "value": [54.0, 47.0, 33.0],
            "low": [48.0, 41.0, np.nan],
            "high": [60.0, 53.0, np.nan],
            "group": ["a", "ab", "b"],
        },
        ["PIR-CLIP without affiliation", "CLIP, fine-tuned as PE-RSITR", "CFITR"],
    )


def methods() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "trainable": [5_000, 0, 16_000, 4_000_000],
            "mR": [38.0, 31, 34, 48],
            "low": [32.0, 25, 29, 43],
            "high": [43.0, 37, 40, 54],
        },
        index=["PE-RSITR", "zero-shot", "linear probe", "full"],
    )


SYSTEMS = ("PIR", "PIR-CLIP", "PE-RSITR", "CFITR")


def pair_differences() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "difference": [10.0, 2.0, -1.0],
            "low": [5.0, -2.0, -6.0],
            "high": [15.0, 6.0, 4.0],
            "real": [True, False, False],
        },
        ["PIR-CLIP - PIR", "PIR-CLIP - CLIP, fine-tuned", "PE-RSITR - CLIP, zero-shot"],
    )


def percents(rows, columns, seed: int = 3) -> pd.DataFrame:
    values = np.random.default_rng(seed).dirichlet(np.ones(len(columns)), len(rows)) * 100
    return pd.DataFrame(values, rows, columns)


def check_tables() -> dict[str, pd.DataFrame]:
    table = pd.DataFrame(
        {
            "gain": [0.02, -0.01, 0.04],
            "low": [0.01, -0.03, 0.03],
            "high": [0.03, 0.01, 0.05],
            "verdict": ["yes", "no", "yes"],
        },
        ["belief", "attention", "relevance, untrained"],
    )
    return {"pir": table, "cfitr": table.iloc[1:] * [10, 10, 10, 1]}


def hiding() -> dict[str, dict[str, np.ndarray]]:
    falling = np.linspace(0.6, 0.3, 8) + np.zeros((2, 1))
    return {
        name: {
            "belief": falling,
            "attention": falling[:, ::-1] ** 2,
            "relevance": falling**2,
            "occlusion": falling / 2,
            "random": falling + 0.1,
        }
        for name in ("pir", "pir_clip", "pe_rsitr", "cfitr", "bita")
    }


def all_figures() -> dict[str, matplotlib.figure.Figure]:
    rng = np.random.default_rng(2)
    per_metric = {metric: 20.0 + i for i, metric in enumerate(METRICS)}
    ablation = pd.DataFrame(
        {
            "variant": ["baseline", "+ VIR", "+ VIR + LCA + affiliation loss (PIR)"],
            "value": [30, 34, 38],
            "low": [27, 31, 35],
            "high": [33, 37, 41],
        }
    )
    classes = pd.DataFrame(
        {"train": [20] * 24, "val": [3] * 24, "test": [5] * 24},
        index=[f"denseresidential {i}" for i in range(24)],
    )
    return {
        "contact_sheet": figures.contact_sheet(
            pictures(8), [f"storage tanks {i}" for i in range(8)], 6
        ),
        "parts_told": figures.parts_told(
            pictures(1)[0], [np.eye(96, dtype=bool)] * 4, CAPTIONS[:4]
        ),
        "captions_beside_images": figures.captions_beside_images(
            pictures(2), [CAPTIONS, CAPTIONS[:2]]
        ),
        "retrieved": figures.retrieved(
            LONG, pictures(5), [0.9, 0.8, 0.7, 0.6, 0.5], [0, 1, 0, 0, 1]
        ),
        "retrieved_texts": figures.retrieved_texts(
            pictures(1)[0], CAPTIONS * 2, [0.5] * 10, [1, 0] * 5
        ),
        "loss_curves": figures.loss_curves(
            history(), ["loss", "contrastive", "affiliation", "triplet"]
        ),
        "belief_map": figures.belief_map(pictures(1)[0], belief(), np.argsort(-belief())[:25]),
        "sorted_beliefs": figures.sorted_beliefs(
            rng.dirichlet(np.full(50, 0.1), 12), ["mediumresidential"] * 12, 40
        ),
        "shared_space": figures.shared_space(
            rng.normal(size=(30, 8)),
            rng.normal(size=(90, 8)),
            [f"mediumresidential {i % 10}" for i in range(30)],
            np.repeat(np.arange(30), 3),
        ),
        "mixing_maps": figures.mixing_maps(
            {
                "caption": rng.normal(size=(3, 32, 64)),
                "one word changed": 200 * rng.normal(size=(3, 32, 64)),
            },
            ["embedding h", "its transform Re F(h)", "output LN(h + Re F(h))"],
        ),
        "query_maps": figures.query_maps(pictures(1)[0], rng.random((3, 8, 7, 7))),
        "map_rows": figures.map_rows(
            pictures(3),
            [LONG, "a road", "two blue ponds"],
            {
                "pir_clip": rng.normal(size=(3, 7, 7)),
                "belief after training": rng.random((3, 7, 7)),
            },
            [np.pad(np.ones((40, 40), bool), 28)] * 3,
        ),
        "class_maps": figures.class_maps(
            {f"mediumresidential {i}": rng.random((7, 7)) for i in range(24)}
        ),
        "word_weights": figures.word_weights(
            [
                pd.DataFrame(
                    rng.random((3, count)),
                    [f"cycle {i}" for i in (1, 2, 3)],
                    (LONG.split() * 2)[:count],
                )
                for count in (12, 5)
            ]
        ),
        "hiding_curves": figures.hiding_curves(hiding()),
        "check_bars": figures.check_bars(check_tables(), "gain", "gain over random order"),
        "stage_curves": figures.stage_curves(
            {
                name: history().assign(val_CIDEr=rng.random(len(history())))
                for name in ("stage 1", "stage 2", "fine-tuning")
            }
        ),
        "soft_belief_maps": figures.soft_belief_maps(
            pictures(1)[0], {"belief": belief(), "added by order": belief(), "weight": belief()}
        ),
        "weights_by_belief": figures.weights_by_belief(
            {"belief b": belief(), "added w": belief(), "b + w": 2 * belief()}, pictures(1)[0]
        ),
        "weights_by_belief_few": figures.weights_by_belief(
            {"belief b": belief()[:6], "w, official": belief()[:6]}
        ),
        "parameters_against_recall": figures.parameters_against_recall(methods()),
        "code_distances": figures.code_distances(
            {
                "before training": (rng.binomial(64, 0.45, 50), rng.binomial(64, 0.5, 900)),
                "after training": (rng.binomial(64, 0.2, 50), rng.binomial(64, 0.5, 900)),
            },
            64,
        ),
        "pooled_tokens": figures.pooled_tokens(
            pictures(1)[0], rng.random((7, 7)), rng.normal(size=(7, 7)), rng.normal(size=32)
        ),
        "two_lists": figures.two_lists(
            LONG,
            {
                name: (pictures(5), ["0.98"] * 5, [0, 1, 0, 0, 0])
                for name in ("by Hamming distance", "after reranking")
            },
        ),
        "tradeoff": figures.tradeoff(tradeoff_points(), {"coarse alone": 20.0, "exhaustive": 33.0}),
        "gallery_times": figures.gallery_times(*search_times()),
        "similarity_matrix": figures.similarity_matrix(
            rng.normal(size=(8, 24)), np.repeat(np.arange(8), 3)
        ),
        "recall_bars": figures.recall_bars(recalls()),
        "ranking": figures.ranking(
            standings(), {"chance": 5.8, "ceiling": 98.1}, {"a published system": 55.7}
        ),
        "recall_curve": figures.recall_curve(
            {"image→text": np.arange(1, 51), "text→image": np.arange(2, 52)}, np.arange(50) / 5
        ),
        "rank_histogram": figures.rank_histogram(
            {"image→text": rng.integers(0, 90, 90), "text→image": rng.integers(0, 900, 450)}
        ),
        "ablation_bars": figures.ablation_bars(ablation),
        "bar_with_ceiling": figures.bar_with_ceiling(
            per_metric, dict.fromkeys(METRICS, 80.0), dict.fromkeys(METRICS, 5.0)
        ),
        "score_bars": figures.score_bars(caption_scores(), "people"),
        "score_table": figures.score_table(
            pd.DataFrame(
                rng.random((8, 7)) * 100,
                [f"words {i} in another order" for i in range(8)],
                ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"],
            ),
            "as % of the reference",
        ),
        "class_recalls": figures.class_recalls(
            percents([f"denseresidential {i}" for i in range(24)], SYSTEMS)
        ),
        "confusion": figures.confusion(
            {
                title: percents(list(classes.index), list(classes.index))
                for title in figures.DIRECTIONS.values()
            }
        ),
        "hub_curves": figures.hub_curves(
            {
                title: {name: rng.poisson(20, 90) for name in (*SYSTEMS, "chance")}
                for title in ("images, asked for by texts", "captions, asked for by images")
            }
        ),
        "generic_ranks": figures.generic_ranks(
            percents(["1", "2", "3 to 5", "6 to 12", "13 or more"], SYSTEMS),
            [300, 60, 40, 30, 1000],
        ),
        "first_place_bars": figures.first_place_bars(
            percents(
                [f"{name}, {title}" for name in SYSTEMS for title in figures.DIRECTIONS.values()],
                [
                    "own",
                    "same sentence",
                    "same picture",
                    "all its words",
                    "same class",
                    "other class",
                ],
            )
        ),
        "paired_differences": figures.paired_differences(pair_differences()),
        "miss_sheet": figures.miss_sheet(
            CAPTIONS * 5, pictures(25), pictures(25), ["place 89 of 90; also plausible"] * 25
        ),
        "caption_length_histogram": figures.caption_length_histogram(
            {"train": rng.poisson(11, 900) + 2, "test": rng.poisson(12, 90) + 2}
        ),
        "class_counts": figures.class_counts(classes),
    }


DRAWN = all_figures()


def shown_texts(figure) -> list[Text]:
    FigureCanvasAgg(figure).draw()
    texts = [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()
    ]
    hidden = [
        child
        for axes in figure.axes
        if not axes.get_visible() or not axes.axison
        for child in [*axes.get_xticklabels(), *axes.get_yticklabels()]
    ]
    outside = [
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks() + axis.get_minor_ticks()
        for label in (tick.label1, tick.label2)
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    return [text for text in texts if text not in hidden and text not in outside]


@pytest.mark.parametrize("name", DRAWN)
def test_no_text_overlaps_another_or_is_cut_off(name):
    boxes = {text: text.get_window_extent() for text in shown_texts(DRAWN[name])}
    page = DRAWN[name].bbox
    for text, box in boxes.items():
        assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1, f"'{text.get_text()}' leaves it"
        assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1, f"'{text.get_text()}' leaves it"
    overlapping = [
        (a.get_text(), b.get_text())
        for a, b in itertools.combinations(boxes, 2)
        if boxes[a].padded(-1).overlaps(boxes[b])
    ]
    assert not overlapping


@pytest.fixture(scope="module")
def drawn_again() -> dict[str, matplotlib.figure.Figure]:
    return all_figures()


@pytest.mark.parametrize("name", DRAWN)
def test_files_are_drawn_again_to_the_same_bytes(name, drawn_again, tmp_path):
    first = figures.save(DRAWN[name], tmp_path / "first.png")
    second = figures.save(drawn_again[name], tmp_path / "second.png")
    assert first.read_bytes() == second.read_bytes()
    assert not {"Software", "Creation Time", "date"} & set(Image.open(first).info)


def test_the_colours_of_a_map_are_those_of_its_bar(tmp_path):
    values = np.linspace(0, 1, 40 * 40).reshape(40, 40)
    figure = matplotlib.figure.Figure(figsize=(5, 4))
    axes = figure.subplots()
    figure.colorbar(axes.imshow(values, interpolation="nearest"), ax=axes)
    saved = np.asarray(Image.open(figures.save(figure, tmp_path / "map.png")).convert("RGB"))
    found = {tuple(map(int, colour)) for colour in saved.reshape(-1, 3)}
    table = (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(int)
    assert sum(tuple(map(int, colour)) in found for colour in table) > 250


def test_a_noisy_photograph_is_made_to_fit(tmp_path):
    noise = [
        np.random.default_rng(i).integers(0, 256, (256, 256, 3), dtype=np.uint8) for i in range(6)
    ]
    path = figures.save(figures.contact_sheet(noise), tmp_path / "noise.png")
    small = style.reduced(path.read_bytes(), 60_000)
    assert len(small) <= 60_000 < path.stat().st_size
    assert style.reduced(path.read_bytes(), 60_000) == small
    assert style.reduced(small, 60_000) == small
    assert Image.open(path).width >= 400


def test_flat_figures_keep_150_dpi(tmp_path):
    assert Image.open(figures.save(DRAWN["recall_bars"], tmp_path / "bars.png")).width == 1500


def test_the_callers_style_is_left_alone():
    before = dict(matplotlib.rcParams)
    figures.ablation_bars(pd.DataFrame({"variant": ["a"], "value": [1.0]}))
    assert dict(matplotlib.rcParams) == before


def test_a_part_told_keeps_its_pixels_and_the_rest_turns_pale():
    image, mask = pictures(1)[0], np.zeros((96, 96), bool)
    mask[10:20, 30:50] = True
    whole, part = [
        axes.images[0].get_array() for axes in figures.parts_told(image, [mask], ["a pond"]).axes
    ]
    assert (whole == image).all() and (part[mask] == image[mask]).all()
    assert part[~mask].min() >= 190


def test_belief_lies_on_its_tokens():
    values = np.zeros(50)
    values[0], values[1 + 2 * 7 + 5] = 0.3, 0.7
    drawn = figures.belief_map(pictures(1)[0], values, [0, 19 + 1])
    heat = drawn.axes[1].images[-1].get_array()
    assert np.unravel_index(heat.argmax(), heat.shape) == (2, 5)
    outlined = [patch for patch in drawn.axes[3].patches if not patch.get_fill()]
    assert [(patch.get_x() + 0.46, patch.get_y() + 0.46) for patch in outlined] == [
        pytest.approx((5, 2))
    ]
    assert "0.300\nkept" in [text.get_text() for text in drawn.axes[2].texts]


def test_weights_by_belief_have_the_most_believed_token_first_and_marks_the_class_token():
    values, added = np.full(50, 0.01), np.linspace(1, 0, 50)
    values[0], values[1 + 2 * 7 + 5] = 0.2, 0.32
    drawn = figures.weights_by_belief({"b": values, "w": added}, pictures(1)[0])
    image, map_axes, heat = drawn.axes[:3]
    shown = heat.images[0].get_array()
    assert list(shown[0, :2]) == [0.32, 0.2] and shown[1, 0] == added[20]
    assert (np.asarray(map_axes.images[-1].get_array()).ravel() == added[1:]).all()
    # place 2 is the class token, which has no patch
    assert [(text.get_text(), text.get_position()) for text in image.texts] == [
        ("1", (5, 2)),
        ("3", (0, 0)),
    ]
    assert heat.texts[0].xy[0] == 0.5 and "class token" in heat.texts[0].get_text()


def test_what_trains_nothing_is_a_line_and_the_rest_are_points():
    (axes,) = DRAWN["parameters_against_recall"].axes
    points = [tuple(container.lines[0].get_xydata()[0]) for container in axes.containers]
    assert points == [(4_000_000, 48), (5_000, 38), (16_000, 34)]  # best first
    assert any(list(line.get_ydata()) == [31, 31] for line in axes.lines)


def test_bars_whiskers_and_claims_stand_at_their_values():
    axes = figures.recall_bars(recalls()).axes[0]
    assert [bar.get_height() for bar in axes.containers[0]] == [20 + 6 * i for i in range(7)]
    diamonds = [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "D"]
    assert diamonds == [[26 + 6 * i for i in range(7)]]
    whiskers = [path.vertices[:, 1].tolist() for c in axes.collections for path in c.get_paths()]
    assert [17, 23] in whiskers


def test_the_ranking_shows_values_intervals_letters_levels_and_claims():
    (axes,) = figures.ranking(
        standings(), {"chance": 5.8, "ceiling": 98.1}, {"a published system": 55.7}
    ).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *standings().index,
        "a published system",
    ]
    lines = {line.get_label(): np.ravel(line.get_xdata()).tolist() for line in axes.lines}
    assert (
        lines["measured"] == [54, 47, 33]
        and lines["as published"] == [55.7]
        and lines["chance 5.8"] == [5.8, 5.8]
    )
    assert [text.get_text() for text in axes.texts] == ["a", "ab", "b"]
    assert [48, 60] in [
        path.vertices[:, 0].tolist() for c in axes.collections for path in c.get_paths()
    ]


def test_the_best_epoch_is_marked_and_gaps_are_left_out():
    axes = figures.loss_curves(history()).axes[1]
    assert list(axes.lines[0].get_xdata()) == [2, 3, 4, 5, 6, 7, 8]
    assert axes.lines[1].get_label() == "best: 31.0"
    assert len(figures.loss_curves(history().drop(columns="val_mR")).axes) == 1


def test_a_single_epoch_is_a_visible_point_over_a_whole_number():
    for axes in (
        figures.loss_curves(history()[:1]).axes
        + figures.stage_curves({"stage 1": history()[:1]}).axes
    ):
        assert [
            tick for tick in axes.get_xticks() if axes.get_xlim()[0] < tick < axes.get_xlim()[1]
        ] == [1]
        assert axes.lines[0].get_marker() in ("o", "*")


def test_ranks_are_shown_from_one():
    axes = figures.rank_histogram({"image→text": np.array([0, 0, 2])}).axes[0]
    assert axes.get_title() == "image→text: median 1.0"
    assert sum(patch.get_height() for patch in axes.patches) == 3


def test_neighbouring_ranks_leave_no_gap():
    axes = figures.rank_histogram({"text→image": np.arange(300)}).axes[0]
    assert all(patch.get_height() > 0 for patch in axes.patches)


def test_frames_lie_on_the_pairs_and_ticks_on_whole_numbers():
    axes = figures.similarity_matrix(np.eye(3, 6), np.array([0, 0, 1, 1, 2, 2])).axes[0]
    framed = [tuple(np.round(np.add(patch.get_xy(), 0.46), 6)) for patch in axes.patches]
    assert framed == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert all(
        tick == round(tick) for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_ticklocs()
    )


def test_dollars_in_captions_are_not_mathematics():
    texts = [text.get_text() for text in DRAWN["captions_beside_images"].findobj(Text)]
    assert any("$5 and $6" in text for text in texts)
    assert all(not text.get_parse_math() for text in DRAWN["captions_beside_images"].axes[1].texts)


def test_distances_of_true_and_false_pairs_are_shares_of_their_own_pairs():
    axes = figures.code_distances({"codes": (np.array([1, 2, 2]), np.full(40, 7))}, 16).axes[0]
    true, false = (patch.get_data() for patch in axes.patches)
    assert true.values.sum() == pytest.approx(100) and false.values.sum() == pytest.approx(100)
    assert true.values[2] == pytest.approx(200 / 3) and false.values[7] == pytest.approx(100)


def test_of_two_lists_each_marks_its_own_right_image():
    lists = {
        "first": (pictures(3), ["1"] * 3, [0, 0, 1]),
        "second": (pictures(3), ["2"] * 3, [1, 0, 0]),
    }
    titles = [axes.get_title()[-1] for axes in figures.two_lists("a pond", lists).axes]
    assert titles == list("✗✗✓✓✗✗")


def test_times_that_were_not_measured_are_hollow():
    lines = {
        line.get_label(): line for line in figures.gallery_times(*search_times()).axes[0].lines
    }
    assert list(lines["exhaustive"].get_xdata()) == [512, 2048]
    hollow = [line for line in lines.values() if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[8192, 32768]]


def test_only_real_differences_are_filled():
    real, other = figures.paired_differences(pair_differences()).axes[0].containers
    assert [tuple(point) for point in real.lines[0].get_xydata()] == [(10, 0)] and real.lines[
        0
    ].get_markerfacecolor() != "white"
    assert [tuple(point) for point in other.lines[0].get_xydata()] == [
        (2, 1),
        (-1, 2),
    ] and other.lines[0].get_markerfacecolor() == "white"


def test_stacked_parts_end_at_all_queries():
    axes = DRAWN["first_place_bars"].axes[0]
    ends = {round(patch.get_x() + patch.get_width(), 6) for patch in axes.containers[-1]}
    assert ends == {100.0} and len(axes.containers) == 6


def test_appearances_are_drawn_from_the_most_frequent_item_and_around_their_mean():
    (axes,) = figures.hub_curves({"images": {"PIR": np.array([1, 6, 2])}}).axes
    assert list(axes.lines[0].get_ydata()) == pytest.approx([2, 2 / 3, 1 / 3])


def test_every_class_and_its_place_in_the_confusion_is_named():
    table = percents(["port", "pond"], ["port", "pond"])
    axes = figures.confusion({"image→text": table}).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["port", "pond"]
    assert (axes.images[0].get_array() == table.to_numpy()).all()


def test_the_trade_off_shows_recall_and_both_times():
    left, right = figures.tradeoff(tradeoff_points(), {"coarse alone": 20.0}).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[25, 30, 32], [20.0, 20.0]]
    assert [line.get_label() for line in right.lines] == ["image→text", "text→image"]
