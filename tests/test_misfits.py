"""Checkpoints whose parts do not fit together: one sentence that names the part, from every command that reads it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

STRANGE = "heavy"  # a word of the text that the tokenizer below has a token of its own for


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> None:
    """One thread; matrices are small."""


@pytest.fixture
def model(own_copy: Path) -> Path:
    return own_copy


def add_token(model: Path, word: str = STRANGE) -> int:
    """Gives the tokenizer a token past the last embedding, as adding one without resizing the model does."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    file = model / "tokenizer.json"
    found = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    found["model"]["vocab"] |= {f"unused {n}": n for n in range(len(found["model"]["vocab"]), vocabulary + 3)}
    found["added_tokens"].append({"id": vocabulary + 3, "content": word, **flags})
    file.write_text(json.dumps(found))
    return vocabulary + 3


COMMANDS = {
    "prune": ("prune", "m", "-o", "out", "--sparsity", "0.5", "--samples", "2", "--calibration", "text"),
    "analyze": ("analyze", "m", "--samples", "2", "--calibration", "text"),
    "compress": ("compress", "m", "-o", "out", "--bits", "4", "--samples", "2", "--calibration", "text"),
    "eval": ("eval", "m", "--text", "text"),
    "recover": ("recover", "m", "-o", "out", "--calibration", "text", "--steps", "1", "--length", "8"),
    "compare": ("compare", "m", "-o", "out", "--calibration", "text", "--text", "text", "--sparsity", "0.5"),
    "generate": ("generate", "m", "--prompt", "a heavy tail", "--max-new", "2"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_token_that_the_model_has_no_embedding_of(run, model: Path, command: str) -> None:
    if command == "recover":
        pytest.importorskip("peft")
    token = add_token(model)
    before = sorted(p.as_posix() for p in Path().rglob("*"))
    status, out, err = run(*COMMANDS[command])
    assert status == 2 and len(err.strip().splitlines()) == 1 and not out
    assert f"has token {token}, and the model has embeddings for 0 to " in err and "tokenizer" in err
    assert sorted(p.as_posix() for p in Path().rglob("*")) == before


def test_texts_without_that_token_are_read(run, model: Path) -> None:
    add_token(model, "elsewhere")
    assert run(*COMMANDS["eval"])[0] == run(*COMMANDS["generate"])[0] == 0


def test_a_server_refuses_it_and_goes_on(model: Path) -> None:
    """Engines stop at errors: one text of one client would end the answers of all."""
    from alphaprune import data, hf

    try:
        from alphaprune.serving import kv
        from alphaprune.serving.engine import Engine
        from alphaprune.serving.request import Defaults, Refused, parse
    except (ImportError, ValueError) as error:
        pytest.skip(f"the server does not run here: {error}")

    token, tokenizer = add_token(model), data.load_tokenizer(model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    loaded = hf.load(model)
    engine = Engine(loaded, tokenizer, kv.plan(loaded.config, loaded.dtype, 2, 16, blocks=8), 2, lambda *_: None)
    text = "a heavy tail"
    for chat, body in ((False, {"prompt": text}), (True, {"messages": [{"role": "user", "content": text}]})):
        with pytest.raises(Refused, match=f"has token {token}, and the model has embeddings") as refused:
            engine.encode(parse(json.dumps(body).encode(), chat, "m", engine.vocabulary, Defaults()))
        assert refused.value.status == 400


def test_a_conversation_stays_as_it_was(model: Path) -> None:
    from alphaprune.chat import Chat
    from alphaprune.textgen import TextGeneration

    add_token(model)
    chat = Chat(TextGeneration(model), plain=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="the prompt: has token"):
        chat.ask("a heavy tail")
    assert not chat.turns and list(chat.ask("a tail"))


def spoil(model: Path) -> None:
    """Makes the last norm NaN, as a damaged file may; every output of the model then is."""
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"].fill_(torch.nan)
            save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("options", [(), ("--temperature", "1"), ("--temperature", "1", "--json")])
def test_scores_that_are_no_numbers_make_no_text(run, model: Path, options: tuple[str, ...]) -> None:
    spoil(model)
    status, out, err = run(*COMMANDS["generate"], *options)
    assert status == 2 and not out and len(err.strip().splitlines()) == 1
    assert "scores for the next token are not finite" in err


def test_transformers_own_loop_says_so_too(model: Path) -> None:
    from alphaprune.textgen import TextGeneration

    spoil(model)
    with pytest.raises(ValueError, match="scores for the next token are not finite"):
        TextGeneration(model)("a tail", max_new_tokens=2, min_new_tokens=2, temperature=1.0)


def test_a_loss_that_is_no_number_is_no_perplexity(run, model: Path) -> None:
    spoil(model)
    status, out, err = run(*COMMANDS["eval"], "--json")
    assert status == 2 and not out and len(err.strip().splitlines()) == 1
    assert "text: the loss of window 1 is nan" in err


def edit(model: Path, **changes: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


SETTINGS = {
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0; wanted 1 or more"),
    "fewer than none": ({"hidden_size": -96}, "hidden_size is -96; wanted 1 or more"),
    "no positions": ({"max_position_embeddings": 0}, "max_position_embeddings is 0; wanted 1 or more"),
    "activation": ({"hidden_act": "gellu"}, "no model is of these settings: there is no 'gellu'"),
    "family": ({"model_type": "llamma"}, "model type `llamma`"),
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("command", ["analyze", "prune", "eval", "generate"])
def test_settings_that_no_model_has_are_named(run, model: Path, kind: str, command: str) -> None:
    changes, message = SETTINGS[kind]
    edit(model, **changes)
    status, out, err = run(*COMMANDS[command])
    assert status == 2 and not out and len(err.strip().splitlines()) == 1
    assert "m: config.json cannot be used: " in err and message in err


@pytest.mark.parametrize("text", ["[1, 2]", "3", "null"])
def test_a_config_that_is_no_object(run, model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    status, _, err = run(*COMMANDS["eval"])
    assert status == 2 and f"m: config.json cannot be used: wanted one JSON object, it is {text}" in err


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_tokenizer_has_a_remedy(run, model: Path, file: str, text: str) -> None:
    (model / file).write_text(text)
    status, _, err = run(*COMMANDS["generate"])
    assert status == 2 and len(err.strip().splitlines()) == 1
    assert "m: its tokenizer cannot be loaded: " in err and "; copy its files again" in err


def test_a_packed_folder_of_another_width_says_where_to_look(run, model: Path) -> None:
    assert run("prune", "m", "-o", "p", "--sparsity", "0.5", "--method", "magnitude", "--allocator", "uniform")[0] == 0
    edit(Path("p"), hidden_size=128, head_dim=16)
    for command in (("info", "p"), ("eval", "p", "--text", "text"), ("analyze", "p")):
        status, _, err = run(*command)
        assert status == 2 and "weight_mask should be int32" in err
        assert "config.json or the file is of another model" in err


def test_settings_of_generation_that_cannot_be_read(run, model: Path) -> None:
    """transformers goes on without them, and a text that should end does not."""
    for text in ("{", "[]"):
        (model / "generation_config.json").write_text(text)
        for command in ("generate", "eval"):
            status, _, err = run(*COMMANDS[command])
            assert status == 2 and "generation_config.json: " in err and len(err.strip().splitlines()) == 1


NUMBERS = {
    "memory": (("prune", "--memory", "inf"), "--memory inf: wanted GB"),
    "no memory": (("prune", "--memory", "nan"), "--memory nan: wanted GB"),
    "seed": (("prune", "--seed", str(2**70)), f"--seed {2**70}: wanted a whole number"),
    "seed of a text": (("generate", "--temperature", "1", "--seed", str(-(2**70))), "wanted a whole number"),
    "seed of training": (("recover", "--seed", str(2**62)), "wanted a whole number"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_out_of_range(run, model: Path, kind: str) -> None:
    (command, *options), message = NUMBERS[kind]
    status, out, err = run(*COMMANDS[command], *options)
    assert status == 2 and not out and message in err and len(err.strip().splitlines()) == 1


def test_a_prompt_that_is_no_text(run, model: Path) -> None:
    """Bytes of a command line that are not UTF-8."""
    status, out, err = run("generate", "m", "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert status == 2 and not out and "prompt: is not valid UTF-8" in err and len(err.strip().splitlines()) == 1
