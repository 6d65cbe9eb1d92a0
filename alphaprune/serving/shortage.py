"""What both ways to batch do where memory for something else than keys and values runs out in the middle of a step."""

import logging

import torch

from alphaprune import memory
from alphaprune.files import first_line

log = logging.getLogger("alphaprune")

BATCH_TOKENS = 512  # of prompts in one step: longer ones are cut, so that running streams wait less
LEAST_TOKENS = 16  # as many at least, however little memory there is


def fewer(tokens: int, error: Exception, device: torch.device) -> int:
    """Tokens of prompts to read at a time after a step with so many ended with an error, which was want of memory.

    0 where they are few already: then a request has to go. What the step held is free. Any other error is raised.
    """
    if not memory.is_shortage(error):
        raise error
    memory.release(device, error)
    if tokens <= LEAST_TOKENS:
        return 0
    less = max(LEAST_TOKENS, tokens // 2)
    log.warning("%s; prompts are read %d tokens at a time", first_line(error), less)
    return less
