"""What several commands check and print."""

import json
import math
import os
from pathlib import Path
from typing import Any

from alphaprune import __version__
from alphaprune import model as models
from alphaprune.console import COMMAND
from alphaprune.families import text_config
from alphaprune.files import NO_FILE
from alphaprune.unfinished import RECIPE

LONGEST = 2048  # tokens per window, unless the model's context is shorter


def window(length: int | None, config: Any) -> int:
    context = getattr(text_config(config), "max_position_embeddings", LONGEST)
    if length is None:
        return min(LONGEST, context)
    if not 2 <= length <= context:
        raise ValueError(f"--length {length}: this model takes windows of 2 to {context} tokens")
    return length


def check_file(output: str) -> None:
    folder = Path(output).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{output}: there is no folder {folder} to write it to")
    if Path(output).is_dir():
        raise ValueError(f"{output}: is a folder; name a file")
    if Path(output).exists() and not Path(output).is_file():
        raise ValueError(f"{output}: {NO_FILE}")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{output}: the folder {folder} is not writable")


def calibration_windows(
    source: models.Source, file: str, samples: int, length: int, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Calibration windows, and what identifies them."""
    from alphaprune import data

    folder = getattr(source, "folder", source.name)
    text = data.encode(data.load_tokenizer(folder), data.read_text(file), file, models.read_config(Path(folder)))
    identity = {"calibration": text.sha256, "samples": samples, "length": length, "seed": seed}
    return data.sample_windows(text, samples, length, seed), identity


def room_for(memory: float | None, spill: str | None, output: str) -> Any:
    """Where hidden states may lie: `memory` GB of them in memory, the others in a file in the folder `spill`."""
    from alphaprune.states import Room

    if memory is not None and not 0 <= memory < math.inf:
        raise ValueError(f"--memory {memory}: wanted GB, 0 or more")
    folder = Path(output).absolute().parent if spill is None else Path(spill)
    if spill is None and not folder.is_dir():
        folder = None  # it is made later
    return Room(None if memory is None else int(memory * 1e9), folder)


def check_values(
    values: str | None,
    group: int | None,
    format: str | None,  # noqa: A002
    head: str | None = None,
) -> None:
    if group is not None and values is None and head is None:
        raise ValueError(f"--group {group} belongs to --values int8 or --head int8")
    for option, given in (("--values", values), ("--head", head)):
        if given is not None and format == "dense":
            raise ValueError(f"{option} {given} is a way to pack weights: leave out --format dense")


def written_as_dict(written: Any) -> dict[str, Any]:
    """A `checkpoint.Written` for JSON."""
    found = {**vars(written), "folder": str(written.folder)}
    errors = {name: error._asdict() for name, error in found.pop("errors").items()}
    return found | ({"quantization_error": errors} if errors else {})


def rounding_loss(errors: dict[str, Any], what: str = "int8 values") -> str:
    """One line about what rounding weights lost; per layer it stands in alphaprune.json."""
    relative = {name: error.relative for name, error in errors.items()}
    worst = max(relative, key=relative.__getitem__)
    return (
        f"{what}: relative error {sum(relative.values()) / len(relative):.2%} on average over {len(relative)} "
        f"layers, at most {relative[worst]:.2%} ({worst})"
    )


def origin(kind: str, model: "str | Path | None" = None) -> dict[str, Any]:
    """What printed JSON says of itself: its kind, the command line, the release, and of which model it is.

    fingerprint: that of the dense model which a folder was pruned from; None where nothing tells.
    """
    made = {"kind": kind, "command": COMMAND.get(), "alphaprune": __version__}
    return made | ({"model": str(model), "fingerprint": _fingerprint(Path(model))} if model else {})


def _fingerprint(folder: Path) -> str | None:
    recipe = folder / RECIPE
    try:
        if recipe.is_file():
            return json.loads(recipe.read_text(encoding="utf-8")).get("model")
        return models.open_source(folder).description().fingerprint
    except (ValueError, AttributeError):
        return None


def is_compression(file: str) -> bool:
    """Whether a JSON file says that it is a plan of `alphaprune compress`."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # whoever reads it as what it should be says what is wrong
    return isinstance(found, dict) and found.get("kind") == "compression"


def dump(found: Any) -> str:
    return json.dumps(found, indent=2)
