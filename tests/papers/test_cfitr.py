"""CFITR: options, cached states, false texts, and files that give the same model again.

The numbers of the authors' code are in test_reference.py. As a script this file is one of two
processes.
"""

from __future__ import annotations

import linecache
import pickle
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
import release_states
import torch
import two_processes
from closeness import assert_close
from coloured_set import coloured, words
from release_files import write_release

from nbhelpers.errors import UserError
from nbhelpers.papers import cfitr, own_part, vilt
from nbhelpers.papers.cfitr import CFITR, Captions, CFITRConfig
from nbhelpers.runs import batch
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.tasks.retrieval import RetrievalTask
from nbhelpers.towers import backbones, checkpoints, starting_weights
from nbhelpers.training import loop

SMALL = CFITRConfig(split=2, bits=12, hidden=20, false_texts=3, dropout=0.0)
WORDS, LENGTH, IMAGES, SIZE = 40, 10, 8, 40  # 8 images of 40 px = 5x5 patches, three captions each


def trunk(dropout: float = 0.0):
    return backbones.vilt_model(
        dropout,
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIZE,
        patch_size=8,
        max_position_embeddings=LENGTH,
    )


def sentences() -> Captions:
    """24 captions of 20 texts: text 0 stands with images 0 to 3, text 4 twice with image 4; 3 to 9
    words, then padding.
    """
    generator = torch.Generator().manual_seed(5)
    string = np.arange(24)
    string[[3, 6, 9]] = 0
    string[13] = 12
    string = np.unique(string, return_inverse=True)[1]
    mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH, (20, 1), generator=generator)).long()
    ids = torch.randint(1, WORDS, (20, LENGTH), generator=generator) * mask
    return Captions(np.arange(24) // 3, string, {"ids": ids.numpy(), "mask": mask.numpy()})


def small(config: CFITRConfig = SMALL, **changes) -> CFITR:
    """A CFITR whose parts all matter; parts that two of them share start from the same weights."""
    config = replace(config, **changes)
    torch.manual_seed(0)
    model = CFITR(config, trunk(config.dropout))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if not name.startswith("res."):
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.set_captions(sentences())


def pairs(count: int = 6) -> dict[str, torch.Tensor]:
    """The first pairs of an epoch, of which the second and third share an image."""
    row = torch.tensor([0, 3, 4, 7, 12, 16, 18, 23])[:count]
    generator = torch.Generator().manual_seed(7)
    pictures = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
    return {
        "pixels": pictures[row // 3],
        **sentences().texts(row),
        "image_index": row // 3,
        "row": row,
    }


def loss(model: CFITR, batch: dict) -> dict[str, torch.Tensor]:
    """The terms, with the false texts of one seed."""
    torch.manual_seed(3)
    return model.loss(batch)


def step(model: CFITR, batch: dict, lr: float = 1e-4) -> dict[str, torch.Tensor]:
    """The terms of one training step, which leaves gradients and new weights."""
    optimizer = torch.optim.AdamW(model.parameter_groups(0.01), lr=lr)
    terms = loss(model, batch)
    terms["loss"].backward()
    optimizer.step()
    return {name: value.detach().clone() for name, value in terms.items()}


def states(model: CFITR, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.image_states(batch["pixels"]), model.text_states(batch["ids"], batch["mask"])


def everything(model: CFITR, batch: dict) -> torch.Tensor:
    """Codes of images and texts and the scores of the pairs, in eval mode, in one row."""
    model.eval()
    image, text = states(model, batch)
    with torch.no_grad():
        return torch.cat(
            [
                model.image_codes(image).flatten(),
                model.text_codes(text).flatten(),
                model.score_pairs(image, text, batch["mask"]),
            ]
        )


# ---- options
OPTIONS = {
    "lfem": {"lfem": False},
    "split": {"split": 1},
    "bits": {"bits": 6},
    "hidden": {"hidden": 30},
    "false_texts": {"false_texts": 2},
    "many_false_texts": {"false_texts": 9},
    "false_from": {"false_from": "all"},
    "negatives_from": {"negatives_from": "others"},
    "balance": {"balance": "bit"},
    "margin": {"margin": 0.4},
    "beta": {"beta": 0.1},
    "gamma": {"gamma": 0.1},
}


@cache
def loss_of_all() -> float:
    return loss(small(), pairs())["loss"].item()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_loss_and_trains(name):
    batch, model = pairs(), small(**OPTIONS[name])
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    terms = step(model, batch)
    assert abs(terms["loss"] - loss_of_all()) > 1e-4
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    trained = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    # a softmax sees no shift of all
    assert (
        trained | {"rank_output.bias"} == set(before) and model.rank_output.bias.grad.abs() < 1e-6
    )
    model.bank = small(**OPTIONS[name]).bank
    assert loss(model, batch)["loss"] < terms["loss"]


def test_the_terms_add_up_with_their_weights():
    for beta, gamma in ((0.0, 0.0), (0.5, 0.0), (0.2, 0.3)):
        terms = loss(small(beta=beta, gamma=gamma), pairs())
        assert_close(
            terms["loss"],
            terms["triplet"]
            + beta * terms["quantisation"]
            + gamma * terms["balance"]
            + terms["rerank"],
        )
        assert min(terms.values()) > 0


def test_balance_over_bits_or_over_samples_equals_a_plain_loop():
    image, text = (
        torch.rand(5, 7, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (1, 2)
    )
    by_sample = sum(sum(h[i][k] for k in range(7)) ** 2 for h in (image, text) for i in range(5))
    by_bit = sum(sum(h[i][k] for i in range(5)) ** 2 for h in (image, text) for k in range(7))
    assert_close(cfitr.balance_loss(image, text), by_sample)
    assert_close(cfitr.balance_loss(image, text, "bit"), by_bit)


def test_matches_in_a_batch_can_be_left_out_of_its_negatives():
    """Of these pairs the first two share their words, the second and third their image, which has
    both captions.
    """
    row = torch.tensor([0, 3, 4, 23])
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert small(negatives_from="others")._matches(row).int().tolist() == expected
    matches = small()._matches(row)
    assert torch.equal(matches, torch.eye(4, dtype=torch.bool))
    h = torch.tensor([[0.9, 0.1], [0.9, 0.1], [-0.9, 0.1], [0.1, 0.9]])
    # equal codes keep half of the pairs at the margin
    assert cfitr.triplet_loss(h, h, matches, 0.2) >= 2 * 0.2 * 2 / 4 - 1e-6
    assert cfitr.triplet_loss(h, h, torch.tensor(expected).bool(), 0.2) == 0


def test_the_own_text_stands_first_among_the_choices():
    model, batch = small().eval(), pairs(2)
    image, own = states(model, batch)
    other = sentences().texts(torch.arange(17, 23))  # three false texts for each of the two
    with torch.no_grad():
        false = model.text_states(**{"text": other["ids"], "mask": other["mask"]})
        found = model._score_choices(
            image, torch.cat([own, false]), torch.cat([batch["mask"], other["mask"]])
        )
        for i in range(2):
            text = torch.cat([own[i : i + 1], false[3 * i : 3 * i + 3]])
            mask = torch.cat([batch["mask"][i : i + 1], other["mask"][3 * i : 3 * i + 3]])
            assert_close(found[i], model.score_pairs(image[i].expand(4, -1, -1), text, mask))


def test_what_the_release_does_is_one_word():
    released = CFITRConfig.paper(bits=64).released()
    assert (released.lfem, released.bank, released.false_from, released.balance) == (
        False,
        "released",
        "all",
        "sample",
    )
    assert (
        released.bits == 64
        and CFITRConfig.compact().released().negatives_from
        == CFITRConfig.paper().negatives_from
        == "all"
    )
    assert (
        CFITRConfig.paper().lfem
        and CFITRConfig.paper().bank == "intended"
        and CFITRConfig.paper().false_from == "others"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"split": 0}, "split 0 must leave layers on both sides of the 12"),
        ({"split": 12}, "split 12"),
        ({"bits": 0}, "at least 1"),
        ({"hidden": 0}, "at least 1"),
        ({"false_texts": 0}, "at least 1"),
        ({"false_from": "some"}, "'others' or 'all'"),
        ({"negatives_from": "some"}, "'others' or 'all'"),
        ({"bank": "zero"}, "'intended' or 'released'"),
        ({"balance": "batch"}, "'sample' or 'bit'"),
        ({"vilt": "vilt_l16"}, "choose one of vilt_standin"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(changes, message):
    with pytest.raises(UserError, match=message) as error:
        CFITRConfig.paper(**changes)
    assert "\n" not in str(error.value)


# ---- the trunk
def test_a_vilt_is_built_as_its_authors_build_it():
    model = trunk(dropout=0.3)
    assert model.embeddings.text_embeddings.LayerNorm.eps == 1e-12
    assert {
        m.eps
        for name, m in model.named_modules()
        if name.endswith(("before", "after", "layernorm"))
    } == {1e-6}
    # embeddings; 3 a layer
    assert sum(m.p == 0.3 for m in model.modules() if isinstance(m, torch.nn.Dropout)) == 2 + 3 * 4
    assert all(
        m.p == 0
        for name, m in model.named_modules()
        if name.endswith("attention.attention.dropout")
    )
    assert model.embeddings.text_embeddings.word_embeddings.padding_idx == 0
    assert 0.01 < model.embeddings.position_embeddings.std() < 0.03


@pytest.mark.parametrize(
    "config, tokens, width",
    [
        (CFITRConfig.tiny(WORDS), 50, 64),
        (CFITRConfig.compact(), 50, 192),
        (CFITRConfig.paper(), 145, 768),
    ],
)
def test_all_sizes_have_a_state_for_each_patch_and_word(config, tokens, width):
    size = backbones.vilt_size(config.vilt).image.size
    with torch.device("meta"):
        model = CFITR(config).eval()
        length = model.vilt.config.max_position_embeddings
        mask = torch.ones(2, length, dtype=torch.long)
        words = (
            torch.empty(2, length, model.text_encoder.config.hidden_size)
            if config.freeze_towers
            else mask
        )
        image = model.image_states(**model.image_features(torch.empty(2, 3, size, size)))
        text = model.text_states(words, mask)
        assert image.shape == (2, tokens, width) and text.shape == (2, length, width)
        assert model.image_codes(image).shape == (2, config.bits) and model.score_pairs(
            image, text, mask
        ).shape == (2,)


# ---- states: raster order, LFEM, masks
def test_patches_keep_their_raster_order_unless_a_permutation_is_given():
    model, pixels = small(lfem=False).eval(), pairs(2)["pixels"]
    order = torch.stack(
        [torch.randperm(25, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    )
    with torch.no_grad():
        raster, shuffled = model.image_states(pixels), model.image_states(pixels, order)
        for b in range(2):
            expected = torch.cat([raster[b, :1], raster[b, 1:][order[b]]])
            assert_close(shuffled[b], expected)
        change = (model.image_codes(raster) - model.image_codes(shuffled)).abs().max()
    assert change > 1e-2  # the position pooling sees other patches
    with pytest.raises(UserError, match="LFEM convolves the patch grid"):
        small().image_states(pixels, order)


def test_lfem_mixes_neighbours_on_the_grid_and_leaves_the_class_token():
    torch.manual_seed(0)
    module = cfitr.LFEM(6).eval()
    x = torch.randn(1, 144, 6)
    changed = x.clone()
    changed[0, 12 * 2 + 9] += 1
    with torch.no_grad():
        touched = (module(x) - module(changed)).abs().amax(2).view(12, 12) > 0
    rows, columns = touched.any(1).nonzero().flatten(), touched.any(0).nonzero().flatten()
    assert rows.max() == 2 + 4 and columns.min() == 9 - 4  # as far as kernels of 3, 5 and 3 reach
    with torch.no_grad():
        plain, enhanced = (
            small(lfem=on).eval().image_states(pairs(2)["pixels"]) for on in (False, True)
        )
    assert torch.equal(plain[:, 0], enhanced[:, 0]) and not torch.equal(
        plain[:, 1:], enhanced[:, 1:]
    )


def test_padding_is_attended_in_neither_half():
    model, batch = small().eval(), pairs()
    assert (batch["mask"] == 0).any(1).all()
    other = batch | {"ids": torch.where(batch["mask"] == 1, batch["ids"], 17)}
    (image, text), (_, changed) = states(model, batch), states(model, other)
    word = batch["mask"] == 1
    assert_close(changed[word], text[word])
    assert (changed - text)[~word].abs().max() > 0.1
    with torch.no_grad():
        scores = [model.score_pairs(image, x, batch["mask"]) for x in (text, changed)]
        assert_close(*scores)
        # but pooled, as released
        assert (model.pooled_texts(changed) - model.pooled_texts(text)).abs().max() > 1e-3


def test_masked_image_tokens_are_not_attended():
    model, batch = small().eval(), pairs(2)
    image, text = states(model, batch)
    mask = torch.ones(image.shape[:2], dtype=torch.long)
    mask[:, 20:] = 0
    changed = image + torch.where(mask.bool(), 0.0, 3.0).unsqueeze(2)
    with torch.no_grad():
        scores = [model.score_pairs(x, text, batch["mask"], mask) for x in (image, changed)]
        assert_close(scores[0], scores[1])
        assert (scores[0] - model.score_pairs(image, text, batch["mask"])).abs().max() > 1e-4


def test_states_that_were_kept_give_the_scores_of_the_towers_in_any_company():
    model, batch = small().eval(), pairs()
    image, text = states(model, batch)
    rows, columns = torch.arange(6).repeat_interleave(6), torch.arange(6).repeat(6)
    with torch.no_grad():
        every = model.score_pairs(image[rows], text[columns], batch["mask"][columns]).view(6, 6)
        kept = [torch.from_numpy(x.numpy().astype(np.float16)).float() for x in (image, text)]
        half = model.score_pairs(kept[0][rows], kept[1][columns], batch["mask"][columns]).view(6, 6)
        for i, j in ((0, 0), (2, 5), (4, 1)):
            alone = model.score_pairs(
                model.image_states(batch["pixels"][i : i + 1]),
                model.text_states(batch["ids"][j : j + 1], batch["mask"][j : j + 1]),
                batch["mask"][j : j + 1],
            )
            assert_close(alone, every[i, j : j + 1])
    torch.testing.assert_close(half, every, atol=1e-2, rtol=0)
    assert every.std() > 5e-2


def test_the_score_is_read_from_the_first_word():
    model, batch = small().eval(), pairs(2)
    image, text = states(model, batch)
    x = torch.cat([text, image], dim=1)
    added = (
        torch.cat([batch["mask"], torch.ones(2, 26)], dim=1).log()[:, None, None].clamp(min=-1e30)
    )
    with torch.no_grad():
        for layer in model.vilt.encoder.layer[2:]:
            out = layer(x, added)
            x = out[0] if isinstance(out, tuple) else out
        first = model.vilt.pooler.dense(model.vilt.layernorm(x)[:, 0]).tanh()
        expected = model.rank_output(first)[:, 0]
        assert_close(model.score_pairs(image, text, batch["mask"]), expected)


def test_the_last_layer_for_the_first_word_alone_has_the_values_and_gradients_of_the_whole():
    layer, batch = small().vilt.encoder.layer[3], pairs(4)
    mask, found = batch["mask"], []
    for through in (
        lambda x: vilt.through([layer], x, mask)[:, :1],
        lambda x: vilt.first_through(layer, x, mask),
    ):
        layer.zero_grad()
        x = torch.randn(
            4, LENGTH, 16, generator=torch.Generator().manual_seed(1), requires_grad=True
        )
        out = through(x)
        out.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
        found.append((out, gradients | {"x": x.grad}))
    (out, gradients), (whole, expected) = found[1], found[0]
    assert_close(out, whole)
    assert_close(gradients, expected)
    assert len(gradients) == 1 + len(list(layer.parameters()))


@pytest.mark.parametrize("place", ["attention.attention", "attention.output", "output"])
def test_the_last_layer_drops_everywhere_and_in_training_alone(place):
    layer, mask = small().vilt.encoder.layer[3], torch.ones(1, LENGTH).long()
    layer.get_submodule(place).dropout.p = 0.5
    x = torch.randn(1, LENGTH, 16)
    with torch.no_grad():
        assert not torch.equal(
            vilt.first_through(layer, x, mask), vilt.first_through(layer, x, mask)
        )
        layer.eval()
        assert torch.equal(vilt.first_through(layer, x, mask), vilt.first_through(layer, x, mask))


def test_codes_are_the_same_whenever_an_image_is_encoded():
    model, batch = small(dropout=0.2).eval(), pairs()
    torch.manual_seed(1)
    first = everything(model, batch)
    torch.manual_seed(2)
    assert torch.equal(first, everything(model, batch))
    model.train()
    assert not torch.equal(*(model.image_states(batch["pixels"]) for _ in range(2)))


def test_the_sign_of_zero_is_plus():
    h = torch.tensor([[-0.5, -0.0, 0.0, 1e-9]])
    assert (
        CFITR.binary(h).tolist() == [[False, True, True, True]]
        and CFITR.binary(h).dtype == torch.bool
    )


# ---- bad input
def test_a_batch_of_one_is_a_batch_but_for_training():
    model, batch = small(), pairs()
    one = {name: value[:1] for name, value in batch.items()}
    whole, alone = everything(model, batch), everything(model, one)
    assert_close(alone, whole[[*range(12), *range(72, 84), 144]])
    assert loss(model, one)["triplet"] == 0
    with pytest.raises(UserError, match="batches of two or more"):
        loss(model.train(), one)


@pytest.mark.parametrize("seen", [0, 1])
def test_an_empty_caption_is_a_caption(seen):
    """What the tokenizer makes of it, [CLS] alone, and not even that."""
    model, batch = small(), pairs()
    batch["ids"][0, seen:], batch["mask"][0, seen:] = 0, 0
    assert everything(model, batch).isfinite().all()
    terms = step(model.train(), batch)
    assert terms["loss"].isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("length", [LENGTH - 1, LENGTH + 1])
def test_captions_of_another_length_are_refused(length):
    ids = torch.ones(2, length, dtype=torch.long)
    with pytest.raises(
        UserError,
        match=(
            f"pools over {LENGTH} pos.* captions of {length};.*max_length={LENGTH} and fixed=True"
        ),
    ):
        small().encode_texts(ids, ids)


@pytest.mark.parametrize("shape", [(40, 48), (48, 40), (32, 32), (20, 80)])
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(UserError, match=f"takes images of 40x40, not {shape[0]}x{shape[1]}"):
        small().encode_images(torch.zeros(2, 3, *shape))


def test_training_needs_captions():
    model = small()
    model.captions = None
    with pytest.raises(UserError, match="call set_captions"):
        model.loss(pairs())


# ---- false texts
def test_false_texts_are_never_read_like_a_caption_of_the_image():
    captions, row = sentences(), torch.arange(24)
    torch.manual_seed(0)
    drawn = captions.draw(row, 400)
    for i in range(24):
        own = {int(captions.string[j]) for j in range(24) if j // 3 == i // 3}
        allowed = {j for j in range(24) if int(captions.string[j]) not in own}
        assert set(drawn[i].tolist()) == allowed  # all of them turn up
    assert len({int(captions.string[j]) for j in drawn[1].tolist()}) == 17
    share = drawn[15:].flatten().bincount(minlength=24)[:3] / drawn[15:].numel()
    torch.testing.assert_close(share, torch.full((3,), 1 / 21), atol=1e-2, rtol=0)


def test_the_release_draws_from_all():
    captions, row = sentences(), torch.arange(24)
    torch.manual_seed(0)
    drawn = captions.draw(row, 400, also_true=True)
    assert all(set(found.tolist()) == set(range(24)) for found in drawn)
    described = captions.describe(row, drawn)
    assert described[0, drawn[0] == 9].all()  # another image, but the same words
    assert described[0, drawn[0] == 2].all() and not described[0, drawn[0] == 23].any()


@pytest.mark.parametrize("rule", ["others", "all"])
def test_the_loss_draws_as_configured_and_as_torch_is_seeded(rule, monkeypatch):
    model, seen = small(false_from=rule, false_texts=50), []
    draw = model.captions.draw
    monkeypatch.setattr(
        model.captions, "draw", lambda *given: seen.append((given[0], draw(*given))) or seen[-1][1]
    )
    loss(model, pairs())
    loss(model, pairs())
    assert torch.equal(seen[0][1], seen[1][1]) and seen[0][1].shape == (6, 50)
    assert model.captions.describe(*seen[0]).any() == (rule == "all")


def test_an_image_described_by_all_texts_is_refused():
    tokens = {"ids": np.ones((2, LENGTH), int), "mask": np.ones((2, LENGTH), int)}
    Captions([0, 0, 1], [0, 0, 1], tokens)
    with pytest.raises(UserError, match="leaves no false one"):
        Captions([0, 0, 1], [0, 1, 1], tokens)


def test_texts_come_as_the_tokens_of_their_captions():
    tokens = {
        "text": np.arange(24, dtype=np.float16).reshape(3, 4, 2),
        "mask": np.ones((3, 4), int),
    }
    found = Captions(np.array([0, 1, 1, 2]), np.array([0, 2, 0, 1]), tokens).texts(
        torch.tensor([1, 2, 3])
    )
    assert found["text"].dtype == torch.float32 and found["mask"].dtype == torch.int64
    assert found["text"][:, 0, 0].tolist() == [16, 0, 8]


def test_repeats_within_an_image_can_be_left_out(tmp_path):
    table = coloured(tmp_path).table
    doubled = replace(table, captions=table.captions.loc[table.captions.index.repeat(2)])
    # shared by images, but repeated in none
    assert cfitr.without_repeats(doubled).captions.equals(table.captions)


# ---- the bank
def codes_seen(model):
    seen = {}
    for name in ("image_module", "text_module"):
        getattr(model, name).register_forward_hook(
            lambda module, given, out, name=name: seen.update({name: out.detach()})
        )
    return seen


@pytest.mark.parametrize("rule", ["intended", "released"])
def test_the_bank_is_read_and_then_written(rule):
    model, batch = small(bank=rule), pairs()
    before, seen = model.bank.clone(), codes_seen(model)
    assert (
        before.shape == (24, 12)
        and set(before.unique().tolist()) == {-1, 1}
        and abs(before.float().mean()) < 0.2
    )
    terms = loss(model, batch)
    h_image, h_text = seen["image_module"], seen["text_module"]
    target = before[batch["row"]]
    assert_close(
        terms["quantisation"], ((target - h_image) ** 2).sum() + ((target - h_text) ** 2).sum()
    )
    expected = before.clone()
    expected[batch["row"]] = (
        ((h_image + h_text) / 2).sign().to(torch.int8) if rule == "intended" else 0
    )
    assert torch.equal(model.bank, expected) and not torch.equal(before, expected)
    again = loss(model, batch)["quantisation"]
    assert again < terms["quantisation"]
    if rule == "released":  # what remains pulls the codes to zero
        assert_close(again, sum(h.square().sum() for h in seen.values()))


def test_evaluation_leaves_the_bank():
    model = small().eval()
    before = model.bank.clone()
    loss(model, pairs())
    assert torch.equal(model.bank, before)


def test_the_first_bank_comes_from_its_seed():
    banks = [small().set_captions(sentences(), seed).bank for seed in (0, 0, 1)]
    assert torch.equal(banks[0], banks[1]) and not torch.equal(banks[0], banks[2])


# ---- training
def test_a_few_steps_tell_the_right_text_from_false_ones():
    torch.manual_seed(0)
    model, batch = small(gamma=0.0, negatives_from="others"), pairs()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.01), lr=3e-3)
    losses = []
    for _ in range(60):
        terms = model.loss(batch)
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append({name: value.item() for name, value in terms.items()})
    assert (
        losses[-1]["rerank"] < 0.3 * losses[0]["rerank"]
        and losses[-1]["triplet"] < 0.3 * losses[0]["triplet"]
    )


def soft_head(width: int, hidden: int, bits: int) -> torch.nn.Module:
    """A hash head as a reader might edit it: another activation."""
    layers = list(cfitr.hash_head(width, hidden, bits))
    return torch.nn.Sequential(*layers[:2], torch.nn.GELU(), *layers[3:])


def keyed(tmp_path, head, batches) -> tuple[CFITR, str, dict]:
    """A CFITR with this head, trained as a notebook does; its key and its metadata."""
    settings = loop.TrainConfig(epochs=1, lr=1e-3, batch_size=6)
    key = loop.checkpoint_key([SMALL, settings], "pairs", "start", 0, CFITR, head)
    same = own_part.modules_agree(
        lambda: head(6, 10, 4), lambda: cfitr.hash_head(6, 10, 4), torch.randn(5, 6)
    )
    meta = {"system": "cfitr", "model": asdict(SMALL)} | own_part.meta("hash_head", same)

    def build():
        torch.manual_seed(0)
        return CFITR(SMALL, trunk(), head).set_captions(sentences())

    model, _, _ = loop.load_or_train(
        "cfitr", build, batches, settings, tmp_path, key, loop.Options(meta=meta)
    )
    path = tmp_path / f"cfitr-{key[:16]}" / "model.safetensors"
    return model, key, checkpoints.load_checkpoint(path)[1]


def test_an_edited_hash_head_has_its_own_key_and_model_and_is_refused_elsewhere(tmp_path):
    ours, key, about = keyed(tmp_path, cfitr.hash_head, [pairs()])
    other, other_key, other_about = keyed(tmp_path, soft_head, [pairs()])
    assert key != other_key and own_part.EDITED not in about
    assert other_about[own_part.EDITED] == "hash_head"
    assert isinstance(other.image_module[2], torch.nn.GELU)
    assert not torch.equal(ours.image_module[0].weight, other.image_module[0].weight)
    with pytest.raises(UserError, match="hash_head"):
        cfitr.read(tmp_path / f"cfitr-{other_key[:16]}" / "model.safetensors")


def head_of_the_notebook(edit: tuple[str, str] = ("", "")) -> dict:
    """The names that the cell of 23_cfitr defines in which the hash head stands, perhaps edited."""
    cells = nbformat.read(batch.NOTEBOOKS / "23_cfitr.ipynb", as_version=4).cells
    (cell,) = [cell.source for cell in cells if "def hash_head" in cell.source]
    cell = cell.replace(*edit)
    linecache.cache["<cell>"] = len(cell), None, cell.splitlines(keepends=True), "<cell>"
    names = {"__name__": "__main__", "nn": torch.nn, "torch": torch}
    names |= {"cfitr": cfitr, "own_part": own_part}
    exec(compile(cell, "<cell>", "exec"), names)
    return names


def test_the_hash_head_of_the_notebook_is_the_package_s_until_it_is_edited(capsys):
    ours = head_of_the_notebook()
    key = loop.checkpoint_key([], "pairs", "start", 0, CFITR, ours["hash_head"])
    edited = head_of_the_notebook(("nn.ReLU()", "nn.GELU()"))
    assert key != loop.checkpoint_key([], "pairs", "start", 0, CFITR, edited["hash_head"])
    assert (ours["edited"], edited["edited"]) == ({}, {"edited": "hash_head"})
    assert capsys.readouterr().out.splitlines()[1].endswith("edited, differs from the package's")


def test_parameter_groups_spare_the_norms_of_the_trunk_but_no_batch_norm():
    model = small()
    name_of = {id(p): name for name, p in model.named_parameters()}
    (kept, decay), (free, none) = (
        ({name_of[id(p)] for p in group["params"]}, group["weight_decay"])
        for group in model.parameter_groups(0.05)
    )
    assert (decay, none) == (0.05, 0.0) and kept | free == set(name_of.values()) and not kept & free
    official = {
        "transformer.norm.weight",
        "transformer.blocks.1.norm2.weight",
        "text_embeddings.LayerNorm.weight",
    }
    assert official <= set(
        release_states.vilt_state({name: model.state_dict()[name] for name in free})
    )
    assert {
        "image_module.1.weight",
        "res.net.4.weight",
        "vilt.embeddings.cls_token",
        "vilt.embeddings.position_embeddings",
        "imagepooler_be.dense.weight",
    } <= kept
    assert {name for name in kept if name.endswith("bias")} == set()


def test_a_step_in_bfloat16_is_finite_and_its_losses_are_taken_in_float32():
    model = small(dropout=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        terms = step(model, pairs())
    assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
def test_the_paper_size_takes_a_bfloat16_step_on_the_gpu():
    torch.manual_seed(0)
    captions = Captions(
        np.arange(40) // 2,
        np.arange(40),
        {
            "ids": np.random.default_rng(0).integers(1, 30000, (40, 40)),
            "mask": np.ones((40, 40), int),
        },
    )
    with torch.device("cuda"):
        model = CFITR(CFITRConfig.paper())
        batch = {
            "pixels": torch.randn(8, 3, 384, 384),
            "ids": torch.randint(1, 30000, (8, 40)),
            "mask": torch.ones(8, 40, dtype=torch.long),
            "row": 2 * torch.arange(8),
        }
    model.set_captions(captions)
    with torch.autocast("cuda", torch.bfloat16):
        terms = step(model, batch, lr=1e-5)
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    batches = [pairs(4), {name: value[4:] for name, value in pairs(8).items()}]
    settings = loop.TrainConfig(epochs=3, lr=1e-3, batch_size=4, seed=1)

    def trained(folder, stop_after=None):
        model, epochs = small(dropout=0.1), []

        def validate(_):
            epochs.append(1)
            if len(epochs) == stop_after:
                raise KeyboardInterrupt
            return {"mR": float(len(epochs))}

        loop.fit(model, batches, settings, folder, validate)
        return model

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", stop_after=2)
    whole, resumed = (
        trained(tmp_path / "whole").state_dict(),
        trained(tmp_path / "stopped").state_dict(),
    )
    assert set(whole) == set(resumed) and all(
        torch.equal(value, resumed[name]) for name, value in whole.items()
    )
    assert not torch.equal(whole["bank"], small().bank)


# ---- as a retrieval system
@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in with texts of 12 tokens, as the coloured set has them; the compact size over
    small frozen towers.
    """
    sizes = backbones.VILT
    shorter = {
        name: replace(sizes[name], vilt=sizes[name].vilt | {"max_position_embeddings": 12})
        for name in ("vilt_standin", "vilt_compact")
    }
    shorter["vilt_compact"] = replace(
        shorter["vilt_compact"],
        image=backbones.image_input("swin_standin"),
        towers=("swin_standin", "bert_standin"),
    )
    for name, size in shorter.items():
        monkeypatch.setitem(sizes, name, size)


def test_the_coarse_stage_is_a_dual_encoder(tmp_path, stand_in):
    data = coloured(tmp_path / "data")
    tokenizer = words(data, tmp_path)
    task = RetrievalTask(data, tokenizer, backbones.vilt_size("vilt_standin").image, workers=1)
    torch.manual_seed(0)
    model = CFITR(CFITRConfig.tiny(tokenizer.vocab_size)).set_captions(Captions.of(task))
    assert len(model.bank) == 48 and model.captions.distinct == 28
    batch = next(iter(task.train_loader(8)))
    assert model.loss(batch)["loss"].isfinite()
    found = task.embeddings(model.eval(), "test")
    assert_close(np.linalg.norm(found.images, axis=1), np.ones(len(found.images)))
    pixels = next(task.pixels(task.table("test")))
    with torch.no_grad():
        h = model.image_codes(model.image_states(pixels))
    assert_close(found.images, h / h.norm(dim=1, keepdim=True))
    assert 0 <= found.recall().metrics["mR"] <= 100


def test_features_of_frozen_towers_take_the_place_of_pixels_and_ids(tmp_path, stand_in):
    data = coloured(tmp_path / "data")
    tokenizer, image = words(data, tmp_path), backbones.vilt_size("vilt_compact").image
    torch.manual_seed(0)
    model = CFITR(CFITRConfig.compact(vocab_size=tokenizer.vocab_size, dropout=0.0))
    cached = RetrievalTask(
        data, tokenizer, image, workers=1, frozen=FrozenTowers(model, tmp_path / "features")
    )
    direct = RetrievalTask(data, tokenizer, image, workers=1)
    model.set_captions(Captions.of(cached))
    assert set(model.captions.tokens) == {"text", "mask"}
    ours, theirs = cached.embeddings(model, "val"), direct.embeddings(model, "val")
    np.testing.assert_allclose(ours.images, theirs.images, atol=5e-3)
    np.testing.assert_allclose(ours.texts, theirs.texts, atol=5e-3)
    loader = cached.train_loader(8)
    batch = next(iter(loader))
    assert set(batch) == {"vision", "text", "mask", "image_index", "scene", "row"}
    terms = step(model, batch)
    assert terms["loss"].isfinite() and not any(
        part.training for tower in model.frozen() for part in tower.modules()
    )
    assert all(
        (p.grad is None) == name.startswith(("vision_encoder", "text_encoder"))
        for name, p in model.named_parameters()
    )
    assert {"vision", "text"} == {*model.IMAGE_FEATURES, *model.TEXT_FEATURES}


# ---- files
@pytest.fixture
def tiny_names(monkeypatch):
    """The name of the paper's trunk stands for the small one here."""
    monkeypatch.setattr(
        backbones, "vilt", lambda name, vocab_size=None, dropout=0.1: trunk(dropout)
    )


@pytest.mark.parametrize(
    "changes", [{}, {"lfem": False}, {"bank": "released", "balance": "bit", "margin": 0.4}]
)
def test_what_is_written_as_release_is_read_as_the_same_model(tmp_path, tiny_names, changes):
    model = small(**changes)
    write_release(model, tmp_path / "last.ckpt")
    again, said = cfitr.read(tmp_path / "last.ckpt")
    assert (
        said["release"]
        and said["dropped"] == []
        and again.config == model.config
        and not again.training
    )
    assert torch.equal(everything(again, pairs()), everything(model, pairs()))


def released_file(model: CFITR) -> dict[str, torch.Tensor]:
    """What the authors' training leaves of `model`: with LFEM untrained, dead blocks and the frozen
    matching head.
    """
    dead = {
        "transformer.SE_blocks.0.norm1.weight": torch.ones(144),
        "itm_score.fc.weight": torch.zeros(2, 16),
        "itm_score.fc.bias": torch.zeros(2),
        "text_embeddings.position_ids": torch.arange(LENGTH)[None],
    }
    return {
        **release_states.cfitr_state(model),
        **dead,
        **{f"res.{name}": p for name, p in cfitr.LFEM(16).state_dict().items()},
    }


def test_a_released_file_says_its_sizes_by_its_tensors_and_lists_what_is_dropped(
    tmp_path, tiny_names, monkeypatch
):
    monkeypatch.setattr(
        CFITRConfig, "paper", classmethod(lambda cls, **changes: replace(SMALL, **changes))
    )
    model = small(bits=9, hidden=21, lfem=False)
    state = released_file(model)
    torch.save(
        {"state_dict": state, "hyper_parameters": {"config": {"batch_size": 256}}, "epoch": 49},
        tmp_path / "last.ckpt",
    )
    again, said = cfitr.read(tmp_path / "last.ckpt")
    assert again.config == replace(model.config, bank="released", false_from="all")
    assert (
        set(said["dropped"]) == set(state) - set(release_states.cfitr_state(model))
        and len(said["dropped"]) == 4 + 21
    )
    assert torch.equal(everything(again, pairs()), everything(model, pairs()))


def test_the_released_names_are_those_of_vilt():
    model = small()
    state = release_states.cfitr_state(model)
    attention = model.vilt.encoder.layer[3].attention.attention
    joined = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
    assert torch.equal(state["transformer.blocks.3.attn.qkv.weight"], joined)
    assert torch.equal(state["transformer.norm.bias"], model.vilt.layernorm.bias)
    assert {
        "transformer.cls_token",
        "transformer.pos_embed",
        "transformer.patch_embed.proj.bias",
        "pooler.dense.weight",
        "token_type_embeddings.weight",
        "text_embeddings.token_type_embeddings.weight",
        "transformer.blocks.0.mlp.fc2.bias",
        "res.net.7.running_var",
        "image_module.1.num_batches_tracked",
        "rank_output.bias",
    } <= set(state)
    assert not any("vilt" in name or name == "bank" for name in state)
    assert len(state) == len(model.state_dict()) - 1 - 2 * 2 * 4


def test_a_released_key_without_a_place_is_told(tmp_path):
    model = small()
    state = release_states.cfitr_state(model)
    for broken, message in (
        ({**state, "momentum": torch.zeros(1)}, "unknown to the model .1.:\n  momentum"),
        (
            {k: v for k, v in state.items() if k != "transformer.blocks.1.attn.qkv.bias"},
            "in the file .3.",
        ),
        ({k: v for k, v in state.items() if not k.startswith("res.")}, "in the file .21."),
    ):
        before = everything(model, pairs())
        with pytest.raises(UserError, match=message):
            cfitr.load_release(model, {k: torch.zeros_like(v) for k, v in broken.items()})
        assert torch.equal(everything(model, pairs()), before)


def vilt_files(model: CFITR) -> dict[str, dict[str, torch.Tensor]]:
    """One trunk as its authors, and as transformers with and without heads write it."""
    generator = torch.Generator().manual_seed(4)
    ours = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in model.vilt.state_dict().items()
    }
    prefixed = {f"vilt.{name}": value for name, value in ours.items()}
    heads = {
        "rank_output.weight": torch.full((1, 16), 3.0),
        "rank_output.bias": torch.full((1,), 4.0),
    }
    matching = {
        "itm_score.fc.weight": torch.arange(2.0)[:, None].expand(2, 16),
        "itm_score.fc.bias": torch.tensor([5.0, 6.0]),
    }
    official = (
        release_states.vilt_state(prefixed)
        | matching
        | {
            "mlm_score.bias": torch.zeros(WORDS),
            "mlm_score.decoder.weight": ours["embeddings.text_embeddings.word_embeddings.weight"],
            "text_embeddings.position_ids": torch.arange(LENGTH)[None],
        }
    )
    return {
        "official": official,
        "official_rank": official | heads,
        "bare": ours,
        "masked_lm": prefixed | {"mlm_score.bias": torch.zeros(WORDS)},
        "retrieval": prefixed | heads,
    }


def fill(model: CFITR, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Starts the model from a file that holds these tensors, whatever its size."""
    torch.save(state, folder / "vilt.bin")
    replace(starting_weights.paper_vilt_start(str(folder / "vilt.bin")), options={}).fill(model)


@pytest.mark.parametrize(
    "kind, rank",
    [
        ("official", (1.0, 6.0)),
        ("official_rank", (3.0, 4.0)),
        ("bare", None),
        ("masked_lm", None),
        ("retrieval", (3.0, 4.0)),
    ],
)
def test_a_vilt_starts_the_trunk_and_its_matching_head_the_ranking(kind, rank, tmp_path):
    model = small()
    files, before = (
        vilt_files(model),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    fill(model, files[kind], tmp_path)
    for name, value in model.state_dict().items():
        if name.startswith("vilt."):
            assert torch.equal(value, files["bare"][name.removeprefix("vilt.")]), name
        elif not name.startswith("rank_output") or rank is None:
            assert torch.equal(value, before[name]), name
    if rank:
        assert (model.rank_output.weight.unique().item(), model.rank_output.bias.item()) == rank


@pytest.mark.parametrize("kind", ["official", "retrieval"])
def test_a_vilt_that_does_not_fit_is_not_loaded_in_part(kind, tmp_path):
    model = small()
    before, state = everything(model, pairs()), vilt_files(model)[kind]
    lacking = {name: value for name, value in state.items() if "pooler" not in name}
    other = {name: value for name, value in state.items() if "rank" not in name} | {
        "nlvr2_head.weight": torch.zeros(1)
    }
    wide = dict(state.items())
    wide |= {
        name: torch.zeros(3, 16) for name in state if name.endswith("token_type_embeddings.weight")
    }
    for broken in (lacking, other, wide):
        with pytest.raises(UserError, match="nothing was loaded"):
            fill(model, broken, tmp_path)
        assert torch.equal(everything(model, pairs()), before)


def test_our_own_checkpoints_come_back_from_training_without_the_bank(tmp_path, tiny_names):
    settings = loop.TrainConfig(
        epochs=1, lr=1e-3, batch_size=6, schedule="constant", warmup_fraction=0.0
    )

    def build_and_train():
        return loop.load_or_train(
            "cfitr",
            small,
            [pairs()],
            settings,
            tmp_path,
            "k" * 64,
            loop.Options(meta={"system": "cfitr", "model": asdict(SMALL)}),
        )

    (model, _, trained), (loaded, _, trained_again) = build_and_train(), build_and_train()
    (found,) = tmp_path.glob("cfitr-*/model.safetensors")
    again, meta = cfitr.read(found)
    assert (trained, trained_again) == (True, False) and torch.equal(loaded.bank, model.bank)
    assert (
        again.config == SMALL
        and again.bank is None
        and not again.training
        and meta["history"][0]["rerank"] > 0
    )
    assert_close(everything(again, pairs()), everything(model.cpu(), pairs()))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_of_other_models_and_files_with_code_are_refused(tmp_path, tiny_names):
    model = small()
    state = {name: value for name, value in model.state_dict().items() if name != "bank"}
    meta = {"system": "cfitr", "model": asdict(model.config)}
    made = {
        "pir": (
            checkpoints.save_checkpoint(tmp_path / "pir", state, meta | {"system": "pir"}),
            "something else.*'pir'",
        ),
        "silent": (
            checkpoints.save_checkpoint(tmp_path / "silent", state, {"system": "cfitr"}),
            "does not say which CFITR",
        ),
        "newer": (
            checkpoints.save_checkpoint(tmp_path / "newer", state, meta | {"model": {"magic": 1}}),
            "does not say which CFITR",
        ),
        "cut": (
            checkpoints.save_checkpoint(
                tmp_path / "cut", {k: v for k, v in state.items() if k != "rank_output.bias"}, meta
            ),
            "missing in the file .1.:\n  rank_output.bias",
        ),
    }
    torch.save({"state_dict": vilt_files(model)["official"]}, tmp_path / "vilt.ckpt")
    (tmp_path / "bomb.ckpt").write_bytes(pickle.dumps({"state_dict": Bomb(tmp_path / "touched")}))
    torch.save(
        {"state_dict": {"image_module.3.weight": Bomb(tmp_path / "touched")}},
        tmp_path / "armed.ckpt",
    )
    made |= {
        "vilt": (tmp_path / "vilt.ckpt", "holds no CFITR"),
        "bomb": (tmp_path / "bomb.ckpt", "bomb.ckpt"),
        "armed": (tmp_path / "armed.ckpt", "armed.ckpt"),
        "absent": (tmp_path / "absent.ckpt", "no weight file"),
    }
    for path, message in made.values():
        with pytest.raises(UserError, match=message):
            cfitr.read(path)
    assert not (tmp_path / "touched").exists()


# ---- two processes
def half(rows: slice) -> dict[str, np.ndarray]:
    """Losses and gradients of one step on these rows of a batch, with running statistics and bank
    after it.
    """
    model = small()
    model.captions.draw = lambda row, count, also_true: torch.stack(
        [(row + 5 + 3 * i) % 24 for i in range(count)], dim=1
    )
    arrays = two_processes.one_step(model, {name: value[rows] for name, value in pairs(8).items()})
    return arrays | {
        f"buffer/{name}": value.numpy()
        for name, value in model.named_buffers()
        if "position_ids" not in name
    }


other = two_processes.fixture(__file__)


def test_two_processes_have_the_losses_gradients_statistics_and_bank_of_one(other):
    whole = half(slice(None))
    for part in two_processes.meet(other, half):
        two_processes.assert_alike(part, whole)
    assert {key for key in whole if key.startswith("grad/")} == {
        f"grad/{name}" for name, _ in small().named_parameters()
    }
    assert all(
        np.abs(whole[f"grad/{name}"]).max() > 1e-5
        for name in (
            "rank_output.weight",
            "res.net.3.weight",
            "image_module.0.weight",
            "textpooler_be.dense.weight",
        )
    )
    fresh = small()
    statistics = [name for name, _ in fresh.named_buffers() if "running" in name]
    assert len(statistics) == 2 * 5
    for name in statistics:
        assert not np.allclose(whole[f"buffer/{name}"], fresh.state_dict()[name].numpy())
    alone = half(slice(0, 4))  # one process alone has other batch statistics
    assert (
        np.abs(
            alone["buffer/image_module.1.running_mean"]
            - whole["buffer/image_module.1.running_mean"]
        ).max()
        > 1e-3
    )


if __name__ == "__main__":
    two_processes.be_the_other(half)
