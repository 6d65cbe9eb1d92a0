"""What a caller asks of a model, as one checked request: settings of a GenerationConfig, stop strings, lengths."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from alphaprune import generate

DEFAULT_NEW = 100  # tokens, where neither the call nor the model says how many
KNOWN = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_")) - {"transformers_version"}
Config = GenerationConfig | dict[str, Any] | str | Path | None


@dataclass(frozen=True)
class Request:
    """What is asked of the model, checked. limit: new tokens at most, and the finished_reason if there are so many."""

    settings: GenerationConfig
    limit: int
    limit_reason: str
    stops: tuple[str, ...]
    seed: int
    callback: Callable[[int], Any] | None = None

    @property
    def sequences(self) -> int:
        return self.settings.num_return_sequences or 1

    @property
    def scores(self) -> bool:
        return bool(self.settings.output_scores)

    @property
    def beams(self) -> bool:
        return self.settings.num_beams not in (None, 1)


def request(
    base: GenerationConfig,
    tokenizer: Any,
    prompt_tokens: int,
    context: int | None,
    given: dict[str, Any],
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    callback: Callable[[int], Any] | None = None,
) -> Request:
    """The request of a prompt of so many tokens. base: the model's own settings. given: what `read` made of the call.

    ValueError in one sentence for what is out of range or does not fit into `context` positions.
    """
    settings = _settings(base, given)
    limit, reason = _limit(settings, prompt_tokens, context, given)
    stops = [stop] if isinstance(stop, str) else list(stop or settings.stop_strings or ())
    if not all(isinstance(one, str) and one for one in stops):
        raise ValueError(f"stop: wanted strings that are not empty, got {stop!r}")
    # The tokenizer leaves special tokens out of the text, where no stop string would ever be found.
    special = {one for one in stops if one in tokenizer.all_special_tokens}
    ends = generate.ends_of(settings) | set(tokenizer.convert_tokens_to_ids(sorted(special)))
    settings.eos_token_id = sorted(ends) or None
    settings.stop_strings = settings.max_length = None
    return Request(settings, limit, reason, tuple(one for one in stops if one not in special), seed, callback)


def read(config: Config) -> dict[str, Any]:
    """The settings that a GenerationConfig, a dict, or a JSON file or a folder of one names; ValueError if unknown."""
    if config is None:
        return {}
    if isinstance(config, GenerationConfig):
        return {name: value for name, value in config.to_diff_dict().items() if name in KNOWN}
    if isinstance(config, str | Path):
        file = Path(config) / "generation_config.json" if Path(config).is_dir() else Path(config)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: no generation_config can be read from it ({error})") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file}: wanted one JSON object")
        return {name: value for name, value in found.items() if name in KNOWN}
    if unknown := sorted(config.keys() - KNOWN):
        raise ValueError(
            f"no setting is called {', '.join(unknown)}; there are those of transformers' GenerationConfig"
        )
    return dict(config)


def _settings(base: GenerationConfig, given: dict[str, Any]) -> GenerationConfig:
    """The model's settings with those given in their place; it samples only if those given ask for it."""
    settings = deepcopy(base)
    temperature = given.get("temperature")
    sample = given.get("do_sample")
    settings.do_sample = bool(temperature) if sample is None else sample
    for name, value in given.items():
        if name != "do_sample":
            setattr(settings, name, value)
    bounds = {
        "temperature": (0.0, float("inf"), "0 or more"),
        "top_p": (1e-9, 1.0, "more than 0 and at most 1"),
        "min_p": (0.0, 1.0, "0 to 1"),
        "top_k": (0, float("inf"), "a whole number from 0, which keeps all"),
        "repetition_penalty": (1e-9, float("inf"), "more than 0; 1 changes nothing"),
        "num_return_sequences": (1, float("inf"), "a whole number from 1"),
        "num_beams": (1, float("inf"), "a whole number from 1"),
    }
    for name, (least, most, wanted) in bounds.items():
        value = getattr(settings, name, None)
        whole = isinstance(value, int) or not isinstance(least, int)
        if value is not None and not (isinstance(value, int | float) and whole and least <= value <= most):
            raise ValueError(f"{name} {value}: wanted {wanted}")
    if settings.do_sample and temperature == 0:
        raise ValueError("temperature 0 takes the likeliest token each time: leave out do_sample, or raise it")
    if settings.num_beams not in (None, 1) and settings.output_scores:
        raise ValueError("scores of beam search belong to no single sequence: leave out output_scores or num_beams")
    return settings


def _limit(settings: GenerationConfig, prompt: int, context: int | None, given: dict[str, Any]) -> tuple[int, str]:
    """How many tokens may follow a prompt of so many, and the finished_reason if they do."""
    room = context - prompt if context else None
    wanted, reason = given.get("max_new_tokens"), "max_new_tokens"
    if wanted is None and given.get("max_length") is not None:
        wanted, reason = given["max_length"] - prompt, "length"
        if wanted < 1:
            raise ValueError(f"max_length {given['max_length']}: the prompt alone has {prompt} tokens")
    elif wanted is None:
        wanted = settings.max_new_tokens or DEFAULT_NEW
        if room is not None and 0 < room < wanted:
            wanted, reason = room, "capacity"
    if wanted < 1:
        raise ValueError(f"max_new_tokens {wanted}: wanted at least one token")
    if room is not None and wanted > room:
        raise ValueError(
            f"{prompt} prompt tokens and {wanted} new ones do not fit into {context} positions of this model; "
            f"shorten the prompt or ask for fewer"
        )
    return wanted, reason
