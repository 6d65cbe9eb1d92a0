"""The weights with the smallest |W|·‖X‖ of every row go (Sun et al. 2023)."""

from alphaprune import scores
from alphaprune.pruners import Pruner, by_scores

PRUNER = Pruner("wanda", "norms", "row", by_scores(lambda weight, inputs: scores.wanda(weight, inputs.norms)))
