"""Every figure: functions of data that return a `matplotlib.figure.Figure` and neither read nor show anything.

A trace is a list of path probabilities p (blocks, nodes): entry 0 before the search, entry k after k epochs.
"""

from densenas.figures.networks import (
    architectures,
    block_counts_and_widths,
    cost_table,
    operation_probabilities,
    path_probabilities,
    restyled,
    search_space,
    shapes,
)
from densenas.figures.results import (
    accuracy_against_cost,
    class_counts,
    confusion,
    evidence,
    image_grid,
    image_sizes,
    one_shot_ranking,
    predicted_latency,
    published_accuracy,
    search_health,
    search_history,
    training_history,
)
