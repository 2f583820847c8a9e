"""Choose the scene classes that a data set can teach."""

from __future__ import annotations

from nbhelpers.data.table import CaptionTable
from nbhelpers.errors import UserError

# training images; smaller classes (numeric names that stand for no class) teach no prior
SMALLEST_CLASS = 5


def scene_classes(table: CaptionTable) -> list[str]:
    """List the classes with at least SMALLEST_CLASS training images, sorted.

    UserError without two of them.
    """
    counts = table.split("train").images.scene.value_counts()
    classes = sorted(counts.index[counts >= SMALLEST_CLASS])
    if len(classes) < 2:
        number = "one scene class" if classes else "no scene class"
        raise UserError(
            f"{table.name} has {number} of {SMALLEST_CLASS} or more training images, "
            "and a scene prior needs two; write the class of each image into a column or field "
            "'class' or into its file name (airport_12.jpg), add images, or take SIZE=tiny, which "
            "needs no prior."
        )
    return classes
