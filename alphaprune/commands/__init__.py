"""What each command does, one file per command: `run` takes what was typed as plain arguments.

All check everything first, then load, work, write, print; ValueError in one sentence for bad input, which `cli` turns
into an exit status.
"""
