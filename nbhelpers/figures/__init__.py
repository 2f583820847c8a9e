"""Every plot of the notebooks, in one style.

Functions of arrays and tables that return a matplotlib Figure. Images are (H, W, 3) uint8.
"""

from nbhelpers.figures.architecture import (
    bita,
    cfitr,
    pe_rsitr,
    pipeline,
    pir,
    pir_clip,
)
from nbhelpers.figures.captions import score_bars, score_table
from nbhelpers.figures.data import (
    caption_length_histogram,
    captions_beside_images,
    class_counts,
    contact_sheet,
    parts_told,
)
from nbhelpers.figures.errors import (
    class_recalls,
    confusion,
    first_place_bars,
    generic_ranks,
    hub_curves,
    miss_sheet,
    paired_differences,
)
from nbhelpers.figures.ideas import with_and_without
from nbhelpers.figures.maps import (
    belief_map,
    check_bars,
    class_maps,
    hiding_curves,
    map_rows,
    mixing_maps,
    pooled_tokens,
    query_maps,
    soft_belief_maps,
    sorted_beliefs,
    weights_by_belief,
    word_weights,
)
from nbhelpers.figures.retrieval import (
    bar_with_ceiling,
    rank_histogram,
    ranking,
    recall_bars,
    recall_curve,
    retrieved,
    retrieved_texts,
    shared_space,
    similarity_matrix,
)
from nbhelpers.figures.search import code_distances, gallery_times, tradeoff, two_lists
from nbhelpers.figures.steps import (
    caption_gallery,
    code_steps,
    curves,
    two_text_lists,
    word_bars,
)
from nbhelpers.figures.style import COLOURS, DIRECTIONS, METRICS, save
from nbhelpers.figures.training import ablation_bars, loss_curves, stage_curves
from nbhelpers.figures.worked_examples import (
    broken_scores,
    caption_scored,
    parameters_against_recall,
    ranking_terms,
    tie_orders,
)
