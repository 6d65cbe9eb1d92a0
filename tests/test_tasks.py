"""Tasks of lm-eval on packed models: values against sums that plain transformers gives for the dense twin."""

import hashlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, write_tokenizer

import alphaprune
from alphaprune import data, hf, tasks

pytest.importorskip("lm_eval", reason="lm-eval is not installed; it is an extra")
CONTEXT = 64
END = 256  # the token that begins a text


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory):
    """What datasets keeps of the tests' own files goes with them."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    model = make_model(5)
    plan = alphaprune.plan(alphaprune.analyze(model, fit=None), 0.6, allocator="uniform")
    alphaprune.save(alphaprune.sparsify(model, alphaprune.prune(model, plan, method="magnitude")), folder)
    write_tokenizer(folder)
    return folder


def yaml_of(name: str, file: Path, kind: str, **more: str) -> str:
    lines = {"task": name, "dataset_path": "json", "output_type": kind, "test_split": "test", **more}
    text = "".join(f"{key}: {value}\n" for key, value in lines.items())
    return f"{text}dataset_kwargs:\n  data_files:\n    test: {file}\n"


def write_choices(folder: Path, name: str, count: int, seed: int, **more: str) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    words = ["red", "a long answer", "ö", "blue and so", "x", "→ 12"]
    docs = []
    for i in range(count):
        picks = torch.randperm(len(words), generator=generator)[:3].tolist()
        docs.append({"q": f"number {seed * i} is", "options": [words[p] for p in picks], "right": picks[0] % 3})
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    how = {"doc_to_text": '"{{q}}"', "doc_to_choice": '"{{options}}"', "doc_to_target": '"{{right}}"'}
    metrics = "metric_list:\n  - metric: acc\n  - metric: acc_norm\nmetadata:\n  version: 3.5\n"
    (folder / f"{name}.yaml").write_text(yaml_of(name, file, "multiple_choice", **how, **more) + metrics)
    return docs


def write_pages(folder: Path, name: str, lengths: tuple[int, ...]) -> list[str]:
    generator = torch.Generator().manual_seed(len(lengths))
    letters = "abc déf →ghi\n klm"
    pages = ["".join(letters[i] for i in torch.randint(len(letters), (n,), generator=generator)) for n in lengths]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    how = {"doc_to_text": '""', "doc_to_target": '"{{page}}"'}
    metrics = "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n  - metric: bits_per_byte\n"
    (folder / f"{name}.yaml").write_text(yaml_of(name, file, "loglikelihood_rolling", **how) + metrics)
    return pages


class Dense:
    """Sums of log-probabilities by plain transformers, one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = hf.load(folder, tokens=None).dequantize()
        self.tokenizer = data.load_tokenizer(folder)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def of(self, inputs: list[int], targets: list[int]) -> float:
        """log P of the targets, each after the inputs up to it; inputs end with what comes before the last."""
        with torch.no_grad():
            logs = self.model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)[-len(targets) :]
        return logs.gather(1, torch.tensor(targets)[:, None]).sum().item()

    def choice(self, context: str, continuation: str) -> float:
        before, after = self.encode(context), self.encode(continuation)
        return self.of((before + after)[:-1], after)

    def rolling(self, text: str, length: int) -> float:
        """Every token once: parts of `length`, of which the last sees as much to its left as fits."""
        every = [END, *self.encode(text)]
        total = 0.0
        for start in range(0, len(every) - 1, length):
            end = min(start + length, len(every) - 1)
            total += self.of(every[max(0, end - length) : end], every[start + 1 : end + 1])
        return total


def evaluate(packed: Path, names: list[str], folder: Path, length: int = CONTEXT, shots: int | None = None, **options):
    model, tokenizer = hf.load(packed), data.load_tokenizer(packed)
    return tasks.evaluate(model, tokenizer, tasks.load(names, folder, shots), length, **options)


@pytest.mark.parametrize("batch", [1, 4])
def test_multiple_choice_equals_sums_of_the_dense_twin(packed: Path, tmp_path: Path, batch: int) -> None:
    docs = write_choices(tmp_path, "own_choice", 23, seed=batch)
    found = evaluate(packed, ["own_choice"], tmp_path, batch=batch)
    dense, right, normal, scored = Dense(packed), [], [], 0
    for doc in docs:
        sums = [dense.choice(doc["q"], f" {option}") for option in doc["options"]]
        right.append(float(max(range(3), key=sums.__getitem__) == doc["right"]))
        each = [total / len(option) for total, option in zip(sums, doc["options"], strict=True)]
        normal.append(float(max(range(3), key=each.__getitem__) == doc["right"]))
        scored += sum(len(dense.encode(f" {option}")) for option in doc["options"])
    result = found.tasks["own_choice"]
    assert 0 < sum(right) < len(docs) and right != normal
    for metric, values in (("acc", right), ("acc_norm", normal)):
        mean = sum(values) / len(values)
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        assert result.metrics[metric]["value"] == pytest.approx(mean)
        assert result.metrics[metric]["stderr"] == pytest.approx(error)
        assert result.metrics[metric]["higher_is_better"] is True
    assert (result.version, result.shots, result.samples, result.available) == (3.5, 0, 23, 23)
    assert (found.tokens, found.length, found.batch, found.dtype) == (scored, CONTEXT, batch, "float32")
    assert found.seed == tasks.SEED and found.lm_eval and found.seconds > 0


@pytest.mark.parametrize("length", [17, CONTEXT])
def test_rolling_equals_sums_of_the_dense_twin(packed: Path, tmp_path: Path, length: int) -> None:
    """Pages shorter than, as long as and longer than the length."""
    pages = write_pages(tmp_path, "own_pages", (5, length - 4, 2 * length, 150))
    found = evaluate(packed, ["own_pages"], tmp_path, length)
    dense = Dense(packed)
    total = sum(dense.rolling(page, length) for page in pages)
    size, words = sum(len(p.encode()) for p in pages), sum(len(re.split(r"\s+", p)) for p in pages)
    metrics = found.tasks["own_pages"].metrics
    assert metrics["bits_per_byte"]["value"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert metrics["byte_perplexity"]["value"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert math.log(metrics["word_perplexity"]["value"]) == pytest.approx(-total / words, rel=1e-5)
    assert metrics["bits_per_byte"]["stderr"] is None and metrics["bits_per_byte"]["higher_is_better"] is False
    assert found.tokens == sum(len(dense.encode(page)) for page in pages)


def test_data_are_named_by_what_was_scored(packed: Path, tmp_path: Path) -> None:
    docs = write_choices(tmp_path, "own_choice", 9, seed=1)
    all_of_it = evaluate(packed, ["own_choice"], tmp_path).tasks["own_choice"]
    some = evaluate(packed, ["own_choice"], tmp_path, limit=4).tasks["own_choice"]
    assert (some.samples, some.available) == (4, 9)

    def sha(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    def named(docs: list[dict]) -> str:
        parts = ((json.dumps(d, indent=2, ensure_ascii=False), d["q"], str(d["right"])) for d in docs)
        return sha("".join(sha(part) for doc in parts for part in doc))

    assert (all_of_it.data_sha256, some.data_sha256) == (named(docs), named(docs[:4]))


def test_shots_and_several_tasks(packed: Path, tmp_path: Path) -> None:
    write_choices(tmp_path, "one", 5, seed=1, fewshot_split="test")
    write_choices(tmp_path, "two", 5, seed=2, num_fewshot="0")
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list:\n  - metric: acc\nmetadata:\n  version: 1.0\n"
    )
    found = evaluate(packed, ["both"], tmp_path, shots=1)
    assert {name: result.shots for name, result in found.tasks.items()} == {"one": 1, "two": 0}
    values = [result.metrics["acc"]["value"] for result in found.tasks.values()]
    assert found.groups["both"]["acc"]["value"] == pytest.approx(sum(values) / 2)
    again = evaluate(packed, ["both"], tmp_path, shots=1)
    assert again.tasks == found.tasks  # whatever is drawn is drawn by the seed


def test_the_command(run, packed: Path, tmp_path: Path) -> None:
    write_choices(tmp_path, "own_choice", 6, seed=1)
    write_pages(tmp_path, "own_pages", (20, 30))
    asked = ("eval", packed, "--tasks", "own_choice,own_pages", "--task-dir", tmp_path)
    status, out, err = run(*asked, "--limit", 5, "--batch", 2, "--json")
    found = json.loads(out)
    assert status == 0 and err == ""
    assert found["tasks"].keys() == {"own_choice", "own_pages"} and found["limit"] == 5 and found["batch"] == 2
    identity = {"model", "tokens", "length", "dtype", "seed", "seconds", "lm_eval"}
    assert identity <= found.keys() and found["tasks"]["own_choice"]["samples"] == 5
    status, out, _ = run(*asked, "--limit", 5)
    value = found["tasks"]["own_choice"]["metrics"]["acc"]["value"]
    assert status == 0 and "5 of 6" in out and f"{value:.4f}" in out and "bits_per_byte" in out


BAD = {
    "unknown": (("own", "--task-dir", "."), "task own: in .: own_choice, torn; lm-eval has none of this name"),
    "no folder": (("own_choice", "--task-dir", "nowhere"), "no such folder of tasks"),
    "no name": ((",", "--task-dir", "."), "wanted names with commas"),
    "limit": (("own_choice", "--task-dir", ".", "--limit", "0"), "limit 0"),
    "batch": (("own_choice", "--task-dir", ".", "--batch", "0"), "batch 0"),
    "shots": (("own_choice", "--task-dir", ".", "--shots", "-1"), "shots -1"),
    "length": (("own_choice", "--task-dir", ".", "--length", "65"), "--length 65"),
    "windows": (("own_choice", "--task-dir", ".", "--windows", "3"), "--windows belongs to --text"),
    "no data": (("torn", "--task-dir", "."), "task torn: cannot be loaded"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line(run, packed: Path, tmp_path: Path, kind: str) -> None:
    write_choices(tmp_path, "own_choice", 3, seed=1)
    how = {"doc_to_text": '"{{q}}"', "doc_to_target": '"{{q}}"'}
    (tmp_path / "torn.yaml").write_text(yaml_of("torn", tmp_path / "nothing.jsonl", "multiple_choice", **how))
    arguments, message = BAD[kind]
    status, out, err = run("eval", packed, "--tasks", *arguments)
    assert status == 2 and out == "" and len(err.strip().splitlines()) == 1 and message in err, err


def write_scored(folder: Path, name: str, body: str) -> None:
    """A task whose answers are scored by a function of its own."""
    write_choices(folder, name, 3, seed=1, process_results=f"!function {name}_score.of")
    (folder / f"{name}_score.py").write_text(f"import numpy\n\ndef of(doc, results):\n    {body}\n")


def test_functions_of_tasks(run, packed: Path, tmp_path: Path) -> None:
    """They may raise anything, after minutes; and numbers of numpy are numbers."""
    write_scored(tmp_path, "divides", "return {'acc': 1 / 0, 'acc_norm': 0}")
    write_scored(tmp_path, "imports", "import no_such_metric")
    for name, message in (("divides", "division by zero"), ("imports", "no_such_metric")):
        status, out, err = run("eval", packed, "--tasks", name, "--task-dir", tmp_path)
        assert status == 2 and out == "" and len(err.splitlines()) == 1
        assert f"could not run {name}: " in err and message in err
    write_scored(tmp_path, "numbers", "return {'acc': numpy.float32(0.5), 'acc_norm': numpy.float32(1)}")
    status, out, _ = run("eval", packed, "--tasks", "numbers", "--task-dir", tmp_path, "--json")
    metrics = json.loads(out)["tasks"]["numbers"]["metrics"]
    assert status == 0 and (metrics["acc"]["value"], metrics["acc_norm"]["value"]) == (0.5, 1)


def test_options_of_the_other_kind(run, packed: Path, text_file: Path) -> None:
    status, _, err = run("eval", packed, "--text", text_file, "--limit", 3)
    assert status == 2 and "--limit belongs to --tasks" in err
    assert run("eval", packed)[0] == 2 and run("eval", packed, "--text", text_file, "--tasks", "x")[0] == 2


def test_without_lm_eval_there_is_a_remedy(run, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, err = run("eval", packed, "--tasks", "hellaswag")
    assert status == 2 and "pip install 'alphaprune[eval]'" in err and len(err.strip().splitlines()) == 1


def test_a_packed_model_is_evaluated_packed(packed: Path) -> None:
    assert any(isinstance(m, alphaprune.SparseLinear) for m in hf.load(packed).modules())
