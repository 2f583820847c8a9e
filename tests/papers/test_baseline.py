"""The frozen baseline: two frozen towers, two small heads that train."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close

from nbhelpers.papers.baseline import FrozenConfig, FrozenHeads
from nbhelpers.papers.pir import contrastive_loss
from nbhelpers.training import loop


def heads_model(**changes) -> FrozenHeads:
    torch.manual_seed(0)
    return FrozenHeads(FrozenConfig.tiny(40, **changes))


def pairs(count: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < torch.randint(3, 10, (count, 1), generator=generator)).long()
    return {
        "pixels": torch.randn(count, 3, 112, 112, generator=generator),
        "mask": mask,
        "ids": torch.randint(1, 40, (count, 9), generator=generator) * mask,
        "image_index": torch.arange(count) // 2,
    }


def test_only_the_heads_and_the_temperature_train(tmp_path):
    model, batch = heads_model(), pairs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = loop.TrainConfig(
        epochs=15, lr=3e-3, batch_size=8, schedule="constant", warmup_fraction=0.0
    )
    history = loop.fit(model, [batch], config, tmp_path)
    changed = {
        name.split(".")[0]
        for name, value in model.state_dict().items()
        if not torch.equal(value.cpu(), before[name])
    }
    assert changed == {"image_head", "text_head", "temp"}
    assert history.rows[-1]["loss"] < history.rows[0]["loss"] - 0.3
    assert history.rows[0]["temp"] == pytest.approx(0.07)


@pytest.mark.parametrize("call_train", [True, False])
def test_the_towers_rest_from_the_first_batch_on(call_train):
    model = heads_model()
    if call_train:
        model.eval().train()
    assert model.training and model.image_head.training
    model.loss(pairs())["loss"].backward()
    for tower in (model.vision_encoder, model.text_encoder):
        assert not any(part.training for part in tower.modules())
        assert all(p.grad is None and not p.requires_grad for p in tower.parameters())
    assert all(
        p.grad is not None
        for p in (*model.image_head.parameters(), *model.text_head.parameters(), model.temp)
    )


def test_embeddings_are_heads_over_the_global_token_and_the_mean_of_the_words():
    model, batch = heads_model().eval(), pairs()
    with torch.no_grad():
        image, text = model.embed_batch(batch)
        local = model.vision_encoder.forward_features(batch["pixels"]).flatten(1, 2)
        assert_close(image, F.normalize(model.image_head(local.mean(1)), dim=1))
        for row, (ids, mask) in enumerate(zip(batch["ids"], batch["mask"], strict=True)):
            seen = model.text_encoder(input_ids=ids[mask == 1][None]).last_hidden_state[0]
            expected = F.normalize(model.text_head(sum(seen) / len(seen)), dim=0)
            assert_close(text[row], expected)
        terms = model.loss(batch)
        assert_close(terms["loss"], contrastive_loss(image, text, model.temp, batch["image_index"]))


def test_cached_features_take_the_place_of_pixels_and_ids():
    model, batch = heads_model().eval(), pairs()
    cached = model.image_features(batch["pixels"]) | model.text_features(
        batch["ids"], batch["mask"]
    )
    cached |= {"mask": batch["mask"], "image_index": batch["image_index"]}
    assert_close(model.loss(cached)["loss"], model.loss(batch)["loss"])


def test_without_a_hidden_layer_the_heads_are_linear():
    model = heads_model(hidden=0, embed_dim=24)
    assert isinstance(model.image_head, torch.nn.Linear) and model.eval().encode_images(
        pairs()["pixels"]
    ).shape == (8, 24)


def test_the_loss_is_taken_in_float32_under_bfloat16():
    with torch.autocast("cpu", torch.bfloat16):
        terms = heads_model().loss(pairs())
    assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())


def test_the_configuration_holds_only_what_can_be_chosen():
    assert FrozenConfig.freeze_towers and FrozenConfig.use_mask
    assert not {"freeze_towers", "use_mask"} & set(asdict(FrozenConfig.compact()))
    with torch.device("meta"):
        model = FrozenHeads(FrozenConfig.compact())
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        == 1280 * 512 + 384 * 512 + 2 * 512 * 512 + 4 * 512 + 1
    )
