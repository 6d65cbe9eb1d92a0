"""The weights with the smallest |W|·‖X‖ of every row go (Sun et al. 2023)."""

from alphaprune import scores
from alphaprune.pruners import Pruner

PRUNER = Pruner("wanda", True, "row", scores.wanda)
