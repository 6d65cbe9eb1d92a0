"""Where results go: devices, pipes and links are not replaced by files, and that is said before hours of work."""

import os
import stat
from pathlib import Path

import pytest

import alphaprune
from alphaprune import files

PLAN = ("plan", "analysis.json", "--sparsity", "0.5", "--allocator", "uniform", "-o")
PRUNE = ("prune", "m", "--sparsity", "0.5", "--method", "magnitude", "--allocator", "uniform", "-o")


@pytest.fixture
def room(run, one_thread, directory: Path, tmp_path: Path) -> Path:
    """The current folder, with a model and its analysis."""
    (tmp_path / "m").symlink_to(directory)
    alphaprune.analyze(directory, fit=None).save(tmp_path / "analysis.json")
    return tmp_path


def test_a_pipe_is_no_place_for_a_file(run, room: Path) -> None:
    """As root /dev/null and /dev/stdout would be replaced, for everybody."""
    os.mkfifo("pipe")
    (room / "link").symlink_to(room / "pipe")
    for command in ((*PLAN, "pipe"), (*PLAN, "link"), ("analyze", "m", "-o", "pipe")):
        status, out, err = run(*command)
        assert status == 2 and not out and err.strip().endswith("is no regular file; name another"), err
    with pytest.raises(ValueError, match="pipe: not written: is no regular file"):
        files.atomic_write_text(room / "pipe", "x")
    assert stat.S_ISFIFO(os.stat("pipe").st_mode) and (room / "link").is_symlink()
    assert not list(room.glob("*.part"))


def test_a_link_to_a_file_stays_one(run, room: Path) -> None:
    (room / "elsewhere").mkdir()
    (room / "plan.json").symlink_to(room / "elsewhere" / "own.json")
    assert run(*PLAN, "plan.json")[0] == 0  # to a file that is not there yet
    (room / "elsewhere" / "own.json").write_text("old")
    assert run(*PLAN, "plan.json")[0] == 0
    assert (room / "plan.json").is_symlink() and "kind" in (room / "elsewhere" / "own.json").read_text()
    assert [p.name for p in (room / "elsewhere").iterdir()] == ["own.json"]


@pytest.mark.parametrize("target", ["nowhere", "empty", "pipe"])
def test_a_link_is_no_place_for_a_folder(run, room: Path, target: str) -> None:
    (room / "empty").mkdir()
    os.mkfifo("pipe")
    (room / "out").symlink_to(room / target)
    before = sorted(p.name for p in room.iterdir())
    status, out, err = run(*PRUNE, "out")
    assert status == 2 and not out and "out: is a link; name a folder that does not exist yet" in err
    status, out, err = run(*PRUNE, "pipe")
    assert status == 2 and not out and "pipe: is a file; name a folder that does not exist yet" in err
    assert sorted(p.name for p in room.iterdir()) == before
