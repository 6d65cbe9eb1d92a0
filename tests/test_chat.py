"""Conversations: what is remembered, what is dropped, and what a person in a terminal may do at any time."""

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import make_model, write_tokenizer
from guides import TEMPLATE

from alphaprune import data, generate
from alphaprune.chat import Chat
from alphaprune.decoder import Decoder
from alphaprune.textgen import TextGeneration

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 256


def make(seed: int = 0, **changes):
    """A model whose answers are as long as they may be."""
    model = make_model(seed, **{"max_position_embeddings": CONTEXT, "initializer_range": 0.05} | changes)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> TextGeneration:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TextGeneration(make(), data.load_tokenizer(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with a chat template."""
    found = tmp_path_factory.mktemp("chat") / "model"
    make().save_pretrained(found)
    write_tokenizer(found)
    (found / "chat_template.jinja").write_text(TEMPLATE)
    return found


def answers(chat: Chat, *messages: str) -> list[str]:
    return ["".join(chat.ask(message)) for message in messages]


def test_answers_are_those_to_the_whole_conversation(pipeline: TextGeneration) -> None:
    chat = Chat(pipeline, "Be short.", TEMPLATE, max_new_tokens=12)
    found, text = answers(chat, "Hello", "And then?", "So?"), "<system>Be short.</>"
    for message, answer in zip(("Hello", "And then?", "So?"), found, strict=True):
        text += f"<user>{message}</><assistant>"
        made = pipeline(text, max_new_tokens=12, do_sample=False).generations[0].text
        assert made == answer
        text += f"{answer}</>"
    assert chat.dropped == 0 and chat.decoder == "alphaprune"
    chat.reset()
    assert answers(chat, "Hello") == found[:1]


def test_a_turn_reads_only_what_is_new(pipeline: TextGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = [], Decoder.prefill
    monkeypatch.setattr(
        Decoder, "prefill", lambda self, state, tokens: read.append(tokens.numel()) or original(self, state, tokens)
    )
    chat = Chat(pipeline, None, "{% for m in messages %}{{ m.content }}{% endfor %}", max_new_tokens=1)
    monkeypatch.setattr(chat.pipeline.model.generation_config, "suppress_tokens", None)
    answers(chat, "a" * 40, "b" * 7)
    assert read[0] == 40 and read[1] <= 7 + 4  # the answer itself is read once, however it is cut into tokens


def test_the_oldest_turns_are_dropped_when_the_context_is_full(pipeline: TextGeneration) -> None:
    chat, dropped = Chat(pipeline, "S" * 20, TEMPLATE, max_new_tokens=30), 0
    for count in range(6):
        before = [one for turn in chat.turns for one in turn]
        (answer,) = answers(chat, f"{count}" * 60)
        dropped += chat.dropped
        kept = [{"role": "system", "content": "S" * 20}, *before[2 * chat.dropped :]]
        assert chat.turns[-1] == [
            {"role": "user", "content": f"{count}" * 60},
            {"role": "assistant", "content": answer},
        ]
        text = "".join(f"<{one['role']}>{one['content']}</>" for one in kept)
        made = pipeline(f"{text}<user>{f'{count}' * 60}</><assistant>", max_new_tokens=30)
        assert made.generations[0].text == answer and made.prompt_tokens + 30 <= CONTEXT
    assert dropped > 2


def test_a_message_that_cannot_fit_changes_nothing(pipeline: TextGeneration) -> None:
    chat = Chat(pipeline, None, TEMPLATE, max_new_tokens=20)
    first = answers(chat, "Hello")
    with pytest.raises(ValueError, match=r"prompt tokens and 20 new ones do not fit into 256 positions"):
        chat.ask("x" * 250)
    twin = Chat(pipeline, None, TEMPLATE, max_new_tokens=20)
    assert answers(twin, "Hello") == first and answers(chat, "And?") == answers(twin, "And?")


def test_an_answer_that_was_stopped_is_what_was_said(pipeline: TextGeneration) -> None:
    chat = Chat(pipeline, None, TEMPLATE, max_new_tokens=40)
    pieces = chat.ask("Hello")
    said = "".join(piece for _, piece in zip(range(15), pieces, strict=False))
    pieces.close()
    assert said and chat.turns == [[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]]
    text = f"<user>Hello</><assistant>{said}</><user>Go on</><assistant>"
    assert answers(chat, "Go on") == [pipeline(text, max_new_tokens=40).generations[0].text]
    pieces = chat.ask("Never mind")
    next(pieces, None)
    chat.reset()
    chat.ask("Not even begun").close()
    assert chat.turns == []


def test_a_stop_inside_a_step_leaves_the_memory_usable(pipeline: TextGeneration, monkeypatch) -> None:
    chat = Chat(pipeline, None, TEMPLATE, max_new_tokens=20)
    original, count = Decoder.step, iter(range(100))

    def interrupted(self, state, tokens):
        if next(count) == 7:
            original(self, state, tokens)
            raise KeyboardInterrupt
        return original(self, state, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(chat.ask("Hello"))
    said = chat.turns[0][1]["content"]
    text = f"<user>Hello</><assistant>{said}</><user>Go on</><assistant>"
    assert answers(chat, "Go on") == [pipeline(text, max_new_tokens=20).generations[0].text]


def test_a_plain_transcript(pipeline: TextGeneration) -> None:
    chat = Chat(pipeline, "A talk.", plain=True, max_new_tokens=16)
    found = answers(chat, "Hello", "More")
    first = pipeline("A talk.\nUser: Hello\nAssistant:", max_new_tokens=16, stop="\nUser:").generations[0].text
    assert found[0] == first.lstrip()
    text = f"A talk.\nUser: Hello\nAssistant: {found[0].rstrip()}\nUser: More\nAssistant:"
    assert found[1] == pipeline(text, max_new_tokens=16, stop="\nUser:").generations[0].text.lstrip()
    assert chat._request(chat._tokens([])).stops == ("\nUser:",)


def test_sampling_by_seed(pipeline: TextGeneration) -> None:
    options = {"temperature": 1.5, "max_new_tokens": 12}
    same = [answers(Chat(pipeline, None, TEMPLATE, seed=4, **options), "a", "a") for _ in range(2)]
    assert same[0] == same[1] != answers(Chat(pipeline, None, TEMPLATE, seed=9, **options), "a", "a")


def test_the_default_length_is_a_quarter_of_the_context(pipeline: TextGeneration) -> None:
    assert Chat(pipeline, plain=True).settings["max_new_tokens"] == CONTEXT // 4


def test_what_cannot_work_is_one_sentence(pipeline: TextGeneration) -> None:
    with pytest.raises(ValueError, match="no chat template: give one with --chat-template FILE, or --plain"):
        Chat(pipeline)
    with pytest.raises(ValueError, match="do not fit into 256 positions"):
        Chat(pipeline, None, TEMPLATE, max_new_tokens=CONTEXT)
    for template in ("{% for %}", "{{ raise_exception('no system') }}", "{{ messages[7].content.x }}"):
        with pytest.raises(ValueError, match="the chat template refuses this conversation") as error:
            Chat(pipeline, "system", template)
        assert "\n" not in str(error.value)


# The command.


def talk(run, monkeypatch: pytest.MonkeyPatch, lines: str, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return run("chat", *arguments)


def test_a_pipe_of_messages(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "Hello\n\nMore\n/reset\nHello\n/exit\nnot read\n"
    status, out, err = talk(run, monkeypatch, lines, folder, "--max-new", 12)
    chat = Chat(TextGeneration(folder), max_new_tokens=12)
    first, second = answers(chat, "Hello", "More")
    assert status == 0 and out == f"{first}\n{second}\n{first}\n"
    assert err.splitlines() == [
        f"{folder}: decoder alphaprune. /reset forgets the conversation, /exit or Ctrl-D ends it.",
        "forgotten",
    ]
    assert talk(run, monkeypatch, "Hello", folder, "--max-new", 12)[:2] == (0, f"{first}\n")


def test_notices_and_another_template(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    lines = "x" * 150 + "\n" + "y" * 150 + "\n" + "z" * 300 + "\n"
    status, out, err = talk(run, monkeypatch, lines, folder, "--max-new", 4, "--chat-template", "mine.jinja")
    assert status == 0 and len(err.splitlines()) == 3 and out.count("\n") >= 2
    assert err.splitlines()[1] == "the context is full: the oldest 1 turns were dropped"
    assert "302 prompt tokens and 4 new ones do not fit into 256 positions" in err.splitlines()[2]


def test_bad_input(run, directory: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        ((directory,), "no chat template: give one with --chat-template FILE, or --plain"),
        ((directory, "--max-new", 0), "--max-new 0"),
        ((directory, "--temperature", -1), "--temperature -1"),
        ((directory, "--plain", "--chat-template", "x"), "leave out one of them"),
        ((directory, "--chat-template", "nowhere"), "--chat-template nowhere: cannot be read"),
        (("nothing",), "no such folder"),
        ((folder, "--max-new", CONTEXT), "do not fit into 256 positions"),
    ):
        status, out, err = talk(run, monkeypatch, "Hello\n", *arguments)
        assert (status, out) == (2, "") and message in err and len(err.strip().splitlines()) == 1
    assert talk(run, monkeypatch, "Hello\n", directory, "--plain", "--max-new", 4)[0] == 0


class Terminal:
    """A process in a terminal of its own, and what it has printed."""

    def __init__(self, *arguments) -> None:
        self.side, end = pty.openpty()

        def take_over() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests may ignore it
            fcntl.ioctl(end, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "alphaprune", *map(str, arguments)],
            **{"stdin": end, "stdout": end, "stderr": end, "start_new_session": True, "preexec_fn": take_over},
            env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"},
        )
        os.close(end)
        self.text = ""

    def read_until(self, done, seconds: float = 60, strict: bool = True) -> str:
        """What is printed until `done` says so of it; it must within `seconds`, if `strict`."""
        until, found = time.monotonic() + seconds, ""
        while not done(found):
            if time.monotonic() > until:
                assert not strict, found
                break
            if select.select([self.side], [], [], 0.1)[0]:
                try:
                    found += os.read(self.side, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    break
        self.text += found
        return found

    def type(self, text: str) -> None:
        os.write(self.side, text.encode())

    def interrupt(self) -> str:
        """What is printed until the next prompt. As a person would, it presses Ctrl-C again where nothing happens:
        Python's readline looks for signals before it waits for a key, so one that comes between is seen with the next.
        """
        found = ""
        for _ in range(60):
            self.type("\x03")
            found += self.read_until(lambda text: text.endswith("\n> "), seconds=1, strict=False)
            if found.endswith("\n> "):
                return found
        raise AssertionError(found)


@pytest.fixture
def terminal(tmp_path: Path):
    """A chat with a model that would go on for a minute."""
    make(max_position_embeddings=1 << 16).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    made = Terminal("chat", tmp_path, "--plain", "--max-new", 60_000)
    yield made
    if made.process.poll() is None:
        made.process.kill()
    made.process.wait()
    os.close(made.side)


def test_interrupts_in_a_terminal(terminal: Terminal) -> None:
    """Ctrl-C clears a line and stops an answer, never the program; Ctrl-D ends it."""
    terminal.read_until(lambda text: text.endswith("> "))
    terminal.type("half a line")
    terminal.read_until(lambda text: "half a line" in text)
    terminal.interrupt()
    for _ in range(2):  # the conversation goes on after an interrupt
        terminal.type("Hello\n")
        terminal.read_until(lambda text: len(text) > 300)
        assert len(terminal.interrupt()) < 50_000
    terminal.type("/reset\n")
    terminal.read_until(lambda text: "forgotten" in text and text.endswith("> "))
    terminal.type("\x04")
    terminal.read_until(lambda text: terminal.process.poll() is not None)
    assert terminal.process.wait(30) == 0 and "Traceback" not in terminal.text


def test_interrupting_transformers_leaves_no_thread(pipeline: TextGeneration) -> None:
    pipeline.model.generation_config.no_repeat_ngram_size = 9
    try:
        chat = Chat(pipeline, None, TEMPLATE, max_new_tokens=30)
        assert chat.decoder.startswith("transformers: ")
        pieces = chat.ask("Hello")
        next(pieces)
        pieces.close()
        assert generate.WORKER not in [thread.name for thread in threading.enumerate()]
        whole = answers(chat, "again")[0]
        assert whole
    finally:
        pipeline.model.generation_config.no_repeat_ngram_size = 0
    assert torch.is_grad_enabled()
