"""Towers: what comes out of them, in which order, and under which names."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from torch import nn

from nbhelpers.data import image_input
from nbhelpers.data.augment import CLIP_MEAN
from nbhelpers.errors import UserError
from nbhelpers.papers.pir import PIR, PIRConfig
from nbhelpers.towers import backbones

TOKENS = {
    "swin_standin": (50, 96),
    "swin_t": (50, 768),
    "deit_s": (197, 384),
    "deit_s_released": (197, 384),
    "efficientnet_lite0": (50, 1280),
}
PRIORS = {"resnet50": (2048, 23_508_032), "vgg19_bn": (512, 20_035_392)}


@pytest.mark.parametrize("name", TOKENS)
def test_a_vision_tower_gives_a_global_token_and_the_local_ones(name):
    count, width = TOKENS[name]
    size = backbones.image_input(name).size
    with torch.device("meta"):
        tower = backbones.vision_tower(name).eval()
        assert backbones.image_tokens(tower, torch.empty(2, 3, size, size)).shape == (
            2,
            count,
            width,
        )
    assert tower.num_features == width


def test_every_vision_tower_is_in_the_table():
    assert set(TOKENS) == set(backbones.VISION)


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_gives_one_vector_without_classifier(name):
    width, parameters = PRIORS[name]
    with torch.device("meta"):
        tower = backbones.prior_tower(name).eval()
        assert tower(torch.empty(2, 3, 224, 224)).shape == (2, width)
    assert tower.num_features == width and sum(p.numel() for p in tower.parameters()) == parameters


def test_the_standin_prior_gives_its_width():
    tower = backbones.prior_tower("resnet_standin").eval()
    assert tower(torch.zeros(2, 3, 112, 112)).shape == (2, tower.num_features)


@pytest.mark.parametrize(
    "name, token",
    [
        ("swin_standin", lambda found, y, x: found[:, y, x]),
        ("efficientnet_lite0", lambda found, y, x: found[:, :, y, x]),
    ],
)
def test_local_tokens_stand_in_raster_order_behind_their_mean(name, token):
    tower, size = backbones.vision_tower(name).eval(), backbones.image_input(name).size
    with torch.no_grad():
        pixels = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
        tokens, found = backbones.image_tokens(tower, pixels), tower.forward_features(pixels)
    assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    for y, x in ((0, 0), (1, 5), (5, 1), (6, 6)):
        assert torch.equal(tokens[:, 1 + 7 * y + x], token(found, y, x))


def test_a_token_looks_at_its_place_in_the_picture():
    torch.manual_seed(0)
    tower = backbones.vision_tower("swin_standin").eval()
    pixels = torch.zeros(3, 3, 112, 112)
    for row, (y, x) in enumerate([(1, 5), (5, 2)], 1):  # a bright cell in an empty picture
        pixels[row, :, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = torch.randn(3, 16, 16)
    with torch.no_grad():
        tokens = backbones.image_tokens(tower, pixels)[:, 1:]
    assert (tokens[1:] - tokens[:1]).norm(dim=2).argmax(1).tolist() == [1 * 7 + 5, 5 * 7 + 2]


def test_the_tokens_of_a_swin_are_normalised_before_their_mean_is_taken():
    tower = backbones.vision_tower("swin_standin").eval()
    with torch.no_grad():
        local = backbones.image_tokens(tower, torch.randn(2, 3, 112, 112))[:, 1:]
    assert_close(local.mean(2) + 1, torch.ones(2, 49))  # the mean is 0 but for roundings
    torch.testing.assert_close(local.var(2, correction=0), torch.ones(2, 49), atol=1e-3, rtol=0)


def test_a_class_token_stays_the_global_one():
    tower = backbones.vision_tower("deit_s").eval()
    with torch.no_grad():
        pixels = torch.randn(1, 3, 224, 224)
        assert torch.equal(
            backbones.image_tokens(tower, pixels)[:, 0], tower.forward_features(pixels)[:, 0]
        )


@pytest.mark.parametrize("parted", [False, True])
def test_a_resting_efficientnet_sees_a_few_images_at_once_and_a_trained_one_the_batch(parted):
    tower, pixels, counts = (
        backbones.vision_tower("efficientnet_lite0").eval(),
        torch.randn(11, 3, 64, 64),
        [],
    )
    tower.conv_stem.register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
    see = (
        backbones.PartedTower(tower, 1).map_of
        if parted
        else lambda given: backbones.image_tokens(tower, given)
    )
    trained = see(pixels)
    with torch.inference_mode():
        resting = see(pixels)
    assert counts == [11, 8, 3]
    assert_close(resting, trained)
    tower.train()
    with torch.inference_mode():
        see(pixels)  # its batch norms want the whole batch
    assert counts[3:] == [11]


def test_names_that_are_not_there_are_answered_with_those_that_are():
    for call in (
        backbones.vision_tower,
        backbones.image_input,
        backbones.text_tower,
        backbones.prior_tower,
    ):
        with pytest.raises(
            UserError, match="There is no .* tower called 'resnet18'; choose one of .*standin"
        ):
            call("resnet18")


@pytest.mark.parametrize(
    "build",
    [
        backbones.vision_tower,
        backbones.image_input,
        backbones.text_tower,
        backbones.prior_tower,
        backbones.clip,
        backbones.instruction_encoder,
        backbones.vilt,
        backbones.image_reader,
        backbones.language_model,
    ],
)
def test_advice_every_name_that_is_listed_can_be_chosen(build):
    with pytest.raises(UserError) as caught:
        build("resnet18")
    listed = str(caught.value).split("; choose one of ")[1].removesuffix(".").split(", ")
    assert len(listed) > 1
    for name in listed:
        with torch.device("meta"):
            assert build(name) is not None


def test_the_towers_of_bita_are_listed_with_those_of_clip():
    names = set(backbones.VISION) | set(backbones.CLIP_VISION)
    with pytest.raises(UserError) as caught:
        backbones.image_reader("resnet18")
    assert all(name in str(caught.value) for name in names)


def test_advice_the_numbers_of_stages_that_are_named_can_be_fine_tuned():
    with torch.device("meta"):
        tower = backbones.vision_tower("efficientnet_lite0")
    for wrong in (-1, 0, 7):
        with pytest.raises(UserError, match=f"tuned_stages is {wrong}, but .*; choose 1 to 6.$"):
            backbones.PartedTower(tower, wrong)
    for stages in range(1, 7):
        assert backbones.PartedTower(tower, stages).norms()


def test_advice_a_tower_without_stages_stays_frozen_or_gives_way_to_efficientnet():
    fields = {"vocab_size": 30, "freeze_towers": True}
    advice = "choose 0, or the vision tower efficientnet_lite0.$"
    with pytest.raises(UserError, match=advice):
        PIR(PIRConfig.tiny(**fields, tuned_stages=1))
    assert PIR(PIRConfig.tiny(**fields, tuned_stages=0)).parted is None
    other = PIRConfig.tiny(**fields, tuned_stages=1, vision="efficientnet_lite0")
    assert PIR(other).parted.stages == 1


def test_the_compact_tower_is_fed_as_it_was_trained_and_the_others_as_clip():
    assert backbones.image_input("efficientnet_lite0") == image_input.ImageInput(
        224, (0.5,) * 3, (0.5,) * 3
    )
    assert (
        backbones.image_input("swin_t") == image_input.ImageInput(224)
        and image_input.ImageInput(224).mean == CLIP_MEAN
    )


def test_text_towers_have_the_published_sizes_without_a_pooler():
    with torch.device("meta"):
        towers = {name: backbones.text_tower(name) for name in ("bert_base", "minilm")}
    assert {name: sum(p.numel() for p in tower.parameters()) for name, tower in towers.items()} == {
        "bert_base": 108_891_648,
        "minilm": 22_565_376,
    }
    assert towers["bert_base"].config.layer_norm_eps == 1e-12 and towers["bert_base"].pooler is None


def test_the_padding_token_trains_like_any_other():
    tower = backbones.text_tower("bert_standin", 30)
    tower(
        input_ids=torch.tensor([[2, 7, 0, 0]]), attention_mask=torch.ones(1, 4)
    ).last_hidden_state.square().sum().backward()
    table = tower.embeddings.word_embeddings
    assert (
        table.num_embeddings == 30
        and table.padding_idx is None
        and table.weight.grad[0].abs().max() > 0
    )


def test_a_scene_head_reads_the_global_token():
    head = backbones.SceneHead(20, hidden=8)
    assert head.num_features == 8 and head(torch.randn(3, 20)).shape == (3, 8)
    assert isinstance(head, nn.Module) and backbones.SceneHead(4).num_features == 256
