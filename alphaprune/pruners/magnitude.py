"""The smallest weights of a matrix go; needs no text."""

from alphaprune import scores
from alphaprune.pruners import Pruner

PRUNER = Pruner("magnitude", False, "matrix", lambda weight, norms: scores.magnitude(weight))
