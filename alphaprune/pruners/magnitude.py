"""The smallest weights of a matrix go; needs no text."""

from alphaprune import scores
from alphaprune.pruners import Pruner, by_scores

PRUNER = Pruner("magnitude", "nothing", "matrix", by_scores(lambda weight, inputs: scores.magnitude(weight)))
