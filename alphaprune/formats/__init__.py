"""Packed formats: how a pruned weight is stored, one file each, registered by name."""

from alphaprune import registry
from alphaprune.formats.packed import PACKED_SUFFIXES, Format, Packed

MEMBERS = ("sbt",)
VERSION = 1  # of what a packed directory holds, its `format_version`

__all__ = ["MEMBERS", "PACKED_SUFFIXES", "VERSION", "Format", "Packed", "get"]


def get(name: str) -> Format:
    """The format called `name`; ValueError naming the known ones if there is none."""
    return registry.member(__name__, MEMBERS, name, "FORMAT")
