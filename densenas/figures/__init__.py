"""Every figure: functions of data that return a `matplotlib.figure.Figure` and neither read nor show anything.

What only one notebook draws in a few lines of seaborn or pandas is drawn there, on a `canvas`. A trace is a list of
path probabilities p (blocks, nodes): entry 0 before the search, entry k after k epochs.
"""

from densenas.figures.evidence import accuracies, accuracy_by_epoch, rankings
from densenas.figures.networks import architectures, block_counts_and_widths, shapes
from densenas.figures.results import accuracy_against_cost, curves, search_history, training_history
from densenas.figures.space import candidates, path_probabilities, restyled, search_space
from densenas.figures.style import MANY, canvas, heat_map, legend_above, short_names
