"""The loss panel draws what a training computes, and changes nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nbhelpers.systems import loss_panel
from nbhelpers.systems.loss_panel import LossPanel
from nbhelpers.training import loop


class Line(nn.Module):
    """y = w x, with a loss as the loop wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def loss(self, batch: dict) -> dict:
        return {"loss": (self.w * batch["x"] - 2 * batch["x"]).square().mean()}


BATCHES = [{"x": torch.arange(1.0, 5.0) + row} for row in range(6)]
SETTINGS = loop.TrainConfig(epochs=4, lr=0.1, batch_size=4)


def trained(folder, panel: LossPanel | None = None) -> tuple[Line, loop.History]:
    model = Line()
    if panel:
        assert panel.watch(model, always=True) is model
    return model, loop.fit(model, BATCHES, SETTINGS, folder, progress=False)


def test_it_notes_each_batch_and_the_training_stays_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_panel, "EVERY", 0.0)
    panel = LossPanel()
    plain, history = trained(tmp_path / "plain")
    watched, seen = trained(tmp_path / "watched", panel)
    assert torch.equal(plain.w, watched.w) and list(watched.state_dict()) == ["w"]
    assert [row["loss"] for row in seen.rows] == [row["loss"] for row in history.rows]
    assert len(panel.losses) == 24
    means = panel.losses.reshape(4, 6).mean(1)
    assert np.allclose(means, [row["loss"] for row in history.rows], rtol=1e-6)
    assert panel.image.value and panel.layout.display == ""
    every, smooth = panel.draw().axes[0].lines
    assert np.allclose(every.get_ydata(), panel.losses)
    assert np.isclose(smooth.get_ydata()[-1], panel.losses[-loss_panel.SMOOTH :].mean())


@pytest.mark.parametrize("variable", ["CI", "TQDM_DISABLE"])
def test_where_nobody_looks_the_model_is_left_alone(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    model = Line()
    assert LossPanel().watch(model) is model and "loss" not in vars(model)


def test_outside_a_notebook_nobody_looks(monkeypatch):
    for variable in ("CI", "TQDM_DISABLE"):
        monkeypatch.delenv(variable, raising=False)
    assert not loss_panel.somebody_looks()
