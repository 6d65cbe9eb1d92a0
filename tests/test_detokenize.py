"""Text as it comes: whole characters, and stop strings wherever the tokens are cut."""

import pytest
from conftest import shared, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from alphaprune import data
from alphaprune.demo.run import MODEL
from alphaprune.detokenize import Detokenizer

ALPHABET = bytes_to_unicode()  # the character that stands for a byte in the vocabulary


class Characters:
    """A tokenizer with a token per character, and token 0, which is special."""

    def decode(self, tokens: list[int], **_) -> str:
        return "".join(map(chr, filter(None, tokens)))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder)  # a token per byte
    found = [data.load_tokenizer(folder), data.load_tokenizer(MODEL)]
    return found


def pieces_of(tokenizer, tokens: list[int], stops=()) -> tuple[list[str], bool]:
    text = Detokenizer(tokenizer, stops)
    found = []
    for token in tokens:
        found.append(text.put(token))
        if text.stopped:
            break
    return [*found, text.end()], text.stopped


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=30))
def test_pieces_are_whole_characters(tokenizers, text: str) -> None:
    for tokenizer in tokenizers:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        pieces, _ = pieces_of(tokenizer, tokens)
        assert "".join(pieces) == text == tokenizer.decode(tokens)
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_the_bytes_of_a_character_come_together(tokenizers) -> None:
    tokens = tokenizers[0]("a→é").input_ids
    assert pieces_of(tokenizers[0], tokens)[0] == ["a", "", "", "→", "", "é", ""]
    assert pieces_of(tokenizers[0], tokens[:3])[0] == ["a", "", "", "\ufffd"]  # it ended inside a character
    broken = [tokens[1], tokens[0]]  # bytes that are no character
    assert pieces_of(tokenizers[0], broken)[0] == ["", "\ufffda", ""]


@settings(deadline=None, max_examples=200)
@given(data=st.lists(st.sampled_from([0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE2, 0x86, 0x92, 0xF0, 0x9F, 0xFF]), max_size=16))
def test_broken_bytes_are_shown_as_the_tokenizer_shows_them(tokenizers, data: list[int]) -> None:
    tokens = [tokenizers[0].convert_tokens_to_ids(ALPHABET[byte]) for byte in data]
    assert "".join(pieces_of(tokenizers[0], tokens)[0]) == tokenizers[0].decode(tokens)


def test_nobody_waits_for_broken_bytes_to_become_a_character(tokenizers) -> None:
    byte = tokenizers[0]("é").input_ids[1]
    text = Detokenizer(tokenizers[0])
    pieces = [text.put(byte) for _ in range(200)]
    assert not any(pieces[:3]) and len("".join(pieces)) >= 197 and len("".join([*pieces, text.end()])) == 200
    assert len(text._tokens) - text._first < 40  # what a token costs does not grow


def test_a_sentencepiece_tokenizer_keeps_its_spaces() -> None:
    tokenizer = data.load_tokenizer(shared("models/stories260K_hf"))
    for text in ("Once upon a time, there was Zoë.", "a  b\n\n c 🙂 d"):
        tokens = tokenizer(text).input_ids
        pieces, _ = pieces_of(tokenizer, tokens)
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
        assert not any("\ufffd" in piece for piece in pieces) and sum(map(bool, pieces)) > 5


def test_special_tokens_leave_no_text(tokenizers) -> None:
    tokens = tokenizers[0]("ab").input_ids
    assert pieces_of(tokenizers[0], [256, tokens[0], 256, tokens[1], 256])[0] == ["", "a", "", "b", "", ""]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", [" two"], "one"),
        ("one two three", ["four"], None),
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("xabc", ["abc", "b"], "xa"),  # the one that is complete first
        ("xabc", ["bc", "abc"], "x"),  # complete at once: the longer
        ("end", ["end"], ""),
        ("en", ["end"], None),
        ("naïve → x", ["→"], "naïve "),
    ],
)
@pytest.mark.parametrize("cut", [1, 2, 3, 100])
def test_stop_strings(text: str, stops: list[str], expected: str | None, cut: int) -> None:
    """As characters one by one, as tokens of several, and as one: the text does not depend on how it is cut."""

    class Parts:
        parts = [text[i : i + cut] for i in range(0, len(text), cut)]  # noqa: RUF012

        def decode(self, tokens: list[int], **_) -> str:
            return "".join(self.parts[token] for token in tokens)

    pieces, stopped = pieces_of(Parts(), list(range(len(Parts.parts))), stops)
    assert ("".join(pieces), stopped) == (text if expected is None else expected, expected is not None)


@settings(deadline=None, max_examples=300)
@given(text=st.text("abc", max_size=12), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_is_given_out(text: str, stops: list[str]) -> None:
    ends = [next((end for end in range(len(text) + 1) if text[:end].endswith(stop)), None) for stop in stops]
    found = [(end, end - len(stop)) for end, stop in zip(ends, stops, strict=True) if end is not None]
    expected = text[: min(found)[1]] if found else text
    pieces, stopped = pieces_of(Characters(), [ord(c) for c in text], stops)
    assert "".join(pieces) == expected and stopped == bool(found)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    assert pieces_of(Characters(), [ord(c) for c in "abxaab"], ["abc"])[0] == ["", "", "abx", "", "a", "", "ab"]


def test_nothing_comes_after_a_stop_string() -> None:
    text = Detokenizer(Characters(), ["b"])
    assert [text.put(ord(c)) for c in "abc"] == ["a", "", ""] and text.end() == ""
