"""BITA: mixing, trained parts, the order of stages, captions, and files that are read again.

The numbers of the authors' code are in test_reference.py.
"""

from __future__ import annotations

import importlib.util
import linecache
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import nbformat
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from closeness import SINGLE, assert_close
from coloured_set import coloured, words
from release_files import write_release
from transformers import BertConfig, BertForPreTraining, CLIPConfig, CLIPModel

from nbhelpers.data import loaders, tokenization
from nbhelpers.errors import UserError
from nbhelpers.papers import bita, ift, own_part
from nbhelpers.papers.bita import Aligner, BITAConfig, Captioner
from nbhelpers.runs import batch as batch_module
from nbhelpers.tasks import caption_stages, caption_tokens, captioning, stand_ins
from nbhelpers.tasks.caption_tokens import AlignmentTokenizer, DecoderTokenizer, Tokenizers
from nbhelpers.tasks.captioning import CaptionTask, Described, PairsOfAll
from nbhelpers.tasks.frozen_towers import FrozenTowers
from nbhelpers.towers import backbones, checkpoints, ift_names, key_names, starting_weights
from nbhelpers.training import loop, schedule

WORDS, LENGTH, TOKENS = 40, 32, 50


def config(**changes) -> BITAConfig:
    return replace(
        BITAConfig.tiny(WORDS, 300, queries=4, width=16, heads=2, hidden=24, embed_dim=12),
        **changes,
    )


def aligner(**changes) -> Aligner:
    torch.manual_seed(0)
    return moved(Aligner(config(**changes)))


def captioner(**changes) -> Captioner:
    torch.manual_seed(0)
    return moved(Captioner(config(**changes)))


def moved(model):
    """Away from a start at which biases are zero and norms the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def batch(count: int = 6, vocabulary: int = WORDS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(LENGTH) < torch.randint(5, 15, (count, 1), generator=generator)).long()
    return {
        "vision": torch.randn(count, TOKENS, 96, generator=generator),
        "mask": mask,
        "ids": torch.randint(4, vocabulary, (count, LENGTH), generator=generator) * mask,
    }


# ---- the transformer
def test_the_fourier_transform_is_joint_and_not_of_one_axis_after_the_other():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    rows, columns = (
        torch.exp(-2j * torch.pi * torch.outer(k, k) / len(k))
        for k in (torch.arange(5), torch.arange(8))
    )
    expected = (rows.to(torch.cfloat) @ x.to(torch.cfloat) @ columns.to(torch.cfloat)).real
    assert_close(ift.fourier_mix(x), expected)
    assert not torch.allclose(
        ift.fourier_mix(x), torch.fft.fft(torch.fft.fft(x, dim=2).real, dim=1).real, atol=0.1
    )
    assert ift.fourier_mix(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "mixing, by_padding, by_words",
    [("fourier", True, True), ("attention", False, True), ("none", False, False)],
)
def test_what_a_caption_s_first_token_depends_on(mixing, by_padding, by_words):
    model, here = aligner(mixing=mixing), batch(1)
    with torch.no_grad():
        plain = model.embed_texts(here["ids"], here["mask"])
        length = int(here["mask"].sum())
        for place, changes in ((length - 2, by_words), (LENGTH - 1, by_padding)):
            other = here["ids"].clone()
            other[0, place] = 7 if other[0, place] != 7 else 8
            changed = (model.embed_texts(other, here["mask"]) - plain).abs().max() > SINGLE
            assert changed == changes


def test_only_queries_see_the_image_and_in_the_joint_pass_words_through_them():
    model, here = aligner(), batch(2)
    other = here["vision"] + 1.0 * torch.randn_like(here["vision"])
    with torch.no_grad():
        assert not torch.allclose(model.read(here["vision"]), model.read(other), atol=1e-4)
        first = model.Fformer.bert.encoder.layer[0]
        x = model.Fformer.bert.embeddings(model.query_tokens.expand(2, -1, -1), here["ids"])
        a, b = (first(x, 4, model.ln_vision(vision)) for vision in (here["vision"], other))
        assert not torch.allclose(a[:, :4], b[:, :4], atol=1e-4)
        torch.testing.assert_close(a[:, 4:], b[:, 4:], atol=0, rtol=0)
        assert not torch.allclose(
            model.match_logits(here["vision"], here["ids"]),
            model.match_logits(here["vision"], here["ids"].flip(0)),
        )


@pytest.mark.parametrize("cross_every, expected", [(1, 3), (2, 2), (3, 1)])
def test_attention_maps_are_what_the_layers_read(cross_every, expected):
    model, here = captioner(cross_every=cross_every), batch(2)
    with torch.no_grad():
        maps = model.attention_maps(here["vision"])
        assert len(maps) == expected and all(m.shape == (2, 4 // 2, 4, TOKENS) for m in maps)
        assert_close(maps[0].sum(3), torch.ones_like(maps[0].sum(3)))
        layer, context = model.Fformer.bert.encoder.layer[0], model.ln_vision(here["vision"])
        x = layer.fourier(model.Fformer.bert.embeddings(model.query_tokens.expand(2, -1, -1), None))
        read = maps[0] @ layer.crossattention._split("value", context)
        assert_close(
            layer.crossattention.output(read.transpose(1, 2).flatten(2), x),
            layer.crossattention(x, context),
        )


def test_a_bert_gives_words_norm_and_feed_forward_networks_to_text_and_queries():
    torch.manual_seed(0)
    bert = BertForPreTraining(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            pad_token_id=0,
        )
    )
    model = aligner()
    checkpoints.load_into(
        model.Fformer,
        ift_names.from_bert(bert.state_dict()),
        allow_missing=ift_names.FROM_BERT_LEFT,
    )
    for number, layer in enumerate(model.Fformer.bert.encoder.layer):
        theirs = bert.bert.encoder.layer[number]
        for ours in (layer.intermediate, layer.intermediate_query):
            assert torch.equal(ours.dense.weight, theirs.intermediate.dense.weight)
        assert torch.equal(layer.output_query.dense.weight, theirs.output.dense.weight)
        assert torch.equal(layer.output.LayerNorm.bias, theirs.output.LayerNorm.bias)
    embedding = model.Fformer.bert.embeddings.word_embeddings.weight
    assert (
        torch.equal(embedding[:WORDS], bert.bert.embeddings.word_embeddings.weight)
        and len(embedding) == WORDS + 1
    )
    assert model.Fformer.cls.predictions.decoder.weight is embedding
    assert torch.equal(model.Fformer.cls.predictions.bias[:WORDS], bert.cls.predictions.bias)


# ---- stage 1
def test_one_sided_gradients_reach_the_row_s_own_side_alone():
    image, text = (
        F.normalize(torch.randn(*shape), dim=-1).requires_grad_() for shape in ((5, 3, 8), (5, 8))
    )
    for two_sided in (False, True):
        i2t, t2i = bita.similarities(image, text, torch.tensor(0.07), two_sided)
        for loss, own, other in ((i2t.sum(), image, text), (t2i.sum(), text, image)):
            found = torch.autograd.grad(loss, (own, other), allow_unused=True, retain_graph=True)
            assert found[0].abs().sum() > 0 and (found[1] is not None) == two_sided


def test_similarity_is_that_of_the_best_query():
    image = torch.eye(4)[None, :2].expand(2, -1, -1)  # two queries: the first and the second axis
    i2t, t2i = bita.similarities(image, torch.eye(4)[[1, 2]], torch.tensor(0.5))
    assert i2t.tolist() == [[2.0, 0.0]] * 2 and t2i.tolist() == [[2.0, 2.0], [0.0, 0.0]]


def test_of_several_processes_the_right_column_is_the_row_s_own(monkeypatch):
    model, here, elsewhere = aligner(), batch(3), batch(7)
    # what process 0 has; this one is process 1
    elsewhere = {name: value[3:6] for name, value in elsewhere.items()}
    with torch.no_grad():
        before = {
            model.config.queries: model.embed_images(elsewhere["vision"]),
            None: model.embed_texts(elsewhere["ids"]),
        }
        monkeypatch.setattr(
            bita, "gather", lambda x: torch.cat([before[x.shape[1] if x.ndim == 3 else None], x])
        )
        monkeypatch.setattr(bita, "rank", lambda: 1)
        image, text = model.embed_images(here["vision"]), model.embed_texts(here["ids"])
        i2t, t2i = bita.similarities(image, text, model.temp)
        expected = [
            (side * other).sum(-1)
            for side, other in ((image, text[:, None]), (image, text[:, None]))
        ]
        right = torch.arange(3)
        for scores, own in zip((i2t, t2i), expected, strict=True):
            assert scores.shape == (3, 6)
            assert_close(scores[right, 3 + right], own.max(1).values / model.temp)
        wanted = (
            sum(F.cross_entropy(scores, 3 + right, label_smoothing=0.1) for scores in (i2t, t2i))
            / 2
        )
        assert_close(model.loss(here)["loss"], wanted)


def test_stage_1_refuses_captions_of_another_length():
    short = {name: value if name == "vision" else value[:, :20] for name, value in batch().items()}
    with pytest.raises(UserError, match="exactly 32 tokens, not 20"):
        aligner().loss(short)


# ---- stage 2
def test_the_frozen_parts_rest_and_gradients_pass_through_them():
    model, here = captioner(dropout=0.3).train(), batch(vocabulary=300)
    assert (
        not any(part.training for tower in model.frozen() for part in tower.modules())
        and model.Fformer.training
    )
    model.loss(here)["loss"].backward()
    for name, p in model.named_parameters():
        frozen = name.startswith(("visual_encoder", "opt_model"))
        assert p.requires_grad != frozen and (p.grad is None) == frozen, name
    assert model.query_tokens.grad.abs().sum() > 0
    assert not any(name.startswith(("visual_encoder", "opt_model")) for name in model.state_dict())


def test_in_16_bits_what_trains_stays_in_32():
    model, plain, here = (
        captioner(frozen_dtype="bfloat16").train(),
        captioner(),
        batch(vocabulary=300),
    )
    assert {p.dtype for tower in model.frozen() for p in tower.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        rotary = dict(
            Captioner(BITAConfig.compact(frozen_dtype="bfloat16")).opt_model.named_buffers()
        )
    assert rotary and {value.dtype for value in rotary.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(here)["loss"]
    loss.backward()
    assert all(
        p.grad.dtype == p.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )
    assert loss.item() == pytest.approx(plain.loss(here)["loss"].item(), rel=0.02)
    assert (
        model.eval()
        .generate(here["vision"], torch.tensor([2]), end=5, pad=1, beams=2, longest=4, shortest=1)
        .shape[1]
        <= 4
    )
    assert model.image_features(torch.randn(1, 3, 112, 112))["vision"].dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_caption(value):
    model, here = captioner(), batch(vocabulary=300)
    with pytest.raises(UserError, match="holds NaN or infinity, so there is no best caption"):
        model.eval().generate(
            value * here["vision"].abs(),
            torch.tensor([2]),
            end=5,
            pad=1,
            beams=2,
            longest=4,
            shortest=1,
        )


def test_a_convolutional_tower_sees_the_same_in_16_bits():
    def build(kind: str) -> Aligner:
        config = BITAConfig.compact(frozen_dtype=kind)
        return starting_weights.seeded(lambda: Aligner(config), 0)

    plain, half = build("float32"), build("bfloat16")
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    seen, wanted = half.image_features(pixels)["vision"], plain.image_features(pixels)["vision"]
    assert seen.dtype == torch.bfloat16
    # pretrained weights: at least 0.98
    likeness = F.cosine_similarity(seen.float(), wanted, dim=-1)
    assert likeness.min() > 0.9 and likeness.mean() > 0.95, likeness


def test_the_prompt_is_no_target_and_padding_changes_nothing():
    model, here = captioner(), batch(vocabulary=300)
    with torch.no_grad():
        plain, prompted = (model.loss(here, length)["loss"] for length in (0, 4))
        assert not torch.isclose(plain, prompted)
        other = here | {"ids": here["ids"].masked_fill(here["mask"] == 0, 9)}
        assert_close(model.loss(other)["loss"], plain)
        logits = model.opt_model.lm_head(
            model.states(model.prefix(here["vision"]), here["ids"], here["mask"])
        )[:, 3:-1]
        wanted = bita.targets(here["ids"], here["mask"], 4)
        assert_close(prompted, F.cross_entropy(logits.transpose(1, 2), wanted))
        assert (wanted != -100).sum() == here["mask"].sum() - 4 * len(wanted)


def test_reading_captions_in_groups_changes_neither_loss_nor_gradients(monkeypatch):
    here, found = batch(7, vocabulary=300), []
    here["mask"] = (
        torch.arange(here["ids"].shape[1]) < torch.tensor([9, 6, 12, 5, 7, 12, 8])[:, None]
    ).long()
    for groups in (1, bita.GROUPS, 99):
        monkeypatch.setattr(bita, "GROUPS", groups)
        model = captioner()
        model.loss(here, 4)["loss"].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for others in found[1:]:
        assert_close(others, found[0])


def test_generation_ends_at_the_line_break_and_does_not_depend_on_the_batch():
    model, vision = captioner(), batch(7)["vision"]
    prompt = torch.tensor([2, 30, 31])
    together = model.generate(vision, prompt, end=5, pad=1, beams=3, longest=9, shortest=3)
    assert together.shape[0] == 7 and together.shape[1] <= 9
    assert not (together[:, :3] == 5).any()
    again = model.generate(vision, prompt, end=5, pad=1, beams=3, longest=9, shortest=3)
    assert torch.equal(together, again)
    alone = [
        model.generate(one[None], prompt, end=5, pad=1, beams=3, longest=9, shortest=3)[0]
        for one in vision
    ]
    for row, one in zip(together, alone, strict=True):
        assert torch.equal(row[: len(one)], one) and (row[len(one) :] == 1).all()


def test_beams_share_what_was_read_before_the_first_word_and_it_is_read_once():
    model, vision, prompt = captioner(), batch(3)["vision"], torch.tensor([2, 30, 31])
    seen, options = (
        [],
        {
            "num_beams": 4,
            "max_new_tokens": 9,
            "min_new_tokens": 3,
            "do_sample": False,
            "eos_token_id": 5,
            "pad_token_id": 1,
        },
    )
    with torch.inference_mode():
        start = torch.cat(
            [model.prefix(vision), model.opt_model.get_input_embeddings()(prompt.expand(3, -1))],
            dim=1,
        )
        plain = model.opt_model.generate(
            inputs_embeds=start,
            attention_mask=torch.ones(start.shape[:2], dtype=torch.long),
            **options,
        )
    model.opt_model.base_model.decoder.layers[0].register_forward_pre_hook(
        lambda module, given: seen.append(given[0].shape[:2])
    )
    assert torch.equal(
        model.generate(vision, prompt, end=5, pad=1, beams=4, longest=9, shortest=3), plain
    )
    assert seen[0] == (3, start.shape[1] - 1) and all(shape == (12, 1) for shape in seen[1:])


def test_stage_2_takes_queries_and_query_branch_over():
    first = aligner()
    second = captioner(queries=4).begin(first)
    for name in (
        "query_tokens",
        "ln_vision.weight",
        "Fformer.bert.encoder.layer.2.crossattention.self.key.weight",
    ):
        assert torch.equal(second.get_parameter(name), first.get_parameter(name))
    assert_close(second.read(batch()["vision"]), first.read(batch()["vision"]))
    with pytest.raises(UserError, match="of another shape"):
        captioner(queries=5).begin(first)


# ---- words
@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A data set, a start with a language model that has read nothing, and both tokenizers."""
    folder = tmp_path_factory.mktemp("bita")
    data = coloured(folder / "set")
    texts = [bita.clean_bita_caption(text) for text in data.table.captions.text]
    pairs = stand_ins.train_byte_pairs(
        [*texts, *(f"a photo of {text}" for text in texts)], folder / "lm" / "tokenizer.json", 300
    )
    decoder = DecoderTokenizer(pairs, "opt_standin")
    torch.manual_seed(0)
    language = checkpoints.save_checkpoint(
        folder / "lm" / "decoder", backbones.language_model("opt_standin", decoder.vocab_size), {}
    )
    clip = checkpoints.save_checkpoint(folder / "clip", backbones.clip("clip_standin"), {})
    words(data, folder)
    towers = {
        "visual_encoder": replace(
            starting_weights.Tower.stand_in("clip", clip, "random"), layout="clip_vision_3"
        ),
        "opt_model": starting_weights.Tower.stand_in("lm", language, "random"),
    }
    start = starting_weights.Start(str(folder / "tokenizer.json"), 32, towers, fixed=True, sep=True)
    return data, start, AlignmentTokenizer(start.tokenizer), decoder


def task_of(scene, folder, views=0, **options) -> CaptionTask:
    data, start, reading, decoder = scene
    made = config(vocab_size=reading.vocab_size, decoder_vocab=decoder.vocab_size)
    frozen = FrozenTowers(caption_stages.fill_frozen(start, Aligner(made)), folder / "cache", views)
    return CaptionTask(data, made, Tokenizers(reading, decoder), 0, 1, frozen, **options)


def test_words_of_the_decoder(scene):
    *_, decoder = scene
    prompted = decoder.prompted("a photo of")
    ids, mask = prompted(["a red field", "a green field"])
    assert ids.shape == mask.shape == (2, 32) and (ids[:, 0] == decoder.first).all()
    assert torch.equal(ids[0, : prompted.prompt_length], ids[1, : prompted.prompt_length])
    assert ids[0, : prompted.prompt_length].tolist() == prompted.prompt_ids()
    assert ids[0][mask[0] == 1][-1] == decoder.end and (ids[mask == 0] == decoder.pad_id).all()
    assert prompted.decode(ids) == ["a photo of a red field", "a photo of a green field"]
    assert decoder.decode(
        torch.tensor([[*decoder.encode(["a red field"])[0][1:], *decoder.encode(["more"])[0]]])
    ) == ["a red field"]
    released = decoder.prompted("a photo of", space=False)(["trees"])
    assert decoder.decode(released[0]) == ["a photo oftrees"]
    cut = decoder.encode(["a red field " * 40])[0]
    assert len(cut) == 32 and cut[-1] != decoder.end
    assert len({decoder.sha256, prompted.sha256}) == 2


def test_a_tokenizer_of_another_kind_is_refused(scene, tmp_path):
    _, start, *_ = scene
    with pytest.raises(UserError, match="has no '</s>'"):
        DecoderTokenizer(start.tokenizer, "opt_standin")
    with pytest.raises(UserError, match="holds no tokenizer of byte pairs"):
        DecoderTokenizer(tmp_path, "opt_standin")


def test_captions_of_stage_1_have_one_length(scene):
    ids, mask = scene[2](["a red field", "a green field with three trees " * 20])
    assert ids.shape == (2, 32) and mask.sum(1).tolist() == [5, 32]


# ---- stages
def settings(stage: str, **changes) -> loop.TrainConfig:
    return bita.train_config(
        stage,
        **({"epochs": 2, "lr": 1e-3, "batch_size": 8, "warmup_steps": 2, "workers": 1} | changes),
    )


def test_three_stages_follow_each_other_and_are_found_again(scene, tmp_path, capsys):
    task, start = task_of(scene, tmp_path), scene[1]
    done = [caption_stages.train_stage("stage1", task, start, settings("stage1"), tmp_path)]
    for stage in ("stage2", "finetune"):
        done.append(
            caption_stages.train_stage(stage, task, start, settings(stage), tmp_path, done[-1])
        )
    printed = capsys.readouterr().out
    assert [type(one.model) for one in done] == [Aligner, Captioner, Captioner] and len(
        {one.key for one in done}
    ) == 3
    assert (
        "val_CIDEr_BLEU4" in done[2].history.rows[0]
        and "val_CIDEr_BLEU4" not in done[1].history.rows[0]
    )
    again = caption_stages.train_stage(
        "finetune", task, start, settings("finetune"), tmp_path, done[1]
    )
    assert again.key == done[2].key and printed.endswith(capsys.readouterr().out)
    for name, value in done[2].model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    found = task.describe(done[2].model, "test", longest=6, shortest=2, beams=2)
    assert list(found.captions) == list(task.table("test").images.image_id) and found.per_second > 0
    assert (
        found.captions
        == task.describe(again.model, "test", longest=6, shortest=2, beams=2).captions
    )
    path = found.write(tmp_path / "captions.json", "bita", "", "test", "colours")
    assert '"references"' in path.read_text() and all(
        len(texts) == 2 for texts in found.references.values()
    )
    for stage, before in (("stage1", done[0]), ("finetune", None), ("stage4", None)):
        with pytest.raises(UserError, match="cannot begin from"):
            caption_stages.train_stage(stage, task, start, settings("stage1"), tmp_path, before)


def half_mix(x: torch.Tensor) -> torch.Tensor:
    """The mixing as a reader might edit it."""
    return 0.5 * ift.fourier_mix(x)


def test_an_edited_mixing_has_its_own_key_and_model_and_is_refused_elsewhere(scene, tmp_path):
    task, start = task_of(scene, tmp_path), scene[1]
    made = [
        caption_stages.train_stage(
            "stage1", task, start, settings("stage1", epochs=1), home, None, mix
        )
        for home, mix in ((tmp_path / "ours", ift.fourier_mix), (tmp_path / "own", half_mix))
    ]
    ours, own = made
    assert ours.key != own.key
    assert own.model.Fformer.bert.encoder.layer[0].fourier.mix is half_mix
    assert not torch.equal(ours.model.query_tokens, own.model.query_tokens)
    paths = [
        tmp_path / f"{name}-{one.key[:16]}" / "model.safetensors"
        for name, one in zip(("ours", "own"), made, strict=True)
    ]
    assert isinstance(bita.read(paths[0])[0], Aligner)
    with pytest.raises(UserError, match="fourier_mix"):
        bita.read(paths[1])
    later = caption_stages.train_stage(
        "stage2", task, start, settings("stage2", epochs=1), tmp_path / "later", own, half_mix
    )
    assert later.model.Fformer.bert.encoder.layer[0].fourier.mix is half_mix


def mixing_of_the_notebook(edit: tuple[str, str] = ("", "")) -> dict:
    """The names that the cell of 24_bita defines in which the mixing stands, perhaps edited."""
    cell = cell_with("def fourier_mix").replace(*edit)
    linecache.cache["<cell>"] = len(cell), None, cell.splitlines(keepends=True), "<cell>"
    names = {"__name__": "__main__", "torch": torch, "ift": ift, "own_part": own_part}
    exec(compile(cell, "<cell>", "exec"), names)
    return names


def test_the_mixing_of_the_notebook_is_the_package_s_until_it_is_edited(capsys):
    ours = mixing_of_the_notebook()
    key = loop.checkpoint_key([], "pairs", "start", 0, Aligner, ours["fourier_mix"])
    edited = mixing_of_the_notebook(("dim=(1, 2))", 'dim=(1, 2), norm="ortho")'))
    assert key != loop.checkpoint_key([], "pairs", "start", 0, Aligner, edited["fourier_mix"])
    assert (ours["same_mix"], edited["same_mix"]) == (True, False)
    assert capsys.readouterr().out.splitlines()[1].endswith("edited, differs from the package's")


def test_a_stopped_stage_goes_on_as_if_it_had_not_stopped(scene, tmp_path, monkeypatch):
    task, start = task_of(scene, tmp_path), scene[1]
    whole = caption_stages.train_stage(
        "stage2", task, start, settings("stage2"), tmp_path / "whole"
    )

    def stop(trainer):
        end(trainer)
        raise KeyboardInterrupt

    end = loop._Trainer._end_epoch
    monkeypatch.setattr(loop._Trainer, "_end_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        caption_stages.train_stage("stage2", task, start, settings("stage2"), tmp_path / "parts")
    monkeypatch.undo()
    parts = caption_stages.train_stage(
        "stage2", task, start, settings("stage2"), tmp_path / "parts"
    )
    assert parts.key == whole.key
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name


def cell_with(text: str) -> str:
    """The source of the cell of 24_bita that holds this text."""
    cells = nbformat.read(batch_module.NOTEBOOKS / "24_bita.ipynb", as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code" and text in cell.source)


@pytest.fixture
def one_batch_at_a_time(scene, tmp_path, monkeypatch):
    """A task that refuses to give a batch of a split while an earlier one is still held, but for
    the one just read.
    """
    given, seen = [], CaptionTask.seen

    def watched(self, model, split):
        for vision in seen(self, model, split):
            assert sum(reference() is not None for reference in given) <= 1
            given.append(weakref.ref(vision))
            yield vision
            del vision

    monkeypatch.setattr(captioning, "BATCH", 3)
    monkeypatch.setattr(CaptionTask, "seen", watched)
    yield task_of(scene, tmp_path)
    assert len(given) > 2


def test_the_notebook_keeps_the_attention_of_one_batch_on_the_device(scene, one_batch_at_a_time):
    task = one_batch_at_a_time
    model = caption_stages.build_captioner(scene[1], task.config, 0).eval()
    names = {
        "task": task,
        "model": model,
        "data": scene[0],
        "np": np,
        "torch": torch,
        "run": MagicMock(),
        "figures": MagicMock(),
    }
    exec(cell_with("attention_maps("), names)
    whole = torch.from_numpy(np.float32(task.vision("test")["vision"]))
    with torch.no_grad():
        expected = torch.stack([layer.mean(1) for layer in model.attention_maps(whole)], dim=1)
    assert_close(names["maps"], expected)


def test_the_notebook_compares_one_batch_of_images_with_the_captions(scene, one_batch_at_a_time):
    task, told, kept = one_batch_at_a_time, [], []
    one = scene[1].build(lambda: Aligner(task.config), 0).eval()
    figures = SimpleNamespace(metrics={"mR": 100.0})
    names = {
        "task": task,
        "given": None,
        "same_mix": True,
        "train": lambda *_: SimpleNamespace(model=one),
        "words": task.words,
        "bita": bita,
        "loaders": loaders,
        "tokenization": tokenization,
        "run": SimpleNamespace(device="cpu", expect=lambda holds, _: kept.append(holds)),
        "torch": torch,
        "recall": SimpleNamespace(
            evaluate=lambda scores, owner: told.append(scores) or figures,
            chance=lambda owner: {"mR": 1.0},
        ),
    }
    exec(cell_with("one.embed_images("), names)
    exec(cell_with("aligned, chance = retrieval_on_val("), names)
    table = task.table("val")
    whole = torch.from_numpy(np.float32(task.vision("val")["vision"]))
    with torch.no_grad():
        ids, mask = task.words([bita.clean_bita_caption(text) for text in table.captions.text])
        expected = torch.einsum(
            "bqe,ne->bnq", one.embed_images(whole), one.embed_texts(ids, mask)
        ).amax(2)
    assert_close(told[0], expected)
    assert kept == [True]  # an mR of 100 is above the least


def test_pixels_and_cached_features_give_the_same_loss(scene, tmp_path):
    task, start = task_of(scene, tmp_path), scene[1]
    model = caption_stages.build_captioner(start, task.config, 0).eval()
    ids, mask = task.decoder(["a red field"] * 4)
    pixels = task._pixels(task.data, task.table("train"), np.arange(4))
    cached = torch.from_numpy(np.float32(task.vision("train")["vision"][:4]))
    with torch.no_grad():
        a, b = (
            model.loss({name: value, "ids": ids, "mask": mask})["loss"]
            for name, value in (("pixels", pixels), ("vision", cached))
        )
    assert a.item() == pytest.approx(b.item(), rel=1e-3)  # float16 in the cache
    augmented = CaptionTask(
        task.data, task.config, Tokenizers(task.words, task.decoder), workers=1
    ).loader("finetune", 4)
    assert next(iter(augmented))["pixels"].shape == (4, 3, 112, 112)
    assert next(iter(task_of(scene, tmp_path, views=2).loader("stage1", 8)))["vision"].shape == (
        8,
        TOKENS,
        96,
    )


def test_several_sets_are_one_in_the_first_two_stages(scene, tmp_path):
    other = coloured(tmp_path / "other", "others")
    task = task_of(scene, tmp_path, others=[other])
    alone, both = (
        task_of(scene, tmp_path).loader("stage1", 8).dataset,
        task.loader("stage1", 8).dataset,
    )
    assert (
        isinstance(both, PairsOfAll)
        and len(both) == 2 * len(alone)
        and len(task.loader("finetune", 8).dataset) == len(alone)
    )
    rows = [3, len(alone) + 1, 0, len(alone) + 7]
    found, own = both.__getitems__(rows), alone.__getitems__([3, 0])
    for name in ("vision", "ids", "row"):
        assert torch.equal(found[name][[0, 2]], own[name])
    assert found["row"].tolist() == [3, 1, 0, 7]
    for stage, differs in (("stage1", True), ("finetune", False)):
        assert (task.content(stage) != task_of(scene, tmp_path).content(stage)) == differs


def test_released_schedule_jumps_after_its_first_epoch():
    rates = schedule.learning_rates(bita.train_config("stage1"), 463)
    assert (
        rates[0] == pytest.approx(1e-6)
        and rates[462] == pytest.approx(1.0e-5, rel=0.02)
        and rates[463] == pytest.approx(9.14e-5, rel=1e-3)
    )
    assert len(set(rates[463:926])) == 1 and rates[-1] > 1e-5


# ---- scores
def test_quick_scores():
    wanted = {
        "a": ["A red house stands here .", "One red house ."],
        "b": ["Four green trees grow .", "Some trees grow there ."],
        "c": ["A blue sea with waves .", "The sea is blue ."],
    }
    right = Described({name: texts[0] for name, texts in wanted.items()}, wanted, 2.0)
    wrong = Described(
        {"a": "", "b": "a red house house house", "c": "a blue sea with waves"}, wanted, 1.0
    )
    assert (
        right.scores()["BLEU4"] == pytest.approx(100)
        and right.scores()["CIDEr"] > wrong.scores()["CIDEr"] > 0
    )
    assert right.scores()["CIDEr_BLEU4"] == pytest.approx(
        sum(right.scores()[name] for name in ("CIDEr", "BLEU4"))
    )
    each = wrong.cider_of_each()
    assert each["a"] == 0 and max(each, key=each.get) == "c" and right.per_second == 1.5


# ---- files
@pytest.mark.parametrize("make", [aligner, captioner])
def test_the_authors_files_come_back(make, tmp_path):
    model = make()
    write_release(model, tmp_path / "checkpoint.pth")
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (
        set(content) == {"model", "optimizer", "config", "scaler", "epoch"}
        and content["epoch"] == 4
    )
    assert content["model"]["Fformer.bert.embeddings.position_ids"].shape == (1, 32)
    assert ("Fformer.cls.predictions.decoder.weight" in content["model"]) == isinstance(
        model, Aligner
    )
    again, about = bita.read(tmp_path / "checkpoint.pth")
    assert (
        type(again) is type(model)
        and again.config == model.config
        and about["dropped"] == [bita.POSITION_IDS]
    )
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    lacking = {f"module.{name}": value for name, value in content["model"].items()}
    bita.load_release(make(), lacking)
    del lacking["module.query_tokens"]
    with pytest.raises(UserError, match="query_tokens"):
        bita.load_release(make(), lacking)
    checkpoints.save_checkpoint(
        tmp_path / "ours", model, {"system": "bita", "model": content["config"]["nbhelpers"]}
    )
    assert bita.read(tmp_path / "ours.safetensors")[0].config == model.config


def test_files_of_others_are_refused(tmp_path):
    torch.save({"model": {"weight": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no BITA"):
        bita.read(tmp_path / "other.pth")


def test_the_image_tower_of_an_open_clip_is_the_same_in_transformers(tmp_path):
    size = backbones.clip_size("clip_standin")
    torch.manual_seed(0)
    whole = open_clip.CLIP(size.embed_dim, size.vision, size.text).eval()
    checkpoints.save_checkpoint(tmp_path / "clip", whole, {})
    tower, channels, image = backbones.image_reader("clip_standin_3")
    checkpoints.load_into(tower, key_names.LAYOUTS["clip_vision_3"](tmp_path / "clip.safetensors"))
    pixels = torch.randn(2, 3, image.size, image.size)
    with torch.no_grad():
        visual = whole.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = visual.ln_pre(
            torch.cat([visual.class_embedding.expand(2, 1, -1), x], dim=1)
            + visual.positional_embedding
        )
        for block in visual.transformer.resblocks[:3]:
            x = block(x)
        assert_close(backbones.image_tokens(tower.eval(), pixels), x)
    assert x.shape[2] == channels


def test_the_image_tower_of_a_clip_of_transformers_is_cut(tmp_path):
    torch.manual_seed(0)
    vision = backbones.CLIP_VISION["clip_standin_3"][0] | {"num_hidden_layers": 4}
    whole = CLIPModel(
        CLIPConfig(
            vision_config=vision,
            text_config={
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "vocab_size": 20,
            },
        )
    ).eval()
    checkpoints.save_checkpoint(tmp_path / "clip", whole, {})
    tower, *_ = backbones.image_reader("clip_standin_3")
    checkpoints.load_into(tower, key_names.LAYOUTS["clip_vision_3"](tmp_path / "clip.safetensors"))
    pixels = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        theirs = whole.vision_model(pixels, output_hidden_states=True).hidden_states[3]
        assert_close(backbones.image_tokens(tower.eval(), pixels), theirs)


def test_an_opt_is_read_under_both_of_its_names(tmp_path):
    torch.manual_seed(0)
    model = backbones.language_model("opt_standin", 300)
    for start in ("model.", ""):
        state = {
            name.replace("model.", start, 1): value
            for name, value in model.state_dict().items()
            if name != "lm_head.weight"
        }
        checkpoints.save_checkpoint(tmp_path / "opt", state, {})
        again = backbones.language_model("opt_standin", 300)
        checkpoints.load_into(again, key_names.LAYOUTS["opt"](tmp_path / "opt.safetensors"))
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)


# ---- where it begins
def test_a_stand_in_language_model_reads_documents_with_a_thread(tmp_path):
    data, other = coloured(tmp_path / "set"), coloured(tmp_path / "other", "others")
    clip = starting_weights.Tower.stand_in(
        "clip",
        checkpoints.save_checkpoint(tmp_path / "clip", backbones.clip("clip_standin"), {}),
        "random",
    )
    image = replace(clip, layout="clip_vision_3")
    start, language = stand_ins.bita_start(data, other, image, tmp_path, 0, 2, "a photo of")
    made = config(vocab_size=AlignmentTokenizer(start.tokenizer).vocab_size)
    reader = caption_tokens.decoder_tokenizer(start, made)
    model = caption_stages.build_captioner(start, replace(made, decoder_vocab=reader.vocab_size), 0)
    for name, value in language.decoder.state_dict().items():
        assert torch.equal(model.opt_model.state_dict()[name], value), name
    table = data.table.split("train")
    documents = stand_ins.documents([table], reader, "a photo of", 0)
    assert len(documents) == 2 * len(table) and max(map(len, documents)) <= stand_ins.DOCUMENT
    owners = [
        image for image, _ in table.captions.groupby("image_id", sort=False) for _ in range(2)
    ]
    prompted = 0
    for image, document in zip(owners, documents, strict=True):
        texts = (
            reader._model.decode([token for token in document if token != reader.first])
            .strip()
            .split("\n")
        )
        own = [
            bita.clean_bita_caption(text)
            for text in table.captions.text[table.captions.image_id == image]
        ]
        assert sorted(text.removeprefix("a photo of ") for text in texts) == sorted(own)
        prompted += sum(text.startswith("a photo of") for text in texts)
    assert 0.3 < prompted / (2 * len(table.captions)) < 0.7


def test_the_paper_s_weights_are_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="CLIP ViT-L/14.*openai/clip-vit-large-patch14"):
        starting_weights.bita_start("paper", tmp_path)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"mixing": "wavelet"}, "mixing must be one of"),
        ({"heads": 5}, "must divide width"),
        ({"queries": 0}, "at least 1"),
        ({"positions": 20}, "positions must be at least 32"),
        ({"frozen_dtype": "int8"}, "frozen_dtype must be"),
    ],
)
def test_configurations_that_cannot_be_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        BITAConfig.tiny(WORDS, 300, **fields)


def test_what_the_compact_size_lacks_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(starting_weights.public_weights, "resolve", lambda name, folder=None: None)
    monkeypatch.setattr(starting_weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        starting_weights.smollm2(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_smollm2_goes_on_in_english(tmp_path):
    tower = starting_weights.smollm2(tmp_path)
    model = backbones.language_model("smollm2").eval()
    checkpoints.load_into(model, tower.state())
    reading = DecoderTokenizer(tower.path, "smollm2")
    ids = torch.tensor([reading.prompted("The capital of France is").prompt_ids()])
    with torch.inference_mode():
        found = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in reading.decode(found)[0]
