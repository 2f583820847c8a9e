"""Block diagrams of the five systems at the sizes of their papers, and of the whole collection."""

from nbhelpers.figures.architecture.adapter import pe_rsitr
from nbhelpers.figures.architecture.captioner import bita
from nbhelpers.figures.architecture.collection import pipeline
from nbhelpers.figures.architecture.hashing import cfitr
from nbhelpers.figures.architecture.prior import pir, pir_clip
