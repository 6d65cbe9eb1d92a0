"""Perplexity against transformers' own loss; bytes and tokens are counted exactly."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_model, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaprune import calibrate, data, evaluate, hf
from alphaprune.model import open_source


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


def as_the_dataset_reads(file: Path) -> list[str]:
    """Rows as the loader of WikiText makes them: lines of a file in text mode, blank ones emptied."""
    with file.open(encoding="utf-8") as lines:
        return [line if line.strip() else "" for line in lines]


def test_only_line_ends_end_rows(tmp_path: Path) -> None:
    """str.splitlines also splits at form feeds, separators and U+2028, which the rows of the dataset may hold."""
    file = tmp_path / "wiki.raw"
    inside = "".join(f" a{c}b" for c in "\v\f\x1c\x1d\x1e\x85\u2028\u2029")
    file.write_bytes(f" = T =\n{inside}\n \u2028 \n\r\n one\r\n two\rthree\n last".encode())
    rows = [" = T =\n", f"{inside}\n", "", "", " one\n", " two\n", "three\n", " last"]
    assert as_the_dataset_reads(file) == rows
    assert data.read_text(file, wikitext=True) == "\n\n".join(rows)
    assert data.read_text(file).encode() == file.read_bytes()  # as it is, line ends of any machine included


def test_wikitext_itself_has_the_published_rows() -> None:
    file = shared("data/wikitext2") / "test.txt"
    rows = as_the_dataset_reads(file)
    assert len(rows) == 4358 and rows.count("") == 4358 - 2891  # as many as the test split of the dataset has
    assert data.read_text(file, wikitext=True) == "\n\n".join(rows)


@pytest.mark.parametrize("tail", [0, 1, 31])
def test_perplexity_equals_the_published_loop(directory: Path, tail: int) -> None:
    """Sums of loss · length over windows, divided by windows · length, as Wanda's evaluation weights them."""
    model, length = make_model(1), 32
    tokens = torch.randint(0, 257, (5 * length + tail,), generator=torch.Generator().manual_seed(tail))
    nlls, samples = [], tokens.numel() // length
    for i in range(samples):
        inputs = tokens[None, i * length : (i + 1) * length]
        with torch.no_grad():
            logits = model(inputs).logits
        loss = torch.nn.CrossEntropyLoss()(logits[:, :-1].reshape(-1, 257), inputs[:, 1:].reshape(-1))
        nlls.append(loss.float() * length)
    published = torch.exp(torch.stack(nlls).sum() / (samples * length)).item()
    text = data.Text("drawn", "0" * 64, tokens.numel(), tokens, torch.arange(1, tokens.numel() + 1))
    found = evaluate.evaluate(model, text, length)
    assert found.perplexity == pytest.approx(published, rel=1e-5) and found.windows == samples == 5
    assert found.tokens == 5 * (length - 1) and found.seed is None


def test_one_window_has_no_error_and_its_json_no_nan(directory: Path, text_file: Path) -> None:
    text = data.encode(data.load_tokenizer(directory), data.read_text(text_file), "text")
    found = evaluate.evaluate(make_model(1), text, 32, windows=1).as_dict()
    assert found["stderr"] is None and found["seed"] is None
    json.dumps(found, allow_nan=False)


def test_a_wikitext_without_blank_rows_is_noticed(run, directory: Path) -> None:
    for rows, noticed in ((" = T =\n a b c\n", True), (" = T =\n \n a b c\n", False)):
        Path("wiki.raw").write_text(rows * 20)
        status, out, err = run("eval", directory, "--wikitext", "wiki.raw", "--length", 16, "--windows", 1)
        assert status == 0 and out.startswith("perplexity ") and ("no blank row" in err) is noticed


def test_a_text_without_a_name(run, directory: Path) -> None:
    for option in ("--text", "--wikitext"):
        status, _, err = run("eval", directory, option, "")
        assert status == 2 and len(err.splitlines()) == 1 and "cannot be read as UTF-8 text" in err


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


def direct(dense, pruned, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of windows and KL(dense ‖ pruned) from all logits at once, in float64."""
    with torch.no_grad():
        p, q = (m(input_ids=tokens).logits[:, :-1].double().log_softmax(-1) for m in (dense, pruned))
    losses = -q.gather(-1, tokens[:, 1:, None])[..., 0]
    divergences = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    return losses.mean(1), divergences.mean(1)


@pytest.mark.parametrize(("windows", "length"), [(1, 2), (5, 33), (7, 64)])
def test_losses_and_divergences_equal_the_definition(windows: int, length: int, monkeypatch) -> None:
    """However windows and tokens are cut into parts."""
    monkeypatch.setattr(calibrate, "TOKENS_AT_ONCE", 100)
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 13)
    dense, pruned = make_model(1), make_model(1)
    with torch.no_grad():
        for parameter in pruned.model.layers.parameters():
            parameter.mul_(torch.rand_like(parameter) > 0.3)
    tokens = torch.randint(0, 257, (windows, length), generator=torch.Generator().manual_seed(windows))
    ticks = []
    reference = evaluate.reference(open_source(dense), tokens, ticks.append)
    found = evaluate.against(open_source(pruned), reference, progress=ticks.append)
    losses, divergences = direct(dense, pruned, tokens)
    assert len(ticks) == 2 * windows
    assert found.losses.dtype == found.divergences.dtype == reference.losses.dtype == torch.float64
    torch.testing.assert_close(found.losses, losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.divergences, divergences, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reference.losses, direct(dense, dense, tokens)[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(evaluate.window_losses(pruned, tokens), losses, rtol=1e-5, atol=0)
    assert divergences.min() > 0.01  # there was something to find


def test_the_dense_model_does_not_differ_from_itself() -> None:
    model = make_model(1)
    tokens = torch.randint(0, 257, (3, 40), generator=torch.Generator().manual_seed(0))
    source = open_source(model)
    reference = evaluate.reference(source, tokens)
    found = evaluate.against(source, reference)
    assert torch.equal(found.losses, reference.losses) and found.divergences.abs().max() < 1e-12


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=40))
def test_standard_errors(values: list[float]) -> None:
    mean, error = evaluate.mean_and_error(torch.tensor(values, dtype=torch.float64))
    center = math.fsum(values) / len(values)
    variance = math.fsum((v - center) ** 2 for v in values) / (len(values) - 1)
    assert mean == pytest.approx(center, abs=1e-9) and error == pytest.approx(
        math.sqrt(variance / len(values)), abs=1e-9
    )
    assert math.isnan(evaluate.mean_and_error(torch.tensor([1.0]))[1])


@settings(max_examples=30)
@given(st.integers(2, 50), st.integers(2, 400), st.none() | st.integers(1, 9))
def test_windows_cut_a_text_from_its_start(length: int, count: int, limit: int | None) -> None:
    ends = torch.arange(1, count + 1) * 3
    text = data.Text("text", "", int(ends[-1]), torch.arange(count), ends)
    if count < length:
        with pytest.raises(ValueError, match="shorter than one window"):
            evaluate.windows_of(text, length, limit)
        return
    found = evaluate.windows_of(text, length, limit)
    assert len(found) == min(count // length, limit or count)
    assert found.flatten().tolist() == list(range(found.numel()))
    assert evaluate.scored_bytes(text, length, len(found)) == 3 * (length - 1) * len(found)
