"""The weights with the smallest relative importance go (Zhang et al. 2024, "Plug-and-Play").

Of the whole matrix, as the published code does unless told otherwise; scores are relative to their rows and columns
already.
"""

from alphaprune import scores
from alphaprune.pruners import Pruner, by_scores

PRUNER = Pruner("ria", "norms", "matrix", by_scores(lambda weight, inputs: scores.ria(weight, inputs.norms)))
