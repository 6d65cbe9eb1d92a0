"""bench/pipes.py and bench/counters.py without a GPU: one launches nothing, the other reads a page of ncu."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = """==PROF== Disconnected from process 7
"ID","Kernel Name","Block Size","Grid Size","CC","device__attribute_display_name","gpu__time_duration.sum",\
"dram__bytes_read.sum","dram__bytes.sum.per_second","smsp__inst_executed.sum","launch__registers_per_thread",\
"sm__cycles_elapsed.max","sm__cycles_active.avg","l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",\
"l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum","lts__t_sector_hit_rate.pct",\
"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_misc_per_issue_active.ratio"
"","","","","","","us","Mbyte","Tbyte/s","inst","register/thread","cycle","cycle","","","%","%","inst","inst","inst"
"0","void f<1, 2>(P)","(128, 1, 1)","(1792, 2, 1)","9.0","NVIDIA H200","51.968","133.614336","2.632394","1,234.0","64",\
"1,000.0","830.5","6,320","848","32.5","6.4","1","2.99","0.01"
"1","void g(P)","(32, 1, 1)","(4, 1, 1)","9.0","H200","1.5","2","-","9","32","10","9","0","0","1","0","0","0","0"
"""


def loaded(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


def test_profiling_needs_a_gpu(monkeypatch, capsys) -> None:
    pipes = loaded("pipes", monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pipes.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pipes.py: --device cuda: PyTorch")


def test_a_row_is_in_seconds_bytes_and_shares(monkeypatch, capsys, tmp_path: Path) -> None:
    counters, page, out = loaded("counters", monkeypatch), tmp_path / "raw.csv", tmp_path / "rows.jsonl"
    page.write_text(PAGE)
    given = ["--case", "sbt_mma:1:0.5,nm_mma_sp:16:2:4", "--shape", "96x64", "--changed", "more of it"]
    assert counters.main([str(page), *given, "--out", str(out)]) == 0
    first, second = map(json.loads, out.read_text().splitlines())
    wanted = {
        **{"gpu": "NVIDIA H200", "capability": "9.0", "launched": "void f<1, 2>(P)", "block": [128, 1, 1]},
        **{"grid": [1792, 2, 1], "seconds": 51.968e-6, "dram_read_bytes": 133614336},
        **{"dram_bytes_per_second": 2.632394e12, "shared_wavefronts": 6320, "conflicts": pytest.approx(848 / 6320)},
        **{"instructions": 1234, "registers": 64, "cycles": 1000, "busy": 0.8305, "l2_hits": 0.325, "waves": None},
        **{"stalls": {"long_scoreboard": 0.7475, "wait": 0.25}},
        **{"case": "sbt_mma:1:0.5", "shape": [96, 64], "kernel": "sbt_mma", "tokens": 1, "sparsity": "0.5"},
        **{"changed": "more of it"},
    }  # fmt: skip
    assert {name: first[name] for name in wanted} == wanted
    assert first["pipes"]["tensor"] == pytest.approx(0.064) and first["pipes"]["alu"] is None
    assert second["sparsity"] == "2:4" and second["tokens"] == 16
    assert second["stalls"] == {} and second["conflicts"] is None and second["dram_bytes_per_second"] is None
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("sbt_mma:1:0.5") and "51.97 us" in shown[0] and "long_scoreboard 75" in shown[0]


def test_what_is_no_page_is_refused_in_one_sentence(monkeypatch, capsys, tmp_path: Path) -> None:
    counters, page = loaded("counters", monkeypatch), tmp_path / "raw.csv"
    for text in ("", "==ERROR== nothing\n", '"a","b"\n"",""\n'):
        page.write_text(text)
        assert counters.main([str(page)]) == 2
        assert "make it by: ncu -i FILE.ncu-rep --csv --page raw" in capsys.readouterr().err
    page.write_text(PAGE)
    assert counters.main([str(page), "--case", "sbt_mma:1:0.5"]) == 2
    assert f"--case names 1 launches, and {page} has 2" in capsys.readouterr().err
    assert counters.main([str(tmp_path / "none")]) == 2
    page.write_text(PAGE.rsplit(",", 3)[0])
    assert counters.main([str(page)]) == 2
    assert "a launch has 17 cells, and there are 20 columns: the page is cut off" in capsys.readouterr().err


def test_counters_that_a_device_does_not_have(monkeypatch, capsys, tmp_path: Path) -> None:
    counters, page = loaded("counters", monkeypatch), tmp_path / "raw.csv"
    *head, first, _ = PAGE.splitlines()
    cells = first.split('","')
    assert len(cells) == 20
    page.write_text("\n".join([*head, '","'.join([*cells[:6], *["n/a"] * 13, 'n/a"'])]))
    assert counters.main([str(page), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["stalls"] == {} and {row[name] for name in ("seconds", "busy", "conflicts", "l2_hits")} == {None}
    assert counters.main([str(page)]) == 0
    assert "? us  busy   ? %" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["pipes", "counters"])
@pytest.mark.parametrize(
    "case", ["", "sbt_mma", "sbt_mma:1", "sbt_mma:x:0.5", "sbt_mma:0:0.5", "sbt_mma:1:2", ":1:0.5"]
)
def test_cases_that_are_none(monkeypatch, capsys, script: str, case: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        loaded(script, monkeypatch).main([*(["page"] if script == "counters" else []), "--case", case])
    assert stopped.value.code == 2 and "--case" in capsys.readouterr().err.splitlines()[-1]
