"""Maps and the tests that they are put to: cases whose answer is known, and all five systems
through one interface.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closeness import assert_close

from nbhelpers.data.scenes import generate
from nbhelpers.data.tokenization import CLIPTokenizer, Tokenizer, train_tokenizer
from nbhelpers.errors import UserError
from nbhelpers.papers import bita, cfitr, pe_rsitr, pir, pir_clip
from nbhelpers.systems import map_checks, region_maps
from nbhelpers.systems.trained_systems import SYSTEMS, System
from nbhelpers.tasks import stand_ins
from nbhelpers.tasks.caption_tokens import DecoderTokenizer
from nbhelpers.tasks.captioning import image_input as reader_input
from nbhelpers.towers import starting_weights
from nbhelpers.towers.backbones import CLIP, VILT, image_input

SENTENCE = "two blue ponds are in the meadow ."


@pytest.fixture(scope="module")
def scene():
    return generate.draw(generate.SceneSpec("pond", 0))


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> dict[str, System]:
    """The five systems on stand-in towers, with random weights."""
    folder = tmp_path_factory.mktemp("words")
    texts = [SENTENCE, "many green trees are near a pond ."] * 4
    words = train_tokenizer(texts, folder / "words.json")
    path = stand_ins.train_byte_pairs([*texts, "a photo of"], folder / "pairs/tokenizer.json", 300)
    pairs = DecoderTokenizer(path, "opt_standin")
    plain, padded = Tokenizer(words, 32), Tokenizer(words, 32, fixed=True, sep=True)
    torch.manual_seed(0)
    captioner = bita.Captioner(bita.BITAConfig.tiny(plain.vocab_size, pairs.vocab_size))
    made = {
        "pir": (pir.PIR(pir.PIRConfig.tiny(plain.vocab_size)), plain, image_input("swin_standin")),
        "pir_clip": (
            pir_clip.PIRCLIP(pir_clip.PIRCLIPConfig.tiny()),
            CLIPTokenizer(40),
            CLIP["clip_standin"].image,
        ),
        "pe_rsitr": (
            pe_rsitr.PERSITR(pe_rsitr.PERSITRConfig.tiny()),
            CLIPTokenizer(40),
            CLIP["clip_standin"].image,
        ),
        "cfitr": (
            cfitr.CFITR(cfitr.CFITRConfig.tiny(plain.vocab_size)),
            padded,
            VILT["vilt_standin"].image,
        ),
        "bita": (captioner, pairs.prompted("a photo of"), reader_input(captioner.config.image)),
    }
    return {
        name: System(name, model.eval(), tokenizer, image, {}, Path())
        for name, (model, tokenizer, image) in made.items()
    }


# ---- rollout
def test_tokens_that_attend_only_to_themselves_stay_where_they_are():
    assert torch.equal(
        region_maps.rollout([torch.eye(5).expand(2, 3, 5, 5)] * 4), torch.eye(5).expand(2, 5, 5)
    )


def test_rollout_follows_a_token_through_the_layers():
    """Token 0 reads 1 in the second layer, which has read 2 in the first: half, a quarter, a
    quarter.
    """
    first, second = torch.eye(3)[None, None].clone(), torch.eye(3)[None, None].clone()
    first[0, 0, 1], second[0, 0, 0] = torch.eye(3)[2], torch.eye(3)[1]
    assert_close(region_maps.rollout([first, second])[0, 0], torch.tensor([0.5, 0.25, 0.25]))
    assert_close(region_maps.rollout([second, first])[0, 0], torch.tensor([0.5, 0.5, 0.0]))


# ---- what the hooks see
def attended(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    heads = value.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)
    return (weights @ heads).transpose(1, 2).flatten(2)


def test_the_weights_of_pirs_attention_give_its_output():
    torch.manual_seed(0)
    layer, (v, q) = pir.Attention(16, 4, 0.0).eval(), torch.randn(2, 2, 6, 16)
    mask = (torch.arange(6) > 3)[None, None, None].expand(2, 1, 1, 6)
    with region_maps._watched([layer], region_maps._of_pir) as found:
        out = layer(v, v, q, mask)
    assert_close(layer.linear_merge(attended(found[0], layer.linear_v(v))), out)
    assert (found[0][..., 4:] == 0).all()


@torch.no_grad()
def test_the_weights_of_clip_and_vilt_give_the_outputs_of_their_layers(opened):
    x = torch.randn(1, 5, 96)
    block = opened["pe_rsitr"].model.clip.visual.transformer.resblocks[0]
    with region_maps._watched([block.attn], region_maps._of_torch) as found:
        out = block.attention(x)
    value = torch.nn.functional.linear(
        x, *(part.chunk(3)[2] for part in (block.attn.in_proj_weight, block.attn.in_proj_bias))
    )
    assert_close(block.attn.out_proj(attended(found[0], value)), out)

    attention, x = (
        opened["cfitr"].model.vilt.encoder.layer[0].attention.attention,
        torch.randn(1, 5, 64),
    )
    with region_maps._watched([attention.dropout], region_maps._of_vilt) as found:
        out = attention(x)[0]
    assert_close(attended(found[0], attention.value(x)), out)


def test_hooks_are_gone_afterwards_even_after_an_error():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), region_maps._watched([layer], lambda *call: call):
        raise ZeroDivisionError
    assert not layer._forward_hooks


# ---- the five systems
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_map_of_every_system(opened, scene, name):
    match = region_maps.match(opened[name], SENTENCE)
    assert set(match.methods) == {"attention", "relevance", "occlusion"} | (
        {"belief"} if name in ("pir", "pir_clip") else set()
    )
    for method in match.methods:
        values = match.map(method, scene.pixels)
        assert values.shape == (7, 7) and np.isfinite(values).all() and values.std() > 0
        assert_close(values, match.map(method, scene.pixels))
        if method in ("belief", "attention"):
            assert (values >= 0).all() and values.sum() <= 1 + 1e-5


def test_every_map_of_a_pir_with_a_trained_stage(scene):
    start = starting_weights.package_start()
    model = start.build(lambda: pir.PIR(pir.PIRConfig.compact()), 0).eval()
    match = region_maps.match(
        System("pir", model, start.read_tokenizer(), image_input("efficientnet_lite0"), {}, Path()),
        SENTENCE,
    )
    with torch.no_grad():
        model.head_img.weight.add_(torch.randn_like(model.head_img.weight))  # it starts at zero
    for method in match.methods:
        values = match.map(method, scene.pixels)
        assert values.shape == (7, 7) and np.isfinite(values).all() and values.std() > 0


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "bita"])
def test_scores_are_those_of_the_system(opened, scene, name):
    system, match = opened[name], region_maps.match(opened[name], SENTENCE)
    other = generate.draw(generate.SceneSpec("beach", 1)).pixels
    found = match.scores(match.system.pixels([scene.pixels, other]))
    if name == "cfitr":
        ids, mask = system.tokenizer([system.tokenizer.clean(SENTENCE)] * 2)
        with torch.no_grad():
            states = system.model.image_states(match.system.pixels([scene.pixels, other]))
            expected = system.model.score_pairs(
                states, system.model.text_states(ids, mask), mask
            ).numpy()
    else:
        expected = system.encode_images([scene.pixels, other]) @ system.encode_texts([SENTENCE])[0]
    assert_close(found, expected)


def test_the_score_of_bita_is_its_loss(opened, scene):
    system, match = opened["bita"], region_maps.match(opened["bita"], SENTENCE)
    pixels, (ids, mask) = (
        match.system.pixels([scene.pixels]),
        system.tokenizer([system.tokenizer.clean(SENTENCE)]),
    )
    with torch.no_grad():
        loss = system.model.loss(
            {"pixels": pixels, "ids": ids, "mask": mask}, system.tokenizer.prompt_length
        )["loss"]
    assert_close(match.scores(pixels)[0], -loss)


@pytest.mark.parametrize("name", ["pir_clip", "pe_rsitr", "cfitr", "bita"])
def test_relevance_adds_up_to_what_the_blur_takes(opened, scene, name, monkeypatch):
    """Integrated gradients are complete, with the class token that the map leaves out; PIR is not,
    since it sorts.
    """
    monkeypatch.setattr(region_maps, "PATH", 64)
    kept = []
    monkeypatch.setattr(
        region_maps, "_square", lambda values: kept.append(values) or np.zeros((7, 7))
    )
    match = region_maps.match(opened[name], SENTENCE)
    pixels, layer = match.system.pixels([scene.pixels]), match._layer()
    found = region_maps.LayerIntegratedGradients(match.score, layer).attribute(
        pixels, region_maps.blurred(pixels), n_steps=64
    )
    found = found[0] if isinstance(found, tuple) else found
    match.map("relevance", scene.pixels)
    assert_close(kept[0], found.sum(2)[:, 1:].detach())
    if name != "pir_clip":  # whose instruction encoder sees the pixels beside these tokens
        taken = match.scores(pixels)[0] - match.scores(region_maps.blurred(pixels))[0]
        assert float(found.sum()) == pytest.approx(taken, abs=0.03 * max(1, abs(taken)))


def test_occlusion_is_what_hiding_a_patch_takes(opened, scene):
    match = region_maps.match(opened["pe_rsitr"], SENTENCE)
    all_but = ~np.eye(49, dtype=bool)[[0, 8, 48]]
    whole = match.scores(match.system.pixels([scene.pixels]))[0]
    left = whole - match.map("occlusion", scene.pixels).ravel()[[0, 8, 48]]
    # scores, not their small differences: the scale of the tolerance is that of the scores
    assert_close(left, map_checks.hidden_score(match, scene.pixels)(all_but))


def test_a_dropped_token_has_no_attention_in_pir(opened, scene):
    match = region_maps.match(opened["pir"], SENTENCE)
    believed, attention = (
        match.map("belief", scene.pixels).ravel(),
        match.map("attention", scene.pixels).ravel(),
    )
    assert (attention[believed.argsort()[:9]] == 0).all() and (
        attention[believed.argsort()[-20:]] > 0
    ).all()


def test_the_belief_does_not_know_the_sentence_but_the_relevance_does(opened, scene):
    one, other = (
        region_maps.match(opened["pir_clip"], text)
        for text in (SENTENCE, "many green trees are near a pond .")
    )
    np.testing.assert_array_equal(
        one.map("belief", scene.pixels), other.map("belief", scene.pixels)
    )
    assert not np.allclose(one.map("relevance", scene.pixels), other.map("relevance", scene.pixels))


def test_the_control_has_other_weights_and_the_same_form(opened):
    for system in opened.values():
        control = region_maps.untrained(system, 1)
        assert control.model.config == system.model.config and control.tokenizer is system.tokenizer
        pairs = list(zip(system.model.parameters(), control.model.parameters(), strict=True))
        assert all(a.shape == b.shape for a, b in pairs) and any(
            not torch.equal(a, b) for a, b in pairs
        )
        again = region_maps.untrained(system, 1)
        assert all(
            torch.equal(a, b)
            for a, b in zip(control.model.parameters(), again.model.parameters(), strict=True)
        )
    control = region_maps.untrained(opened["bita"], 1)
    assert control.model.opt_model is opened["bita"].model.opt_model, "which may take 5 GB"


def test_wrong_questions_are_refused(opened, scene):
    with pytest.raises(UserError, match="has no map by 'belief'; choose one of attention"):
        region_maps.match(opened["cfitr"], SENTENCE).map("belief", scene.pixels)
    few = pir.PIR(pir.PIRConfig.tiny(opened["pir"].tokenizer.vocab_size, candidates=40)).eval()
    with pytest.raises(UserError, match="believes in 40 of its 50 tokens; maps need candidates=50"):
        region_maps.match(replace(opened["pir"], model=few), SENTENCE).map("belief", scene.pixels)
    with pytest.raises(UserError, match="There are no maps of 'frozen'"):
        region_maps.match(SimpleNamespace(name="frozen"), SENTENCE)
    with pytest.raises(
        UserError, match="'pir' has no stream that words and patches share; give 'cfitr'"
    ):
        region_maps.word_regions(opened["pir"], scene.pixels, SENTENCE)
    with pytest.raises(UserError, match="'bita' has no language cycle attention"):
        region_maps.cycle_attention(opened["bita"], SENTENCE)


# ---- words
def test_words_and_their_pieces(opened):
    words, owner = region_maps.words_of(opened["cfitr"], SENTENCE)
    assert words == SENTENCE.removesuffix(" .").split()
    assert owner.tolist() == [-1, *range(7), -1]
    words, owner = region_maps.words_of(opened["pe_rsitr"], "an aerodrome")
    assert words == ["an", "aerodrome"] and owner[0] == owner[-1] == -1 and (owner == 1).sum() > 1


def test_each_cycle_reads_the_words_and_itself(opened):
    words, weights = region_maps.cycle_attention(opened["pir"], SENTENCE)
    assert weights.shape == (3, len(words)) and (weights > 0).all() and (weights.sum(1) < 1).all()


def test_every_word_has_regions_of_its_own(opened, scene):
    words, maps = region_maps.word_regions(opened["cfitr"], scene.pixels, SENTENCE)
    assert maps.shape == (len(words), 7, 7) and (maps.sum((1, 2)) < 1).all()
    assert not np.allclose(maps[0], maps[1])


def test_leaving_all_words_or_none_out(opened, scene):
    system = opened["pir"]
    score_of = map_checks.hidden_words(system, scene.pixels, SENTENCE)
    expected = (
        np.concatenate([system.encode_texts([text]) for text in (SENTENCE, "")])
        @ system.encode_images([scene.pixels])[0]
    )
    assert_close(score_of(np.array([[True] * 7, [False] * 7])), expected)


# ---- deletion and insertion
WORTH = np.array([0.1, 0.5, -0.2, 0.3, 0.0])


def linear(shown: np.ndarray) -> np.ndarray:
    return shown @ WORTH


def test_no_order_beats_the_truth_on_a_linear_score():
    found = map_checks.compare(linear, {"truth": WORTH, "opposite": -WORTH}, steps=5)
    every = map_checks.curves(linear, list(permutations(range(5))), steps=5)
    assert found["truth"][0].mean() == pytest.approx(every[:, 0].mean(1).min())
    assert found["truth"][1].mean() == pytest.approx(every[:, 1].mean(1).max())
    assert found["opposite"][0].mean() == pytest.approx(every[:, 0].mean(1).max())


def test_curves_begin_and_end_with_all_and_nothing():
    deletion, insertion = map_checks.curves(linear, [np.arange(5)], steps=5)[0]
    np.testing.assert_allclose(deletion, [0.7, 0.6, 0.1, 0.3, 0, 0], atol=1e-12)
    np.testing.assert_allclose(insertion, 0.7 - deletion, atol=1e-12)


def test_a_random_order_has_no_gain_whatever_the_score():
    def crooked(shown):
        return (shown @ WORTH) ** 2 + shown[:, 0] * shown[:, 3]

    every = map_checks.curves(crooked, list(permutations(range(5))), steps=5)
    assert every[:, 1].mean() == pytest.approx(every[:, 0].mean())
    found = map_checks.compare(crooked, {"any": WORTH}, seed=3)["random"]
    np.testing.assert_array_equal(found[0], found[1][::-1])


def test_equal_values_are_ordered_at_random():
    orders = {
        tuple(map_checks.order_of(np.array([0, 1, 0]), np.random.default_rng(seed)))
        for seed in range(20)
    }
    assert orders == {(1, 0, 2), (1, 2, 0)}


def test_gains_tell_good_bad_and_useless_maps_apart():
    rng = np.random.default_rng(0)
    found = []
    for image in range(24):
        worth = rng.normal(size=16)
        maps = {
            "good": worth + rng.normal(size=16) / 2,
            "bad": -worth,
            "useless": rng.normal(size=16),
        }
        found.append(map_checks.compare(lambda shown, worth=worth: shown @ worth, maps, seed=image))
    table = map_checks.gains(found)
    assert table.verdict.to_dict() == {"good": "yes", "bad": "worse", "useless": "no"}
    assert ((table.low < table.gain) & (table.gain < table.high)).all()
    assert table.deletion["good"] > 0 and table.insertion["good"] > 0


def test_one_image_has_a_mean_without_an_interval_and_none_is_refused():
    with pytest.raises(UserError, match="needs one or more, not 0"):
        map_checks.against_zero([])
    alone = map_checks.against_zero([0.3])
    assert alone["mean"] == 0.3 and alone["verdict"] == "no"
    assert np.isnan([alone["low"], alone["high"]]).all()
    assert map_checks.against_zero([0.3, 0.3]) == {
        "mean": 0.3,
        "low": 0.3,
        "high": 0.3,
        "verdict": "yes",
    }


def test_hiding_shows_the_blur_and_nothing_else(opened, scene):
    match = region_maps.match(opened["bita"], SENTENCE)
    pixels = match.system.pixels([scene.pixels])
    found = map_checks.hidden_score(match, scene.pixels)(np.array([[True] * 49, [False] * 49]))
    assert_close(found, match.scores(torch.cat([pixels, region_maps.blurred(pixels)])))


def test_the_blur_keeps_the_mean_and_loses_the_detail():
    pixels = torch.zeros(1, 3, 112, 112)
    pixels[..., 56, 56] = 1
    veil = region_maps.blurred(pixels)
    assert (
        veil.shape == pixels.shape
        and veil.max() < 0.002
        and float(veil.sum()) == pytest.approx(3, abs=0.02)
    )
    assert_close(
        region_maps.blurred(torch.full((1, 3, 28, 28), 0.3)), torch.full((1, 3, 28, 28), 0.3)
    )


# ---- on the object
def test_share_on_a_mask():
    mask = np.zeros((224, 224), bool)
    mask[:32, :48] = True  # one patch and a half
    first, second = np.zeros((7, 7)), np.zeros((7, 7))
    first[0, 0] = second[0, 1] = 2
    assert map_checks.on_object(first, mask) == 1 and map_checks.on_object(second, mask) == 0.5
    assert map_checks.on_object(first - second, mask) == 1, "what speaks against counts for nothing"
    for even in (np.ones((7, 7)), np.zeros((7, 7)), -first):
        assert map_checks.on_object(even, mask) == pytest.approx(mask.mean())


def test_objects_found_tells_finding_from_habit():
    rng = np.random.default_rng(0)
    masks = [
        np.kron(rng.permutation(49).reshape(7, 7) < 5, np.ones((32, 32))).astype(bool)
        for _ in range(16)
    ]
    middle = [np.kron(np.pad(np.ones((1, 1)), 3), np.ones((32, 32))).astype(bool)] * 16
    seen = [map_checks.covered(mask, 7) + 0.2 for mask in masks]
    noise = [rng.random((7, 7)) for _ in masks]
    table = map_checks.objects_found({"seen": seen, "noise": noise}, masks)
    assert table.verdict.to_dict() == {"seen": "yes", "noise": "no"} and table.area[
        "seen"
    ] == pytest.approx(5 / 49)
    habit = map_checks.objects_found(
        {"middle": [map_checks.covered(mask, 7) for mask in middle]}, middle
    ).loc["middle"]
    assert habit.share == habit.elsewhere == 1 and habit.excess == 0 and habit.verdict == "no"


def test_named_things_are_those_whose_words_stand_in_the_sentence():
    scene = generate.draw(generate.SceneSpec("airport", 3))
    planes = next(phrase for phrase in scene.phrases if phrase.kind == "plane")
    found = map_checks.named(scene, f"There are {planes.noun} near the terminal.")
    assert list(found) == [planes.noun]
    np.testing.assert_array_equal(
        found[planes.noun], np.any([thing.mask for thing in planes.objects], axis=0)
    )
    assert map_checks.named(scene, "the airport is surrounded by meadows .") == {}
    assert set(map_checks.named(scene, scene.captions[0])) <= {
        phrase.noun for phrase in scene.phrases
    }
