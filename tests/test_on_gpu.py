"""bench/on_gpu.py with steps that need no GPU: limits, failures, what is left."""

import json
import re
import shlex
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch):
    """bench/on_gpu.py as a module, for which a second is enough to begin a step."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.delitem(sys.modules, "on_gpu", raising=False)
    import on_gpu

    monkeypatch.setattr(on_gpu, "LEAST", 1)
    yield on_gpu
    sys.modules.pop("on_gpu", None)


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(on_gpu, tmp_path, capsys) -> None:
    child = f"import subprocess, sys; subprocess.run({list(python('import time; time.sleep(60)'))!r})"
    writes = "import sys; open(sys.argv[2], 'w').write('row'); print('said')"
    steps = (
        on_gpu.Step("fails", 60, python("raise SystemExit(3)")),
        on_gpu.Step("hangs", 2, python(child)),
        on_gpu.Step("lacks", 60, python(""), None, "a-program-that-nobody-has"),
        on_gpu.Step("writes", 60, python(writes), "rows.jsonl"),
    )
    begin = time.monotonic()
    assert on_gpu.main(["--out", str(tmp_path / "deep" / "out")], steps) == 1
    assert time.monotonic() - begin < 50, "a hanging step and its children end at the limit"
    printed = capsys.readouterr()
    found = {row["step"]: row["status"] for row in map(json.loads, printed.out.splitlines())}
    assert found == {"fails": 3, "hangs": None, "writes": 0}
    assert "not run: lacks" in printed.err
    assert (tmp_path / "deep/out/rows.jsonl").read_text() == "row"
    log = (tmp_path / "deep/out/log.txt").read_text()
    assert "said" in log and log.count("=====") == 3
    assert {json.loads(line)["step"] for line in log.splitlines() if line.startswith("{")} == set(found)


def test_a_step_past_its_limit_has_last_words(on_gpu, tmp_path, capsys) -> None:
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('what was found')"
    assert on_gpu.main(["--out", str(tmp_path)], (on_gpu.Step("slow", 2, python(code)),)) == 1
    assert json.loads(capsys.readouterr().out)["status"] is None
    assert "what was found" in (tmp_path / "log.txt").read_text()


def test_what_there_is_no_time_for_is_named(on_gpu, tmp_path, capsys) -> None:
    steps = (on_gpu.Step("first", 60, python("import time; time.sleep(40)")), on_gpu.Step("second", 60, python("")))
    assert on_gpu.main(["--out", str(tmp_path), "--minutes", "0.04"], steps) == 1
    printed = capsys.readouterr()
    (row,) = map(json.loads, printed.out.splitlines())
    assert row["step"] == "first" and row["status"] is None and row["seconds"] < 20
    assert "not run: second" in printed.err


def test_a_part(on_gpu, tmp_path, capsys) -> None:
    steps = (on_gpu.Step("one", 60, python("")), on_gpu.Step("two", 60, python("")))
    assert on_gpu.main(["--out", str(tmp_path), "--only", "two"], steps) == 0
    assert json.loads(capsys.readouterr().out)["step"] == "two"
    with pytest.raises(SystemExit):
        on_gpu.main(["--only", "three"], steps)
    assert "there are one, two" in capsys.readouterr().err


def test_the_real_steps(on_gpu, capsys, tmp_path) -> None:
    """What they call is there, and takes the options."""
    assert on_gpu.main(["--list", "--out", str(tmp_path)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [step.name for step in on_gpu.STEPS]
    assert len({step.rows for step in on_gpu.STEPS if step.rows}) + 1 <= 8
    for step in on_gpu.STEPS:
        for word in step.command:
            if word.endswith(".py"):
                assert (ROOT / word).exists(), shlex.join(step.command)
        if "-k" in step.command:
            file, _, expression = step.command[-3:]
            assert re.search(rf"def test_\w*{expression}", (ROOT / file).read_text())
    assert not list(tmp_path.iterdir())
