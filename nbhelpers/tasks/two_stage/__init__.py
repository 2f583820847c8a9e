"""Search in two stages with CFITR: candidates by Hamming distance, then reranking.

Offline, the states at which the layers are split and the packed hash codes of a gallery are written
once into an ArrayStore (`stores`). Online, a query is compared with all codes (`candidates`), the
best K items pass the remaining layers together with it (`reranking`), and their scores alone decide
the ranking of one query (`search`) or of a whole split (`ranking`).
"""

from nbhelpers.tasks.two_stage.candidates import (
    NEIGHBOURS,
    K,
    bank_means,
    candidate_pairs,
    chosen,
    coarse_scores,
    eligible,
    negative_hamming,
    post_process,
)
from nbhelpers.tasks.two_stage.ranking import (
    WAYS,
    Ranking,
    TwoStages,
    over_orders,
    rank,
    stages,
    two_stage,
    validate,
)
from nbhelpers.tasks.two_stage.reranking import PAIRS, fine_scores, pair_scores
from nbhelpers.tasks.two_stage.search import POOL, Found, Search
from nbhelpers.tasks.two_stage.stores import (
    encode,
    pack,
    split_inputs,
    store_folder,
    store_key,
    write_stores,
)
