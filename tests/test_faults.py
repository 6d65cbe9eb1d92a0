"""Files that go bad under a run, disks that fill, runs that meet: one sentence, nothing half done, nothing mixed."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_checkpoint import contents, write

from alphaprune import model as models
from alphaprune import shards, unfinished
from alphaprune.states import Room, States


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> None:
    """One thread; matrices are small."""


@pytest.fixture
def model(own_copy: Path) -> Path:
    return own_copy


@contextmanager
def files_up_to(nbytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_child(work: Callable[[], int]) -> int:
    """Exit status of a forked process that does this; negative where a signal ended it."""
    process = os.fork()
    if process == 0:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def interrupted(model: Path, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(model, out, stop_after=2)


def test_a_file_that_is_cut_off_under_a_block_is_no_crash(model: Path) -> None:
    def work() -> int:
        blocks = models.open_source(model).blocks()
        block = next(blocks)
        for file in shards.checkpoint_files(model):
            os.truncate(file, 0)
        finite = all(bool(layer.weight.isfinite().all()) for layer in block.linears.values())
        try:
            next(blocks)
        except ValueError as error:
            return 0 if finite and "was changed while it was read" in str(error) else 1
        return 2

    assert in_child(work) == 0


@pytest.mark.parametrize("command", ["prune", "convert", "compress"])
def test_a_file_that_changes_when_the_blocks_are_done(run, model: Path, command: str, monkeypatch) -> None:
    if command == "convert":
        source = models.open_source(model)
        for file in shards.checkpoint_files(model):
            tensors = {n: source.shards.tensor(n) for n in shards.read_header(file)}
            zeros = {n: t * (torch.rand(t.shape) < 0.3) if n.endswith("proj.weight") else t for n, t in tensors.items()}
            shards.write(file, zeros.items())
    original = models.DirectorySource.outside_tensors

    def changing(self, *packed):
        yield from original(self, *packed)
        os.utime(shards.checkpoint_files(model)[0])

    monkeypatch.setattr(models.DirectorySource, "outside_tensors", changing)
    options = {"prune": ("--sparsity", 0.5, "--method", "magnitude", "--allocator", "uniform"), "convert": ()}
    options["compress"] = ("--bits", 4, "--allocator", "uniform")
    out = ("out",) if command == "convert" else ("-o", "out")
    before = sorted(p.as_posix() for p in Path().rglob("*"))
    status, _, err = run(command, model, *out, *options[command])
    assert status == 2 and "was changed while it was read" in err and len(err.strip().splitlines()) == 1
    assert sorted(p.as_posix() for p in Path().rglob("*")) == before


def test_blocks_of_two_models_are_never_mixed(model: Path, tmp_path: Path) -> None:
    """A row changes that no fingerprint reads, between a run that is interrupted and the one that would go on."""
    interrupted(model, tmp_path / "out")
    before = contents(tmp_path / "out.part")
    source, name = models.open_source(model), "model.layers.0.mlp.up_proj.weight"
    file = next(f for f in shards.checkpoint_files(model) if name in shards.read_header(f))
    tensors = {n: source.shards.raw.loaded(n) for n in shards.read_header(file)}
    tensors[name][1] += 1
    fingerprint = models.describe(model).fingerprint
    shards.write(file, tensors.items())
    assert models.describe(model).fingerprint == fingerprint
    with pytest.raises(
        ValueError, match=rf"out\.part: an interrupted run .* {file.name} of the model was written since"
    ):
        write(model, tmp_path / "out")
    assert contents(tmp_path / "out.part") == before


def test_another_release_does_not_go_on(model: Path, tmp_path: Path, monkeypatch) -> None:
    interrupted(model, tmp_path / "out")
    monkeypatch.setattr(unfinished, "__version__", "77.0")
    with pytest.raises(ValueError, match=r"an interrupted run with another version lies here .*now 77\.0"):
        write(model, tmp_path / "out")


@pytest.mark.parametrize("journal", ["{", "[]", '{"identity": 3, "done": {}}', '{"done": {}}', "\udcff"])
def test_a_journal_that_is_none(model: Path, tmp_path: Path, journal: str) -> None:
    interrupted(model, tmp_path / "out")
    (tmp_path / "out.part" / "journal.json").write_bytes(journal.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"journal\.json: is no journal of an interrupted run, or damaged"):
        write(model, tmp_path / "out")


@pytest.mark.parametrize("how", ["cut", "other"])
def test_a_finished_block_that_was_damaged_is_made_again(model: Path, tmp_path: Path, how: str) -> None:
    write(model, tmp_path / "whole")
    interrupted(model, tmp_path / "out")
    file = sorted((tmp_path / "out.part").glob("*.safetensors"))[0]
    if how == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        shards.write(file, [("x", torch.zeros(3))])
    write(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_of_somebody_else_is_left_alone(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.part"
    work.mkdir()
    (work / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.part: holds diary\.txt, which is of no interrupted run"):
        write(model, tmp_path / "out")
    assert (work / "diary.txt").read_text() == "mine"
    (work / "diary.txt").unlink()
    (work / "journal.json.part").write_text("{")  # of a run that was killed when it began
    write(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.part"))


@pytest.mark.parametrize("name", [".", "..", "/", ""])
def test_an_output_needs_a_name(run, model: Path, name: str) -> None:
    given = ("--sparsity", 0.5, "--method", "magnitude", "--allocator", "uniform")
    status, _, err = run("prune", model, "-o", name, *given)
    assert status == 2 and "name a folder that does not exist yet" in err


def test_two_runs_do_not_write_over_each_other(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "out")
    before = contents(tmp_path / "out.part")
    (ready, started), (end, ended) = os.pipe(), os.pipe()

    def work() -> int:
        held = unfinished.hold(tmp_path / "out.part" / unfinished.LOCK)
        os.write(started, b"x")
        os.close(ended)
        os.read(end, 1)
        return int(held.closed)

    process = os.fork()
    if process == 0:
        os._exit(work())
    os.read(ready, 1)
    try:
        with pytest.raises(ValueError, match=r"out\.part: another run is writing there now"):
            write(model, tmp_path / "out")
        assert contents(tmp_path / "out.part") == before
    finally:
        os.close(ended)
        assert os.waitpid(process, 0)[1] == 0
    write(model, tmp_path / "out")


GIVEN = ("--calibration", "text", "--length", 32)
FULL = {  # the largest file that there is room for, and the command
    "analyze": (900, "-o", "out", *GIVEN, "--samples", 4),
    "prune": (60_000, "-o", "out", *GIVEN, "--samples", 4, "--sparsity", 0.5, "--allocator", "uniform"),
    "prune, analysis": (900, "-o", "out", "--sparsity", 0.5, "--method", "magnitude"),
    "compress": (60_000, "-o", "out", "--bits", 4, "--allocator", "uniform"),
    "convert": (60_000, "out", "--values", "int8"),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_disk_that_fills_keeps_what_is_finished(run, model: Path, kind: str) -> None:
    command, (limit, *options) = kind.partition(",")[0], FULL[kind]
    whole = ["whole" if word == "out" else word for word in options]
    assert run(command, model, *whole)[0] == 0
    with files_up_to(limit):
        status, out, err = run(command, model, *options)
    assert status == 2 and out == "" and len(err.strip().splitlines()) == 1 and "written" in err, err
    assert not Path("out").exists()
    status, _, err = run(command, model, *options)
    assert status == 0, err
    same = contents if Path("out").is_dir() else Path.read_bytes
    assert same(Path("out")) == same(Path("whole"))
    assert not list(Path().glob("out.*"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A folder on a disk of its own, and what gives that disk a size in bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk of its own: {getattr(error, 'stderr', None) or error}")

    def resize(nbytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={nbytes}", place], check=True)

    yield place, resize
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize("kind", FULL)
def test_a_disk_that_is_really_full(run, model: Path, disk, kind: str) -> None:
    place, resize = disk
    command, (_, *options) = kind.partition(",")[0], FULL[kind]
    options = [place / "out" if word == "out" else word for word in options]
    out = place / "out"
    same = contents if command != "analyze" else Path.read_bytes
    assert run(command, model, *options)[0] == 0
    whole, used = same(out), shutil.disk_usage(place).used
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    for share in (0.3, 0.7):
        resize(max(4096, int(share * used)))
        status, said, err = run(command, model, *options)
        assert status == 2 and said == "" and len(err.strip().splitlines()) == 1 and "the disk is full" in err, err
        assert not out.exists()
    resize(1 << 30)
    assert run(command, model, *options)[0] == 0
    assert same(out) == whole and [path.name for path in place.iterdir()] == ["out"]


def test_hidden_states_that_fit_nowhere(tmp_path: Path) -> None:
    states = States(Room(0, tmp_path))
    states.append(torch.zeros(1, 4, 8))
    with files_up_to(200), pytest.raises(ValueError, match=rf"{tmp_path}: hidden states .* give --spill DIR"):
        states.append(torch.zeros(1, 4, 8))
    assert torch.equal(states[0], torch.zeros(1, 4, 8)) and len(states) == 1


@pytest.mark.parametrize("command", ["convert", "compress", "recover", "compare"])
def test_what_one_process_does_is_not_done_by_several(run, model: Path, command: str, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = {
        "convert": ("out",),
        "compress": ("-o", "out", "--bits", 4),
        "recover": ("-o", "out", "--calibration", "text"),
        "compare": ("-o", "out", "--calibration", "text", "--text", "text", "--sparsity", 0.5),
    }
    status, _, err = run(command, model, *options[command])
    assert status == 2 and "is done by one process, and 2 were started" in err and not list(Path().glob("out*"))
