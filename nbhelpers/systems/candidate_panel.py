"""Move K, the number of candidates that CFITR reranks: ipywidgets around a measurement.

panel = CandidatePanel(point_of, [10, 20, 40], levels, k=20, most=90)
display(panel)      # in JupyterLab, Notebook and Voilà
panel.draw(20)      # or without hands: the figure with K = 20 marked
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure

from nbhelpers import figures
from nbhelpers.errors import UserError


class CandidatePanel(ipywidgets.VBox):
    """Show the recall that K candidates give and the milliseconds that they take.

    point_of  k -> {"k", "mR", "i2t_total_ms", "t2i_total_ms", ...}, as `figures.tradeoff` draws
              it; measured once for each K that is asked
    steps     numbers of candidates that are measured before anybody asks
    levels    name -> mR in percent that has no K: the coarse stage alone, the exhaustive search
    k, most   the first K of the slider, and its end
    UserError without steps, and for a K beyond `most`.
    """

    def __init__(
        self,
        point_of: Callable[[int], dict[str, float]],
        steps: Sequence[int],
        levels: Mapping[str, float],
        k: int,
        most: int,
    ):
        if not steps or not all(1 <= one <= most for one in (*steps, k)):
            raise UserError(
                f"The numbers of candidates are {list(steps)} and {k}; give at least one step, and"
                f" each between 1 and {most}, the largest number that was read."
            )
        self._point_of, self.levels = point_of, dict(levels)
        self._known = {one: point_of(one) for one in sorted(set(steps))}
        self.k = ipywidgets.IntSlider(k, 1, most, description="K", continuous_update=False)
        self.said = ipywidgets.HTML()
        self.image = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        super().__init__([ipywidgets.HBox([self.k, self.said]), self.image])
        self.add_class("nbh-candidates")
        self.k.observe(lambda _: self._show(), "value")
        self._show()

    @property
    def points(self) -> pd.DataFrame:
        """All that was measured so far, one row for each K, the smallest first."""
        return pd.DataFrame([self._known[k] for k in sorted(self._known)])

    def point(self, k: int) -> dict[str, float]:
        """Return recalls and milliseconds with k candidates."""
        if k not in self._known:
            self._known[k] = self._point_of(k)
        return self._known[k]

    def draw(self, k: int) -> Figure:
        """Return the figure of all measured K, with this one marked."""
        self.point(k)
        return figures.tradeoff(self.points, self.levels, chosen=k)

    def sentence(self, k: int) -> str:
        """Say what K candidates give and take."""
        point = self.point(k)
        against = "".join(
            f", {point['mR'] - level:+.1f} to {name}" for name, level in self.levels.items()
        )
        return (
            f"mR {point['mR']:.1f}{against}; {point['i2t_total_ms']:.1f} ms for an image,"
            f" {point['t2i_total_ms']:.1f} ms for a text"
        )

    def _show(self) -> None:
        self.said.value = "measuring …"
        buffer = io.BytesIO()
        self.draw(self.k.value).savefig(buffer, format="png", dpi=80)
        self.image.value, self.said.value = buffer.getvalue(), self.sentence(self.k.value)
