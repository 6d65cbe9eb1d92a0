"""A device that is not here, an old driver, too little memory: a sentence that names it and the remedy."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import alphaprune
from alphaprune import benchmark, calibrate, devices, evaluate, hardware, memory, spectrum
from alphaprune import model as models
from alphaprune.formats import native, sbt
from alphaprune.kernels import base, spmm
from alphaprune.layer import sparsify

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB")
LINE = "2.50 GiB more could not be had"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch for CUDA 13.0 where no driver is installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(hardware, "cuda_driver", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def out_of_memory(*_: object, **__: object) -> None:
    raise FULL


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "tpu", "meta", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "cuda:1.0", "auto"):
        with pytest.raises(ValueError, match=f"^--device {name}: wanted cpu, cuda or cuda:N$"):
            devices.named(name)
    with pytest.raises(ValueError, match="--device tpu: wanted auto, cpu, cuda or cuda:N"):
        devices.named("tpu", auto=True)
    assert devices.named("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.named("cuda").index is None and devices.named("cuda:1") == torch.device("cuda", 1)
    assert devices.named("auto", auto=True).type == "cuda"
    with pytest.raises(ValueError, match="--device cuda:2: PyTorch sees 2 GPUs here, the last of which is cuda:1"):
        devices.named("cuda:2")


def test_why_there_is_no_gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = f"PyTorch {torch.__version__} finds no NVIDIA GPU: "
    assert devices.named("auto", auto=True).type == "cpu"
    assert devices.no_cuda() == begin + "no NVIDIA driver is installed; it takes one for CUDA 13.0 or newer"
    monkeypatch.setattr(hardware, "cuda_driver", lambda: (12, 4))
    assert devices.no_cuda() == (
        begin + "the NVIDIA driver serves CUDA up to 12.4, and this was made for CUDA 13.0; update the driver or "
        "install a build for CUDA 12"
    )
    monkeypatch.setattr(hardware, "cuda_driver", lambda: (13, 0))
    assert devices.no_cuda() == begin + "the NVIDIA driver shows none; nvidia-smi tells what it sees"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=, which hides" in devices.no_cuda()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert devices.no_cuda().endswith("was built without CUDA; install a wheel from PyTorch's CUDA index")


def test_the_warnings_of_an_old_driver_are_not_shown(no_gpu: None, monkeypatch, recwarn) -> None:
    import warnings

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn("too old", stacklevel=1)))
    assert devices.no_cuda() and not recwarn.list


@pytest.mark.parametrize(("body", "found"), [("*v = 12040; return 0", (12, 4)), ("return 3", None), (None, None)])
def test_what_the_driver_serves(tmp_path: Path, body: str | None, found: tuple[int, int] | None) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    source, library = tmp_path / "driver.c", tmp_path / "driver.so"
    source.write_text("int other;" if body is None else f"int cuDriverGetVersion(int* v) {{ {body}; }}")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
    assert hardware.cuda_driver(str(library)) == found
    assert hardware.cuda_driver(str(tmp_path / "none.so")) is None


OUT = ("-o", "out")
COMMANDS = {
    "serve": (),
    "info": (),
    "bench": (),
    "analyze": OUT,
    "prune": (*OUT, "--sparsity", 0.5, "--method", "magnitude", "--allocator", "uniform"),
    "compress": (*OUT, "--bits", 4, "--allocator", "uniform"),
    "compare": (*OUT, "--sparsity", 0.5, "--calibration", "text", "--text", "text"),
    "recover": (*OUT, "--calibration", "text"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_a_gpu(no_gpu: None, run, directory: Path, command: str) -> None:
    Path("text").write_text("a heavy tail, and so on. " * 60)
    status, _, err = run(command, directory, "--device", "cuda", *COMMANDS[command])
    assert (status, err) == (
        2,
        f"alphaprune {command}: --device cuda: PyTorch {torch.__version__} finds no NVIDIA GPU: no NVIDIA driver is "
        f"installed; it takes one for CUDA 13.0 or newer\n",
    )
    assert [path.name for path in Path().iterdir()] == ["text"]


def test_loading_onto_a_device_that_is_not_here(no_gpu: None, directory: Path) -> None:
    for device in ("cuda", "tpu"):
        with pytest.raises(ValueError, match=f"--device {device}: "):
            alphaprune.load(directory, device=device)


def test_kernels_are_refused_before_anything_is_timed(run, directory: Path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark.hf, "load", lambda *_, **__: pytest.fail("loaded before it was refused"))
    status, _, err = run("bench", directory, "--kernel", "sbt_mma", "--device", "cpu")
    assert status == 2 and err.startswith("alphaprune bench: kernel sbt_mma cannot run: ") and err.count("\n") == 1
    with pytest.raises(ValueError, match="kernel expand cannot run: it runs on cpu, the packed weight is on cuda:1"):
        base.on("expand", torch.device("cuda:1"))


def test_a_model_that_does_not_fit(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "to", out_of_memory)
    words = (
        rf"^cpu has too little memory: [\d.]+ .?B are needed \([\d.]+ .?B for the weights of .*small\), and {LINE}; "
    )
    with pytest.raises(ValueError, match=words + "take a device with more, or the CPU$"):
        alphaprune.load(directory)


def test_a_block_that_does_not_fit(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(models.open_source(directory).blocks())
    nbytes = sum(parameter.nbytes for parameter in block.module.parameters())
    with pytest.raises(ValueError, match=rf"for the weights of {block.name}\), and {LINE}; give less"):  # noqa: SIM117
        with calibrate.on(block, "cpu"):
            raise FULL
    assert memory.nbytes(block.module) == nbytes
    with pytest.raises(RuntimeError, match="a mistake"), calibrate.on(block, "cpu"):
        raise RuntimeError("a mistake")


def test_spectra_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "_eigenvalues", out_of_memory)
    with pytest.raises(ValueError, match=rf"are needed \(.* for the spectra of 2 matrices\), and {LINE}; compute them"):
        spectrum.eigenvalues([torch.randn(30, 20), torch.randn(30, 20)], device="cpu")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, f"out of memory: {LINE}; take shorter texts"),
        (MemoryError(), "out of memory: there was no more; "),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory: "),
        (RuntimeError("CUDA error: no kernel image is available\nmore"), "the device failed: CUDA error: no kernel im"),
    ],
)
def test_errors_of_a_device_are_one_line(run, directory: Path, monkeypatch, error: Exception, words: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(evaluate, "evaluate", fail)
    Path("text").write_text("a heavy tail, and so on. " * 60)
    status, _, err = run("eval", directory, "--text", "text")
    assert status == 2 and err.splitlines()[-1].startswith(f"alphaprune eval: {words}")


def test_mistakes_of_ours_are_not_hidden(run, directory: Path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    Path("text").write_text("a heavy tail, and so on. " * 60)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run("eval", directory, "--text", "text")


def test_errors_of_a_kernel_name_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = RuntimeError("cudaErrorIllegalAddress: what it means\nand more")
    old = ValueError("cuda:0 has compute capability 7.5")

    def said(error: Exception, bind) -> str:
        monkeypatch.setattr(base, "choose", lambda *_: (base.Kernel("k", "any", None, None, bind), "first"))
        model, found = nn.ModuleDict({"up": nn.Linear(70, 50)}), set()
        sparsify(model, {"up": torch.rand(50, 70) > 0.7})
        for wants_gradients in (True, False):  # by the op, and by the direct call
            with pytest.raises(type(error)) as caught, torch.set_grad_enabled(wants_gradients):
                model["up"](torch.randn(3, 70))
            found.add(str(caught.value))
        (sentence,) = found
        return sentence

    def run(error: Exception) -> None:
        raise error

    assert said(FULL, lambda _: run(FULL)) == f"up: no memory for what kernel k keeps of the weight: {FULL}"
    assert said(old, lambda _: run(old)) == f"up: {old}"
    assert said(broken, lambda _: run(broken)) == "up: cudaErrorIllegalAddress: what it means"
    assert said(FULL, lambda _: lambda x, bias: run(FULL)) == f"up: no memory for y [3, 50]: {FULL}"
    assert said(broken, lambda _: lambda x, bias: run(broken)) == "up: cudaErrorIllegalAddress: what it means"


def test_the_reference_is_not_taken_in_silence(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(native, "_find", lambda: (None, "no C++ compiler was found"))
    spmm._log_slow.cache_clear()
    for _ in range(2):
        spmm.prepare(sbt.pack(torch.randn(16, 64)))(torch.randn(1, 64))
    (said,) = caplog.messages
    assert said.startswith("no kernel runs on cpu, so the slow reference does, because ")
    assert "avx2: not built: no C++ compiler was found" in said
    caplog.clear()
    spmm.prepare(sbt.pack(torch.randn(16, 64)), kernel="reference")(torch.randn(1, 64))
    assert not caplog.messages, "it was asked for"
    spmm._log_slow.cache_clear()
