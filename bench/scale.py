"""A checkpoint of LLaMA-2-7B's size, and four blocks of 70B's, through analyze, prune, pack and decode: time, memory.

    python bench/scale.py --folder /big/disk/scale [--json] [--blocks 2] [--steps write,analyze-robust,…]

Weights are random, bfloat16. Every step is a process of its own, whose memory is read while it runs. A step that fails
is a row with its message, and the next one follows. Rows stand in FOLDER/rows.jsonl as they are made: a run that was
cut off goes on there, and an unfinished prune goes on with its next block. With --json they go to
bench/results/scale.jsonl, too. At the end FOLDER is emptied unless --keep is given. 40 GB of disk are enough.

shape, blocks   the sizes of the model, and how many decoder blocks the checkpoint has
step, command   what ran
seconds         wall time, and `target_seconds` where there is one (for all 32 blocks)
cpu_seconds     of all its threads
rss             the most memory that the process had (VmHWM), mapped files and all; bytes
rss_anon        the most of it that no file stands behind (RssAnon, read ten times a second); bytes
ok, message     whether it ended well; the end of what it said on stderr if not
ratio           of step `ranks`: seconds of one process over those of two, one thread each
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import append

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results/scale.jsonl"
SHAPES = {"llama2-7b": 32, "llama2-70b": 4, "small": 4}  # and how many blocks are written, of 80 of 70B
LLAMA2_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
TARGET_RSS = 8 << 30
TARGET_SECONDS = {"analyze-robust": 9 * 60, "analyze-reference": 12 * 60}
RATIO = 1.8
RANK_BLOCKS = 6  # of the checkpoint that one process and two are timed on
SAMPLES, LENGTH = 8, 512
WORDS = "the of a heavy tail and layer that keeps what it needs when most of its weights are gone "


@dataclass(frozen=True)
class Model:
    """One checkpoint in the folder."""

    shape: str
    blocks: int
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / f"{self.shape}-{self.blocks}"

    def out(self, name: str) -> Path:
        return self.folder / f"{self.shape}-{self.blocks}-{name}"


def config_of(model: Model) -> Any:
    from transformers import LlamaConfig

    from alphaprune.decoding import MODELS

    settings = MODELS["small" if model.shape == "small" else "llama2-7b"][1]
    settings = {**settings, **(LLAMA2_70B if model.shape == "llama2-70b" else {}), "num_hidden_layers": model.blocks}
    return LlamaConfig(**settings, dtype="bfloat16", architectures=["LlamaForCausalLM"])


def write_model(model: Model) -> None:
    """A file per block, one block in memory at a time; files that are there already are kept."""
    import torch

    from alphaprune import shards
    from alphaprune.model import make_skeleton

    model.path.mkdir(parents=True, exist_ok=True)
    skeleton, files = make_skeleton(config_of(model)), {}
    for name, parameter in skeleton.named_parameters():
        parts = name.split(".")
        files.setdefault(int(parts[2]) if parts[1] == "layers" else model.blocks, {})[name] = parameter.shape
    weight_map, total = {}, model.blocks + 1
    for index, shapes in sorted(files.items()):
        file = f"model-{index + 1:05d}-of-{total:05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, file)
        if (model.path / file).is_file():
            continue
        generator, tensors = torch.Generator().manual_seed(index), {}
        for name, shape in shapes.items():
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 2:
                tensors[name].normal_(0, 0.02, generator=generator)
        shards.write(model.path / file, tensors.items())
    (model.path / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config_of(model).save_pretrained(model.path)
    write_tokenizer(model.path)
    text = WORDS * (1 + 4 * SAMPLES * LENGTH // len(WORDS))
    (model.folder / "text.txt").write_text(text)


def write_tokenizer(folder: Path) -> None:
    """One token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def first_blocks(model: Model, blocks: int) -> Model:
    """A checkpoint of the first blocks of another one, whose files it links to."""
    from alphaprune import shards

    part = Model(model.shape, blocks, model.folder / "part")
    part.path.mkdir(parents=True, exist_ok=True)
    index = json.loads((model.path / shards.INDEX).read_text())["weight_map"]
    outside = f"model-{model.blocks + 1:05d}-of-"
    kept = {n: f for n, f in index.items() if f.startswith(outside) or int(f.split("-")[1]) <= blocks}
    for file in set(kept.values()):
        (part.path / file).unlink(missing_ok=True)
        (part.path / file).symlink_to((model.path / file).resolve())
    (part.path / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    config_of(part).save_pretrained(part.path)
    write_tokenizer(part.path)
    return part


def memory_of(process: int) -> dict[str, int]:
    """Bytes by the names of /proc/PID/status: VmHWM, RssAnon, …; nothing of a process that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    found = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(count) * 1024 for name, count, _ in found}


def watched(command: list[str], log: Path, threads: int | None) -> dict[str, Any]:
    """Runs a command; its seconds, the peaks of its memory, and how it ended."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    peaks, ended = {"VmHWM": 0, "RssAnon": 0}, threading.Event()
    begin = time.perf_counter()
    with log.open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)

        def watch() -> None:
            while not ended.wait(0.1):
                for name, count in memory_of(process.pid).items():
                    if name in peaks:
                        peaks[name] = max(peaks[name], count)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            ended.set()
            watcher.join()
            if process.returncode is None:
                process.kill()
    row = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "rss": max(peaks["VmHWM"], usage.ru_maxrss * 1024),
        "rss_anon": peaks["RssAnon"],
        "ok": process.returncode == 0,
    }
    return row if row["ok"] else {**row, "message": log.read_text(errors="replace")[-600:]}


def alphaprune(*words: Any) -> list[str]:
    return [sys.executable, "-m", "alphaprune", *map(str, words)]


def commands(model: Model) -> dict[str, list[str]]:
    """The steps that are one process each, in order."""
    text = ["--calibration", model.folder / "text.txt", "--samples", SAMPLES, "--length", LENGTH]
    made, zeros = model.out("analysis.json"), ["--sparsity", 0.7, "--analysis", model.out("analysis.json")]
    return {
        "write": [
            sys.executable,
            __file__,
            "--write",
            model.shape,
            *("--folder", str(model.folder), "--blocks", str(model.blocks)),
        ],
        "analyze-robust": alphaprune("analyze", model.path, "-o", made),
        "prune-magnitude": alphaprune(
            "prune", model.path, "-o", model.out("magnitude"), *zeros, "--method", "magnitude"
        ),
        "prune-wanda": alphaprune(
            "prune", model.path, "-o", model.out("wanda"), *zeros, "--method", "wanda", *text, "--format", "dense"
        ),
        "pack": alphaprune("convert", model.out("wanda"), model.out("packed")),
        "decode": alphaprune("generate", model.out("packed"), "--prompt", WORDS[:20], "--max-new", 8),
        "analyze-reference": alphaprune("analyze", model.path, "-o", model.out("reference.json"), "--fit", "reference"),
    }


AFTER: dict[str, Callable[[Model], Path]] = {  # what is not needed any more after a step that went well
    "prune-magnitude": lambda model: model.out("magnitude"),
    "pack": lambda model: model.out("wanda"),
    "decode": lambda model: model.out("packed"),
}
SECOND = ("write", "analyze-robust", "prune-magnitude")  # the steps of 70B


def two_ranks(model: Model, log: Path) -> dict[str, Any]:
    """One process and two, of one thread each, analyze the first blocks of a model; their files have the same bytes."""
    part = first_blocks(model, min(RANK_BLOCKS, model.blocks))
    one, two = part.out("one.json"), part.out("two.json")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    rows = [
        watched([*launch, str(count), "-m", "alphaprune", "analyze", str(part.path), "-o", str(out)], log, 1)
        for count, out in ((1, one), (2, two))
    ]
    if not all(row["ok"] for row in rows):
        return next(row for row in rows if not row["ok"])
    same = one.read_bytes() == two.read_bytes()
    row = {"seconds": rows[1]["seconds"], "seconds_alone": rows[0]["seconds"], "ok": same, "of_blocks": part.blocks}
    row |= {"ratio": rows[0]["seconds"] / rows[1]["seconds"], "target_ratio": RATIO}
    return row if same else {**row, "message": "the analyses of one process and of two differ"}


class Bench:
    """The steps of one run, with the rows of those that are done."""

    def __init__(self, folder: Path, results: Path | None, wanted: set[str] | None) -> None:
        self.folder, self.results, self.wanted = folder, results, wanted
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "rows.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.rows = [json.loads(line) for line in lines]

    def model(self, model: Model, steps: dict[str, list[str]]) -> None:
        for step, command in steps.items():
            self.step(model, step, lambda log, command=command: watched(command, log, None), command)
            if step in AFTER and self.done(model, step):
                shutil.rmtree(AFTER[step](model), ignore_errors=True)

    def done(self, model: Model, step: str) -> bool:
        return any(
            r["ok"] and (r["shape"], r["blocks"], r["step"]) == (model.shape, model.blocks, step) for r in self.rows
        )

    def step(self, model: Model, step: str, run: Callable[[Path], dict[str, Any]], command: list[str]) -> None:
        if self.done(model, step) or (self.wanted is not None and step not in self.wanted):
            return
        print(f"{model.shape}, {model.blocks} blocks, {step} …", flush=True)
        try:
            found = run(self.folder / f"{model.shape}-{step}.log")
        except (
            OSError,
            ValueError,
            KeyError,
        ) as error:  # a full disk, or a checkpoint that an earlier step left undone
            found = {"ok": False, "message": str(error)}
        self.remember(model, step, found, command)

    def remember(self, model: Model, step: str, found: dict[str, Any], command: list[str]) -> None:
        import torch

        from alphaprune import timing

        words = [word.replace(str(self.folder), "FOLDER").replace(str(ROOT) + "/", "") for word in command]
        row = {"machine": timing.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        row |= {"shape": model.shape, "blocks": model.blocks, "step": step, "command": " ".join(words[1:]), **found}
        if "rss" in row:
            row["target_rss"] = TARGET_RSS
        if step in TARGET_SECONDS and model.shape == "llama2-7b":
            row["target_seconds"] = TARGET_SECONDS[step]
        self.rows.append(row)
        for file in filter(None, (self.file, self.results)):
            append(file, row)
        print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """A row for a person."""
    if not row["ok"]:
        return f"  failed: {row.get('message', '').strip().splitlines()[-1:]}"
    parts = [f"{row['seconds']:.1f} s ({row['seconds'] / row.get('of_blocks', row['blocks']):.1f} s per block)"]
    if "rss" in row:
        parts.append(f"{row['cpu_seconds']:.1f} s of a core")
        parts.append(f"at most {row['rss'] / 2**30:.2f} GiB, {row['rss_anon'] / 2**30:.2f} without mapped files")
    if "ratio" in row:
        parts.append(f"two processes are {row['ratio']:.2f} times as fast as one (target {row['target_ratio']})")
    return "  " + ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="with 40 GB; emptied at the end")
    parser.add_argument("--shapes", default="llama2-7b,llama2-70b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--blocks", type=int, help="decoder blocks (default: 32 of 7B, 4 of 70B)")
    parser.add_argument("--steps", help="only these, with commas")
    parser.add_argument("--keep", action="store_true", help="the folder as it is")
    parser.add_argument("--json", action="store_true", help=f"rows to {RESULTS.relative_to(ROOT)}, too")
    parser.add_argument("--write", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.write:
        write_model(Model(options.write, options.blocks, folder))
        return
    bench = Bench(folder, RESULTS if options.json else None, set(options.steps.split(",")) if options.steps else None)
    for shape in options.shapes.split(","):
        model = Model(shape, options.blocks or SHAPES[shape], folder)
        steps = commands(model)
        if shape == "llama2-70b":
            steps = {name: steps[name] for name in SECOND}
        bench.model(model, steps)
        if shape != "llama2-70b":
            bench.step(
                model, "ranks", lambda log, model=model: two_ranks(model, log), ["bench/scale.py", "--steps ranks"]
            )
        if not options.keep:
            for leftover in folder.glob(f"{shape}-*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            shutil.rmtree(folder / "part", ignore_errors=True)


if __name__ == "__main__":
    main()
