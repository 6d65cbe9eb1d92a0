"""Texts in one call: what transformers gives, in the shape that users of DeepSparse know, from any thread."""

import threading
from pathlib import Path

import pytest
import torch
from conftest import make_model, write_tokenizer

import alphaprune
from alphaprune import data
from alphaprune.decoder import Decoder
from alphaprune.generate import WORKER, Memory, continuation, greedy, new_tokens
from alphaprune.textgen import TextGeneration

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "some words"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return data.load_tokenizer(folder)


def free(**changes):
    """A model whose texts have no end."""
    model = make_model(**changes)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def pipeline(tokenizer) -> TextGeneration:
    return TextGeneration(free(initializer_range=0.05), tokenizer)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = {"vocab_size": 257, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**settings, initializer_range=0.5)).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(params=["ours", "theirs"])
def either(request, tokenizer) -> TextGeneration:
    """One model that our decoder runs, and one that only transformers does."""
    return TextGeneration(free(initializer_range=0.05) if request.param == "ours" else gpt2(), tokenizer)


def theirs(pipeline: TextGeneration, count: int, seed: int = 0, prompt: str = PROMPT, **settings) -> list[str]:
    """The texts of transformers' own generate."""
    tokens = pipeline.tokenizer(prompt, return_tensors="pt").input_ids
    torch.manual_seed(seed)
    options = {"max_new_tokens": count, "pad_token_id": 256, "do_sample": False} | settings
    made = pipeline.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return pipeline.tokenizer.batch_decode(made[:, tokens.shape[1] :], skip_special_tokens=True)


def test_one_prompt_and_several(either: TextGeneration) -> None:
    made = either(PROMPT, max_new_tokens=12)
    (text,) = made.generations
    assert text.text == theirs(either, 12)[0] and made.prompts == PROMPT and made.prompt_tokens == len(PROMPT)
    assert (text.finished, text.finished_reason, text.score, len(text.tokens)) == (True, "max_new_tokens", None, 12)
    assert made.created.tzinfo and made.seconds > 0
    assert made.decoder == "alphaprune" or made.decoder.startswith("transformers: model type gpt2")
    several = either([PROMPT, "a", PROMPT], max_new_tokens=12)
    assert [one.text for one in several.generations] == [text.text, theirs(either, 12, prompt="a")[0], text.text]
    assert several.prompts == [PROMPT, "a", PROMPT] and several.prompt_tokens == 2 * len(PROMPT) + 1


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "temperature": 1.5, "top_p": 0.7, "top_k": 0},
        {"do_sample": True, "min_p": 0.02, "num_return_sequences": 3},
        {"repetition_penalty": 1.5},
        {"temperature": 0.5, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_settings_mean_what_they_mean_in_transformers(either: TextGeneration, settings: dict) -> None:
    sampled = {} if settings == {"repetition_penalty": 1.5} else {"do_sample": True}
    made = either(PROMPT, max_new_tokens=10, seed=7, **settings)
    texts = [one.text for one in made.generations]
    assert texts == theirs(either, 10, seed=7, **settings | sampled) and made.seed == 7
    again = either(PROMPT, max_new_tokens=10, seed=8, **settings)
    assert ([one.text for one in again.generations] == texts) == (not sampled)
    if len(texts) > 1:
        assert len(set(texts)) == len(texts)
        nested = either([PROMPT, "x"], max_new_tokens=10, seed=7, **settings)
        assert [one.text for one in nested.generations[0]] == texts and len(nested.generations[1]) == 3


def test_a_seed_is_drawn_and_told(pipeline: TextGeneration) -> None:
    state = torch.random.get_rng_state()
    first, second = (pipeline(PROMPT, temperature=2.0, max_new_tokens=20) for _ in range(2))
    assert first.seed != second.seed and first.generations[0].text != second.generations[0].text
    again = pipeline(PROMPT, temperature=2.0, max_new_tokens=20, seed=first.seed)
    assert again.generations == first.generations
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_global_generator_is_left_alone_by_transformers_too(tokenizer) -> None:
    pipeline, state = TextGeneration(gpt2(), tokenizer), torch.random.get_rng_state()
    pipeline(PROMPT, temperature=2.0, max_new_tokens=4)
    assert torch.equal(state, torch.random.get_rng_state())


def test_streams_give_the_same_in_pieces(either: TextGeneration) -> None:
    whole = either(PROMPT, max_new_tokens=30, temperature=1.5, seed=3).generations[0]
    outputs = list(either(PROMPT, streaming=True, max_new_tokens=30, temperature=1.5, seed=3))
    pieces = [output.generations[0] for output in outputs]
    assert "".join(piece.text for piece in pieces) == whole.text and len(outputs) == 30
    assert [token for piece in pieces for token in piece.tokens] == whole.tokens
    assert [piece.finished for piece in pieces] == [False] * 29 + [True]
    assert pieces[-1].finished_reason == "max_new_tokens" and outputs[0].prompts == PROMPT


def test_a_stream_of_several_prompts_and_sequences(pipeline: TextGeneration) -> None:
    settings = {"max_new_tokens": 5, "num_return_sequences": 2, "do_sample": True, "seed": 1}
    whole = pipeline(["a", "bc"], **settings)
    texts = {"a": ["", ""], "bc": ["", ""]}
    for output in pipeline(["a", "bc"], streaming=True, **settings):
        for place, piece in enumerate(output.generations):
            texts[output.prompts][place] += piece.text
    assert [*texts.values()] == [[one.text for one in texts] for texts in whole.generations]


def test_a_text_ends_where_the_generation_config_says(either: TextGeneration) -> None:
    found = either(PROMPT, max_new_tokens=20, temperature=3.0, seed=5).generations[0].tokens
    end = next(token for i, token in enumerate(found) if i > 2 and token not in found[:i])
    for ends in (end, [256, end]):
        either.model.generation_config.eos_token_id = ends
        made = either(PROMPT, max_new_tokens=20, temperature=3.0, seed=5).generations[0]
        assert made.tokens == found[: found.index(end) + 1] and made.finished_reason == "stop"
    both = either(PROMPT, max_new_tokens=20, temperature=3.0, seed=5, num_return_sequences=2).generations
    assert [one.tokens[-1] == end or len(one.tokens) == 20 for one in both] == [True, True]
    assert all(end not in one.tokens[:-1] for one in both)


def test_stop_strings(either: TextGeneration) -> None:
    options = {"max_new_tokens": 40, "temperature": 1.5, "seed": 11}
    whole = either(PROMPT, **options).generations[0].text
    stop = whole[9:12]
    for stops in (stop, [stop, "never there"], ("never there", stop)):
        made = either(PROMPT, stop=stops, **options).generations[0]
        assert made.text == whole[: whole.index(stop)] and made.finished_reason == "stop"
        assert len(made.tokens) < 40
        streamed = [output.generations[0] for output in either(PROMPT, streaming=True, stop=stops, **options)]
        assert "".join(piece.text for piece in streamed) == made.text
        assert (streamed[-1].finished, streamed[-1].finished_reason) == (True, "stop")
    assert either(PROMPT, stop="never there", **options).generations[0].text == whole


def test_a_special_token_is_a_stop_string_too(tokenizer) -> None:
    model = free(initializer_range=0.05)
    pipeline = TextGeneration(model, tokenizer)
    with torch.no_grad():  # the end of text becomes the likeliest token
        model.lm_head.weight[256] = 100 * model.lm_head.weight.abs().max() * torch.sign(model.model.norm.weight)
    assert pipeline(PROMPT, max_new_tokens=30).generations[0].finished_reason == "max_new_tokens"
    assert 256 in pipeline(PROMPT, max_new_tokens=30).generations[0].tokens
    made = pipeline(PROMPT, max_new_tokens=30, stop="<|endoftext|>").generations[0]
    assert made.finished_reason == "stop" and made.tokens[-1] == 256 and 256 not in made.tokens[:-1]


def test_callbacks_see_every_token_and_may_end_it(either: TextGeneration) -> None:
    seen = []
    whole = either(PROMPT, max_new_tokens=10, callback=seen.append).generations[0]  # None goes on
    assert seen == whole.tokens and whole.finished_reason == "max_new_tokens"
    count = iter(range(100))
    made = either(PROMPT, max_new_tokens=10, callback=lambda token: next(count) < 3).generations[0]
    assert made.tokens == whole.tokens[:4] and made.finished_reason == "callback"


def test_scores_are_the_logits(either: TextGeneration) -> None:
    options = {"max_new_tokens": 6, "temperature": 0.7, "repetition_penalty": 1.2, "num_return_sequences": 2, "seed": 0}
    made = either(PROMPT, output_scores=True, **options).generations
    for one in made:
        assert one.score.shape == (6, 257) and one.score.dtype == torch.float32
        tokens = torch.tensor([either.tokenizer(PROMPT).input_ids + one.tokens])
        with torch.no_grad():
            logits = either.model(tokens).logits[0, len(PROMPT) - 1 : -1]
        torch.testing.assert_close(one.score, logits, rtol=1e-4, atol=1e-4)
    if made and either("x", max_new_tokens=1).decoder == "alphaprune":
        streamed = list(either(PROMPT, output_scores=True, streaming=True, **options))
        assert torch.equal(torch.cat([output.generations[1].score for output in streamed]), made[1].score)


def test_configs_in_every_form(tokenizer, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    model = free(initializer_range=0.05)
    GenerationConfig(max_new_tokens=5).save_pretrained(tmp_path)
    forms = [{"max_new_tokens": 5}, GenerationConfig(max_new_tokens=5), tmp_path, tmp_path / "generation_config.json"]
    for form in [*forms, str(tmp_path)]:
        assert len(TextGeneration(model, tokenizer, form)(PROMPT).generations[0].tokens) == 5
        pipeline = TextGeneration(model, tokenizer, {"max_new_tokens": 9})
        assert len(pipeline(PROMPT, generation_config=form).generations[0].tokens) == 5
        assert len(pipeline(PROMPT, generation_config=form, max_new_tokens=3).generations[0].tokens) == 3
    assert len(pipeline(PROMPT).generations[0].tokens) == 9


def test_sampling_only_when_asked_for(tokenizer) -> None:
    model = free(initializer_range=0.05)
    greedily = TextGeneration(model, tokenizer)(PROMPT, max_new_tokens=12).generations[0].text
    model.generation_config.do_sample, model.generation_config.temperature = True, 3.0
    pipeline = TextGeneration(model, tokenizer)
    assert pipeline(PROMPT, max_new_tokens=12).generations[0].text == greedily
    assert pipeline(PROMPT, max_new_tokens=12, temperature=0).generations[0].text == greedily
    assert pipeline(PROMPT, max_new_tokens=12, do_sample=False, temperature=2.0).generations[0].text == greedily
    sampled = pipeline(PROMPT, max_new_tokens=12, do_sample=True, seed=2).generations[0].text
    assert sampled == pipeline(PROMPT, max_new_tokens=12, temperature=3.0, seed=2).generations[0].text != greedily


def test_lengths(pipeline: TextGeneration) -> None:
    made = pipeline(PROMPT, max_length=15).generations[0]
    assert len(made.tokens) == 15 - len(PROMPT) and made.finished_reason == "length"
    made = pipeline("x" * 60).generations[0]  # 100 unless said otherwise; the context has 64 positions
    assert len(made.tokens) == 4 and made.finished_reason == "capacity"
    assert len(pipeline("", max_new_tokens=2).generations[0].tokens) == 2


def test_beams_and_other_settings_of_transformers(tokenizer) -> None:
    pipeline = TextGeneration(free(initializer_range=0.05), tokenizer)
    made = pipeline(PROMPT, num_beams=3, max_new_tokens=8, num_return_sequences=2)
    assert made.decoder == "transformers: generation_config asks for num_beams"
    assert [one.text for one in made.generations] == theirs(pipeline, 8, num_beams=3, num_return_sequences=2)
    made = pipeline(PROMPT, no_repeat_ngram_size=2, max_new_tokens=8)
    assert made.generations[0].text == theirs(pipeline, 8, no_repeat_ngram_size=2)[0]
    pipeline.model.generation_config.num_beams = 2
    assert "num_beams" in pipeline(PROMPT, max_new_tokens=2).decoder
    pipeline.model.generation_config.num_beams = 1
    assert pipeline(PROMPT, max_new_tokens=2).decoder == "alphaprune"


BAD = {
    "unknown": ({"presence_penalty": 1.0}, "no setting is called presence_penalty"),
    "unknown in config": ({"generation_config": {"max_tokens": 4}}, "no setting is called max_tokens"),
    "no file": ({"generation_config": "nowhere.json"}, "nowhere.json: no generation_config"),
    "temperature": ({"temperature": -1.0}, "temperature -1.0: wanted 0 or more"),
    "nan": ({"temperature": float("nan")}, "temperature nan"),
    "sample at 0": ({"temperature": 0.0, "do_sample": True}, "leave out do_sample"),
    "top_p": ({"do_sample": True, "top_p": 0.0}, "top_p 0.0"),
    "top_p above": ({"do_sample": True, "top_p": 1.5}, "top_p 1.5"),
    "top_k": ({"do_sample": True, "top_k": -1}, "top_k -1"),
    "top_k fraction": ({"do_sample": True, "top_k": 1.5}, "top_k 1.5"),
    "penalty": ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
    "sequences": ({"num_return_sequences": 0}, "num_return_sequences 0"),
    "none": ({"max_new_tokens": 0}, "max_new_tokens 0: wanted at least one token"),
    "too many": ({"max_new_tokens": 60}, "10 prompt tokens and 60 new ones do not fit into 64 positions"),
    "length": ({"max_length": 5}, "the prompt alone has 10 tokens"),
    "empty stop": ({"stop": ["a", ""]}, "not empty"),
    "stop of numbers": ({"stop": [1]}, "wanted strings"),
    "beams in a stream": ({"num_beams": 2, "streaming": True}, "leave out streaming"),
    "beams with scores": ({"num_beams": 2, "output_scores": True}, "leave out output_scores"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_input_is_one_sentence_at_once(pipeline: TextGeneration, kind: str, streaming: bool) -> None:
    settings, message = BAD[kind]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as error:
        pipeline(PROMPT, **{"streaming": streaming} | settings)
    assert "\n" not in str(error.value)


def test_bad_prompts_and_models(pipeline: TextGeneration, tokenizer) -> None:
    for prompt in (None, [], [1], {"role": "user"}):
        with pytest.raises(ValueError, match="wanted a string or a list of strings"):
            pipeline(prompt)
    with pytest.raises(ValueError, match="64 positions"):
        pipeline("x" * 64)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        TextGeneration(pipeline.model)
    with pytest.raises(ValueError, match="no such folder"):
        TextGeneration("nowhere")
    with pytest.raises(ValueError, match="gives scores only at the end"):
        TextGeneration(gpt2(), tokenizer)(PROMPT, streaming=True, output_scores=True)


def test_an_error_in_transformers_reaches_the_caller(tokenizer) -> None:
    pipeline = TextGeneration(gpt2(), tokenizer)
    pipeline.model.transformer.h[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline(PROMPT)
    assert not pipeline._lock.locked()


def test_threads_get_what_they_would_get_alone(either: TextGeneration) -> None:
    options = [{"temperature": 1.0, "seed": seed, "max_new_tokens": 25} for seed in range(4)]
    alone = [either(PROMPT, **one).generations for one in options]
    found: dict[int, list] = {}

    def work(place: int) -> None:
        found[place] = [either(PROMPT, **options[place]).generations for _ in range(3)]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(4)] == [[one] * 3 for one in alone]


def test_streams_by_turns_and_streams_left_alone(either: TextGeneration) -> None:
    expected = [either(prompt, max_new_tokens=12).generations[0].text for prompt in ("a", "bcd")]
    left = either("left alone", streaming=True, max_new_tokens=40)
    next(left)
    streams = [either(prompt, streaming=True, max_new_tokens=12) for prompt in ("a", "bcd")]
    pairs = list(zip(*streams, strict=True))
    assert ["".join(one.generations[0].text for one in column) for column in zip(*pairs, strict=True)] == expected
    left.close()
    assert WORKER not in [thread.name for thread in threading.enumerate()]


def test_inference_mode_does_not_leak_from_a_stream(pipeline: TextGeneration) -> None:
    for _ in pipeline(PROMPT, streaming=True, max_new_tokens=3):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_memory_gives_what_reading_anew_gives() -> None:
    """Turns that go on, go back, grow past the first capacity and start over."""
    model = free(max_position_embeddings=256)
    memory, settings = Memory(), model.generation_config
    generator = torch.Generator().manual_seed(3)
    turns = torch.randint(0, 256, (120,), generator=generator).tolist()
    tokens: list[int] = []
    for length, keep in ((10, 0), (30, 22), (31, 31), (12, 5), (100, 12), (9, 9), (1, 1)):
        tokens = tokens[:keep] + turns[keep:length]
        prompt = torch.tensor([tokens])
        found = torch.cat(list(new_tokens(model, prompt, 8, settings, memory=memory)))
        assert torch.equal(found, torch.cat(list(continuation(Decoder(model), prompt, 8, greedy))))
        tokens = tokens + found.tolist()


def test_memory_reads_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory, read = free(), Memory(), []
    original = Decoder.prefill
    monkeypatch.setattr(
        Decoder, "prefill", lambda self, state, tokens: read.append(tokens.numel()) or original(self, state, tokens)
    )
    first = list(range(20))
    made = torch.cat(list(new_tokens(model, torch.tensor([first]), 4, model.generation_config, memory=memory))).tolist()
    following = [*first, *made, 7, 8, 9]
    list(new_tokens(model, torch.tensor([following]), 4, model.generation_config, memory=memory))
    assert read == [20, 4]  # the last token of the answer was never read, and three are new


def test_memory_past_a_length_where_frequencies_change() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = free(rope_parameters=rope, max_position_embeddings=24)
    memory = Memory()
    for length in (10, 30, 12, 22, 25):
        prompt, kept, anew = torch.arange(length)[None] + 3, [], []
        list(new_tokens(model, prompt, 3, model.generation_config, memory=memory, scores=kept))
        list(new_tokens(model, prompt, 3, model.generation_config, scores=anew))
        torch.testing.assert_close(torch.cat(kept), torch.cat(anew), rtol=1e-5, atol=1e-5)


def test_a_packed_folder(run, directory: Path) -> None:
    magnitude = ("--method", "magnitude")
    assert run("prune", directory, "-o", "out", "--sparsity", 0.5, "--allocator", "uniform", *magnitude)[0] == 0
    pipeline = alphaprune.TextGeneration("out")
    made = pipeline("the ", max_new_tokens=8)
    dense = TextGeneration(pipeline.model.dequantize(), pipeline.tokenizer)("the ", max_new_tokens=8)
    assert made.generations[0].tokens == dense.generations[0].tokens and made.decoder == "alphaprune"
