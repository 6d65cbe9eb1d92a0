"""Text → tokens: whole files for evaluation, sampled windows for calibration."""

import hashlib
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaprune.families import text_config
from alphaprune.files import first_line
from alphaprune.model import read_config


@dataclass(frozen=True)
class Text:
    """A text as a model sees it.

    tokens: [n] int64.   ends: [n] int64, bytes of the UTF-8 text that tokens up to and including this one cover.
    """

    name: str
    sha256: str
    bytes: int
    tokens: Tensor
    ends: Tensor


def read_text(file: "str | os.PathLike", wikitext: bool = False) -> str:
    """A text file as it is; with `wikitext`, WikiText raw rows joined as Wanda's evaluation joins them.

    There a blank row counts as empty, other rows keep their line end, and rows are joined by two line ends. Only \\n,
    \\r and \\r\\n end a row, and count as \\n; in a text as it is they are left alone.
    """
    try:
        with Path(file).open(encoding="utf-8", newline=None if wikitext else "") as handle:
            text = handle.read()
    except FileNotFoundError as error:
        raise ValueError(f"{file}: there is no such text file") from error
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    if wikitext:
        rows = io.StringIO(text)  # not str.splitlines, which splits at form feeds, U+2028 and others, too
        return "\n\n".join(row if row.strip() else "" for row in rows)
    return text


def load_tokenizer(folder: "str | os.PathLike") -> Any:
    """The tokenizer of a model folder; ValueError if it has none."""
    from transformers import AutoTokenizer

    if not (Path(folder) / "tokenizer.json").is_file() and not any(Path(folder).glob("tokenizer*")):
        raise ValueError(f"{folder}: no tokenizer in it; put the tokenizer files of the model beside its weights")
    if (Path(folder) / "config.json").is_file():
        read_config(Path(folder))  # the tokenizer depends on it: what is wrong with it is said in one sentence
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # it has no types of its own for files that are damaged
        reason = first_line(error)
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {reason}; copy its files again") from error


def check_tokens(tokens: Iterable[int], config: Any, name: str) -> None:
    """ValueError naming the first token that a model of this config has no embedding of.

    A tokenizer has such tokens after some were added to it without resizing the model; a text without them is fine.
    """
    count = text_config(config).vocab_size
    if (wrong := next((token for token in tokens if token >= count), None)) is not None:
        raise ValueError(
            f"{name}: has token {wrong}, and the model has embeddings for 0 to {count - 1}; "
            f"take the tokenizer that the model was made with, or give the model embeddings for all of its tokens"
        )


def encode(tokenizer: Any, text: str, name: str = "text", config: Any = None) -> Text:
    """The whole text in one go, with the tokenizer's own special tokens, as the published protocols do it.

    config: of the model that is to read it; its tokens are then checked.
    """
    found = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    if config is not None:
        check_tokens(found["input_ids"], config, name)
    tokens = torch.tensor(found["input_ids"], dtype=torch.int64)
    if tokenizer.is_fast:
        # Characters to bytes, and a running maximum: several tokens may share the bytes of one character.
        width = torch.tensor([len(c.encode()) for c in text] or [0]).cumsum(0)
        stops = torch.tensor([stop for _, stop in found["offset_mapping"]], dtype=torch.int64)
        ends = torch.where(stops > 0, width[(stops - 1).clamp(min=0)], 0).cummax(0).values
    else:
        ends = torch.full_like(tokens, -1)
    data = text.encode()
    return Text(name, hashlib.sha256(data).hexdigest(), len(data), tokens, ends)


def sample_windows(text: Text, samples: int, length: int, seed: int) -> Tensor:
    """`samples` random windows of `length` tokens, [samples, length] int64, determined by `seed`.

    Raises ValueError if the text is shorter than one window.
    """
    count = text.tokens.numel()
    if samples < 1 or length < 1:
        raise ValueError(f"calibration: wanted at least one sample of one token, got {samples} × {length}")
    if count < length:
        raise ValueError(
            f"{text.name}: {count} tokens, shorter than one window of {length}; give more text or a smaller --length"
        )
    starts = torch.randint(0, count - length + 1, (samples,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text.tokens[s : s + length] for s in starts.tolist()])
