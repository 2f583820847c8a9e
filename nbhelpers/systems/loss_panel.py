"""A live curve of the loss beside the progress bar of a training.

panel = LossPanel()
model = panel.watch(model)   # then train as always

It only reads what the training computes: weights, keys and results stay the same. Where nobody
looks, as in a run without a browser, `watch` returns the model as it is and nothing is shown.
"""

from __future__ import annotations

import io
import os
import sys
import time
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from nbhelpers import figures

EVERY = 2.0  # seconds between two pictures
SMOOTH = 20  # batches of the running mean


def somebody_looks() -> bool:
    """Return whether this is a notebook in front of a reader.

    A run without a browser sets CI or TQDM_DISABLE.
    """
    if os.environ.get("CI") or os.environ.get("TQDM_DISABLE"):
        return False
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


class LossPanel(ipywidgets.VBox):
    """The loss of every batch, and its running mean, drawn every few seconds while it falls."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._unread: list[Tensor] = []  # on the device; to read them waits for it
        self._drawn = -np.inf
        self.image = ipywidgets.Image(format="png", layout={"width": "440px"})
        super().__init__([self.image])
        self.add_class("nbh-loss")
        self.layout.display = "none"  # until there is a curve

    def watch(self, model: nn.Module, always: bool = False) -> nn.Module:
        """Note what `model.loss` returns from now on; return the same model.

        always  also where nobody looks
        """
        if not (always or somebody_looks()):
            return model
        from IPython.display import display

        compute = model.loss

        def noted(*args: Any, **options: Any) -> dict[str, Tensor]:
            terms = compute(*args, **options)
            self._note(terms["loss"])
            return terms

        model.loss = noted
        display(self)
        return model

    @property
    def losses(self) -> np.ndarray:
        """The loss of each batch so far."""
        self._losses += torch.stack(self._unread).tolist() if self._unread else []
        self._unread = []
        return np.array(self._losses)

    def draw(self) -> Figure:
        """Return the curve so far."""
        losses = pd.Series(self.losses)
        losses.index += 1
        smooth = losses.rolling(SMOOTH, min_periods=1).mean()
        table = pd.DataFrame({"every batch": losses, f"mean of {SMOOTH}": smooth})
        return figures.curves({"training loss": table.rename_axis("batch")}, "loss")

    def _note(self, loss: Tensor) -> None:
        self._unread.append(loss.detach().float())
        if time.monotonic() - self._drawn < EVERY:
            return
        buffer = io.BytesIO()
        self.draw().savefig(buffer, format="png", dpi=100)
        self.image.value, self.layout.display = buffer.getvalue(), ""
        self._drawn = time.monotonic()
