"""Look at PIR's belief with a slider for the cut k: ipywidgets around a trained model.

panel = BeliefPanel(pictures, beliefs, names, k=40)
display(panel)            # in JupyterLab, Notebook and Voilà
panel.draw(2, 20)         # or without hands: the figure of picture 2, cut behind 20 tokens
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from nbhelpers import figures
from nbhelpers.errors import UserError


class BeliefPanel(ipywidgets.VBox):
    """Show what stays of an image at each cut k, and what the test recall is there.

    pictures  (M,H,W,3) uint8;  beliefs  (M,N) rows that sum to one;  names  of the M pictures
    recall_at  k -> mR in percent, computed once for each k that is asked; None for none
    UserError if the counts differ.
    """

    def __init__(
        self,
        pictures: Sequence[np.ndarray],
        beliefs: np.ndarray,
        names: Sequence[str],
        k: int,
        recall_at: Callable[[int], float] | None = None,
    ):
        if not len(pictures) == len(beliefs) == len(names) > 0:
            raise UserError(
                f"There are {len(pictures)} pictures, {len(beliefs)} beliefs and {len(names)}"
                " names; give one of each for every picture."
            )
        self.pictures, self.beliefs, self.names = list(pictures), np.asarray(beliefs), list(names)
        self._recall_at = recall_at
        self._known: dict[int, float] = {}
        options = [(name, row) for row, name in enumerate(self.names)]
        self.picture = ipywidgets.Dropdown(options=options, description="image")
        self.cut = ipywidgets.IntSlider(
            k, 1, self.beliefs.shape[1], description="k", continuous_update=False
        )
        self.said = ipywidgets.HTML()
        self.image = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        top = ipywidgets.HBox([self.picture, self.cut, self.said])
        super().__init__([top, self.image])
        self.add_class("nbh-belief")
        for control in (self.picture, self.cut):
            control.observe(lambda _: self._show(), "value")
        self._show()

    def draw(self, row: int, k: int) -> Figure:
        """Return the figure of one picture with its k most believed tokens."""
        belief = self.beliefs[row]
        kept = (-belief).argsort(kind="stable")[:k]
        side = round((len(belief) - 1) ** 0.5)
        return figures.belief_map(self.pictures[row], belief, kept, side)

    def recall(self, k: int) -> float | None:
        """Return mR at the cut k, or None where no function for it was given."""
        if self._recall_at is None:
            return None
        if k not in self._known:
            self._known[k] = self._recall_at(k)
        return self._known[k]

    def _show(self) -> None:
        buffer = io.BytesIO()
        self.draw(self.picture.value, self.cut.value).savefig(buffer, format="png", dpi=80)
        self.image.value = buffer.getvalue()
        found = self.recall(self.cut.value)
        self.said.value = "" if found is None else f"test mR at this k: {found:.1f}"
