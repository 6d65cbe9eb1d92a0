"""Small models and poisoned memory for all tests."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ["ALPHAPRUNE_TIMES"] = "off"  # nor depend on what a machine was tuned for


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN, so that an output that nobody wrote cannot pass for a result."""
    original = torch.empty

    def poisoned(*sizes, **keywords):
        tensor = original(*sizes, **keywords)
        if tensor.is_floating_point() and tensor.device.type == "cpu" and tensor.numel():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads on matrices as small as tests have them mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def use_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes a time table the current one, and returns its file."""
    from alphaprune.kernels import table

    def take(found: "table.Table") -> Path:
        found.save(tmp_path / "times.json")
        monkeypatch.setenv("ALPHAPRUNE_TIMES", str(tmp_path / "times.json"))
        table.forget()
        return tmp_path / "times.json"

    yield take
    table.forget()


@pytest.fixture
def native_only() -> None:
    """Skips, with the reason, where there are no native kernels."""
    from alphaprune.formats import native

    if native.load() is None:
        pytest.skip(native.status())


@pytest.fixture
def run(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command in an empty folder; returns (exit status, stdout, stderr)."""
    from alphaprune import cli

    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def shared(name: str) -> Path:
    """A folder of real data beside the checkout; the test skips, with the reason, where it is not."""
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"real data {name} is not beside this checkout")
    return folder


def make_config(**changes):
    from transformers import LlamaConfig

    settings = {
        "vocab_size": 257,
        "hidden_size": 96,  # no multiple of 64: partial tiles in every projection
        "intermediate_size": 200,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "initializer_range": 0.1,
    }
    return LlamaConfig(**{**settings, **changes})


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(make_config(**changes)).to(dtype).eval()


def write_tokenizer(folder: Path) -> None:
    """One token per byte, and an end of text: 257 in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"<|endoftext|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA of three blocks as a sharded Hugging Face directory, with a tokenizer. Do not change it."""
    folder = tmp_path_factory.mktemp("models") / "small"
    make_model(seed=1).save_pretrained(folder, max_shard_size="300KB")
    write_tokenizer(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture
def own_copy(directory: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own to be damaged, with a text beside it."""
    shutil.copytree(directory, tmp_path / "m")
    (tmp_path / "text").write_text("a heavy tail, and so on. " * 60)
    return tmp_path / "m"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some kB of words, with characters of two and three bytes."""
    words = ["the", "sparse", "wéight", "of", "a", "heävy", "tail", "→", "and", "so", "on\n"]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(words), (1500,), generator=generator).tolist()
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(" ".join(words[i] for i in picks), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of csrc/cuda, compiled for the emulator."""
    import emulated

    return emulated.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def module(objects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The emulated CUDA module of the source as it stands."""
    import emulated

    return emulated.open_module(emulated.link_library(objects, tmp_path_factory.mktemp("module")))


@pytest.fixture
def emulator(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The same, called by kernels/cuda.py with tensors of the host, on an H100."""
    import emulated

    from alphaprune.kernels import cuda

    emulated.use(module, monkeypatch)
    module.emulate_in_order(0)
    yield module
    module.emulate_device(90, 132, 232448)
    cuda.opened.cache_clear()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs hold NaN before a kernel writes them, and a forbidden page follows them."""
    import emulated

    original = torch.Tensor.new_empty

    def allocate(self: torch.Tensor, *sizes, **keywords) -> torch.Tensor:
        return emulated.guarded(original(self, *sizes, **keywords).fill_(float("nan")))

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)
