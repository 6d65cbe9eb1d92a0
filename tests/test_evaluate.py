"""Perplexity against transformers' own loss; bytes and tokens are counted exactly."""

import math
from pathlib import Path

import pytest
import torch
from conftest import make_model, shared

from alphaprune import data, evaluate, hf


def own_perplexity(model, tokens: torch.Tensor, length: int) -> float:
    """exp of the mean over windows of the loss that transformers itself computes from labels."""
    losses = []
    for start in range(0, tokens.numel() - length + 1, length):
        window = tokens[None, start : start + length]
        with torch.no_grad():
            losses.append(model(input_ids=window, labels=window).loss.double().item())
    return math.exp(sum(losses) / len(losses))


def test_perplexity_equals_transformers_own(directory: Path, text_file: Path) -> None:
    model = hf.load(directory)
    text = data.encode(data.load_tokenizer(directory), data.read_text(text_file), "text")
    found = evaluate.evaluate(model, text, length=48)
    assert found.perplexity == pytest.approx(own_perplexity(model, text.tokens, 48), rel=1e-4)
    assert found.windows == text.tokens.numel() // 48 and found.tokens == found.windows * 47
    assert found.stderr > 0 and found.dtype == "float32" and found.data_sha256 == text.sha256


def test_perplexity_on_somebody_elses_checkpoint() -> None:
    folder, story = shared("models/stories260K_hf"), shared("data/tinystories") / "test.txt"
    model = hf.load(folder)
    text = data.encode(data.load_tokenizer(folder), data.read_text(story)[:20_000], "stories")
    found = evaluate.evaluate(model, text, length=256)
    assert found.perplexity == pytest.approx(own_perplexity(model, text.tokens, 256), rel=1e-4)
    assert found.perplexity < 10  # a real model on the text it knows


def test_bits_per_byte_count_only_the_bytes_scored(directory: Path, text_file: Path) -> None:
    """With one token per byte, every window scores all bytes but its first token's."""
    model, raw = hf.load(directory), data.read_text(text_file)
    text = data.encode(data.load_tokenizer(directory), raw, "text")
    assert text.tokens.numel() == len(raw.encode()) == text.bytes == int(text.ends[-1])
    found = evaluate.evaluate(model, text, length=64)
    # a character of several bytes belongs to its first token, so windows may begin inside one
    assert abs(found.bytes - found.tokens) <= 2 * found.windows
    nats = math.log(found.perplexity) * found.tokens
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes, rel=1e-9)


def test_windows_limit_and_refusals(directory: Path, text_file: Path) -> None:
    model = hf.load(directory)
    text = data.encode(data.load_tokenizer(directory), data.read_text(text_file), "text")
    assert evaluate.evaluate(model, text, 32, windows=3).windows == 3
    short = data.encode(data.load_tokenizer(directory), "too short", "note")
    with pytest.raises(ValueError, match="note: 9 tokens, shorter than one window of 32"):
        evaluate.evaluate(model, short, 32)
    with pytest.raises(ValueError, match="64 positions"):
        evaluate.evaluate(model, text, 65)
    with pytest.raises(ValueError, match="needs two tokens"):
        evaluate.evaluate(model, text, 1)


def test_wikitext_rows_are_joined_as_published(tmp_path: Path) -> None:
    """Rows of the dataset: blank ones are empty, others keep their line end; joined by two line ends."""
    file = tmp_path / "wiki.raw"
    file.write_text(" \n = Title = \n \n Text one .\n Text two .\n")
    rows = ["", " = Title = \n", "", " Text one .\n", " Text two .\n"]
    assert data.read_text(file, wikitext=True) == "\n\n".join(rows)
    assert data.read_text(file) == file.read_text()


def test_calibration_windows_are_of_the_text_and_depend_on_the_seed(directory: Path, text_file: Path) -> None:
    text = data.encode(data.load_tokenizer(directory), data.read_text(text_file), "text")
    a, again, other = (data.sample_windows(text, 6, 40, seed) for seed in (0, 0, 1))
    assert torch.equal(a, again) and not torch.equal(a, other)
    joined = ",".join(map(str, text.tokens.tolist()))
    assert all(",".join(map(str, w.tolist())) in joined for w in a)
    exact = data.encode(data.load_tokenizer(directory), "x" * 40, "forty")
    assert data.sample_windows(exact, 2, 40, 0).shape == (2, 40)
    with pytest.raises(ValueError, match="forty: 40 tokens, shorter than one window of 41"):
        data.sample_windows(exact, 2, 41, 0)


def test_unreadable_texts(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(ValueError, match="no such text file"):
        data.read_text(tmp_path / "nothing.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        data.read_text(tmp_path / "binary")
    with pytest.raises(ValueError, match="no tokenizer"):
        data.load_tokenizer(tmp_path)


def test_logits_do_not_depend_on_how_many_windows_go_together(directory: Path, text_file: Path, monkeypatch) -> None:
    model = make_model(1)
    text = data.encode(data.load_tokenizer(directory), data.read_text(text_file), "text")
    together = evaluate.evaluate(model, text, 32, windows=5)
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", 32)
    alone = evaluate.evaluate(model, text, 32, windows=5)
    assert together.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
