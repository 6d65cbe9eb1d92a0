"""What the system says of its processor and memory, read from made-up systems, and threads bound to cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphaprune import affinity, hardware, inspection


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """Two sockets of two cores of two threads: CPUs 0-3 and their siblings 4-7; core numbers repeat between sockets."""
    files = {
        "proc/cpuinfo": "processor : 0\nmodel name : X\nflags : fpu sse avx avx2 fma amx_tile avx512f\n",
        "proc/meminfo": "MemTotal:       1000 kB\nMemFree:  10 kB\nMemAvailable:    400 kB\nHugePages_Total:  0",
        "sys/devices/system/node/node0/cpulist": "0-1,4-5",
        "sys/devices/system/node/node1/cpulist": "2-3,6-7",
        "sys/devices/system/node/node10/cpulist": "",
        "sys/fs/cgroup/cpu.max": "150000 100000",
        "sys/fs/cgroup/memory.max": "512000",
    }
    for cpu in range(8):
        socket, core = cpu % 4 // 2, cpu % 2
        base = f"sys/devices/system/cpu/cpu{cpu}"
        pair, half = f"{cpu % 4},{cpu % 4 + 4}", "0-1,4-5" if socket == 0 else "2-3,6-7"
        files |= {f"{base}/topology/physical_package_id": str(socket), f"{base}/topology/core_id": str(core)}
        for index, (kind, level, size, shared) in enumerate(
            (("Data", 1, "48K", pair), ("Instruction", 1, "32K", pair), ("Unified", 2, "2M", pair))
        ):
            place = f"{base}/cache/index{index}"
            files |= {f"{place}/type": kind, f"{place}/level": str(level), f"{place}/size": size}
            files[f"{place}/shared_cpu_list"] = shared
        files |= {f"{base}/cache/index3/type": "Unified", f"{base}/cache/index3/level": "3"}
        files |= {f"{base}/cache/index3/size": "30720K", f"{base}/cache/index3/shared_cpu_list": half}
    return write(tmp_path, files)


def test_a_server(server: Path) -> None:
    found = hardware.describe(server)
    assert (found["sockets"], found["cores"], found["cpus"], found["threads_per_core"]) == (2, 4, 8, 2)
    assert found["numa_nodes"] == {"0": "0-1,4-5", "1": "2-3,6-7", "10": ""}
    assert found["caches"] == [
        {"level": 1, "type": "data", "bytes": 48 << 10, "cpus": 2, "count": 4},
        {"level": 2, "type": "unified", "bytes": 2 << 20, "cpus": 2, "count": 4},
        {"level": 3, "type": "unified", "bytes": 30 << 20, "cpus": 4, "count": 2},
    ]
    assert found["instruction_sets"] == ["avx", "avx2", "fma", "avx512f", "amx_tile"]
    assert (found["memory"], found["memory_available"], found["memory_limit"]) == (1_024_000, 409_600, 512_000)
    assert found["cpu_limit"] == 1.5


def test_other_limits(server: Path) -> None:
    cgroup = server / "sys/fs/cgroup"
    write(cgroup, {"cpu.max": "max 100000", "memory.max": "max"})
    assert hardware.cpu_limit(server) is None and hardware.memory_limit(server) is None
    (cgroup / "cpu.max").unlink()
    (cgroup / "memory.max").unlink()
    write(cgroup, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"})
    write(cgroup, {"memory/memory.limit_in_bytes": str(1 << 62)})  # as the first version writes "none"
    assert hardware.cpu_limit(server) == 2 and hardware.memory_limit(server) is None
    write(cgroup, {"cpu/cpu.cfs_quota_us": "-1"})
    assert hardware.cpu_limit(server) is None


def test_free_memory_in_a_container(server: Path) -> None:
    cgroup = server / "sys/fs/cgroup"
    assert hardware.memory_free(server) == 409_600  # the machine has less than the 512,000 of the container
    write(cgroup, {"memory.stat": "anon 200000\nfile 300000\nkernel_anon 1"})
    assert hardware.memory_free(server) == 312_000
    write(cgroup, {"memory.stat": "anon 600000"})
    assert hardware.memory_free(server) == 0
    for name in ("memory.max", "memory.stat"):
        (cgroup / name).unlink()
    assert hardware.memory_free(server) == 409_600
    write(cgroup, {"memory/memory.limit_in_bytes": "300000", "memory/memory.stat": "rss 7\ntotal_rss 100000"})
    assert hardware.memory_free(server) == 200_000


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    found = hardware.describe(tmp_path)
    assert not any(found.values()) and hardware.openmp(tmp_path) == [] and hardware.memory_free(tmp_path) is None
    rows = dict(inspection._hardware_rows(_machine(found)))
    assert rows["memory"] == "?, ? available" and rows["NUMA nodes"] == "?" and rows["threads"] == "2"


@pytest.mark.parametrize(
    ("name", "model", "wanted"),
    [
        ("AMD EPYC", "cpu family 26, model 2, stepping 1", "AMD EPYC (Zen 5)"),
        ("AMD EPYC", "cpu family 25, model 17, stepping 1", "AMD EPYC (Zen 4)"),
        ("AMD EPYC", "cpu family 25, model 160, stepping 2", "AMD EPYC (Zen 4)"),
        ("AMD EPYC", "cpu family 25, model 1, stepping 1", "AMD EPYC (Zen 3)"),
        ("AMD EPYC", "cpu family 23, model 49, stepping 0", "AMD EPYC (Zen 2)"),
        ("AMD EPYC", "cpu family 99, model 1, stepping 0", "AMD EPYC"),
        ("AMD EPYC", "", "AMD EPYC"),
        ("AMD EPYC 9654", "cpu family 25, model 17, stepping 1", "AMD EPYC 9654"),
        ("Intel(R) Xeon(R) Processor", "cpu family 6, model 143, stepping 8", "Intel(R) Xeon(R) Processor"),
    ],
)
def test_full_names(name: str, model: str, wanted: str) -> None:
    assert hardware.full_name(name, model) == wanted


def test_a_processor_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    lines = [
        "processor\t: 0",
        "vendor_id\t: AuthenticAMD",
        "cpu family\t: 26",
        "model\t\t: 2",
        "model name\t: AMD EPYC",
    ]
    (tmp_path / "proc/cpuinfo").write_text(
        "\n".join([*lines, "stepping\t: 1", "", "processor\t: 1", "model name\t: B"])
    )
    assert hardware.processor(tmp_path) == ("AMD EPYC", "cpu family 26, model 2, stepping 1")
    assert hardware.processor(tmp_path / "nothing")[1] == ""
    assert hardware.maker(tmp_path) == "AuthenticAMD"
    assert hardware.maker(tmp_path / "nothing") is None


def test_openmp_libraries(tmp_path: Path) -> None:
    line = "7f0000000000-7f0000001000 r-xp 00000000 00:00 0        {}"
    paths = ["/a b/libgomp-a34b3233.so.1", "/x/libgomp.so.1", "/x/libiomp5.so", "/x/libcomp.so", "[heap]", ""]
    root = write(tmp_path, {"proc/self/maps": "\n".join(line.format(path) for path in paths * 2)})
    assert hardware.openmp(root) == ["/a b/libgomp-a34b3233.so.1", "/x/libgomp.so.1", "/x/libiomp5.so"]
    rows = dict(inspection._hardware_rows(_machine(hardware.describe(root), openmp=hardware.openmp(root))))
    assert "load one library only" in rows["OpenMP"]


def _machine(found: dict, **changes) -> dict:
    return {"hardware": found, "usable_cpus": 2, "threads": 2, "openmp": [], "bandwidth": None} | changes


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"threads": 1}, "1"),
        ({"threads": 2}, "2: the container grants the time of 1.5 CPUs; set OMP_NUM_THREADS=1"),
        (
            {"threads": 9, "usable_cpus": 8, "limit": None},
            "9: more than the CPUs of this process; set OMP_NUM_THREADS=8",
        ),
        ({"threads": 8, "usable_cpus": 8, "limit": None}, "8: more than there are cores; OMP_NUM_THREADS=4 is usually"),
        ({"threads": 4, "usable_cpus": 8, "limit": None}, "4"),
    ],
)
def test_advice_on_threads(server: Path, changes: dict, advice: str) -> None:
    found = hardware.describe(server)
    found["cpu_limit"] = changes.pop("limit", found["cpu_limit"])
    rows = dict(inspection._hardware_rows(_machine(found, **changes)))
    assert rows["threads"].startswith(advice) and (len(advice) > 1 or rows["threads"] == advice)
    assert rows["cores"].startswith("sockets 2, cores 4, threads per core 2, CPUs 8")
    assert "4 × L2 unified 2,048 KiB for CPUs: 2" in rows["caches"]


def test_this_machine(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from alphaprune import timing

    found = json.loads(run("info", "--json")[1])
    assert found["usable_cpus"] == len(affinity.cpus()) and found["bandwidth"] is None
    monkeypatch.setattr(timing, "read_bandwidth", lambda: 12.5e9)
    status, out, _ = run("info", "--bandwidth")
    assert status == 0 and "12.5 GB/s" in out
    for word in ("instruction sets", "NUMA nodes", "caches", "OpenMP", "threads", "kernel amx"):
        assert word in out
    assert run("info", "MODEL", "--bandwidth")[0] == 2
    if Path("/proc/self/maps").exists():
        assert len(found["openmp"]) >= 1 and found["hardware"]["memory"] > found["hardware"]["memory_available"]


SCRIPT = """
import json, os
from alphaprune import affinity
before = sorted(affinity.cpus())
affinity.pin()
import torch
from alphaprune.kernels.table import Machine
torch.set_num_threads(len(before))
torch.ones(1 << 22).add_(1)
print(json.dumps([before, sorted(affinity.cpus()), affinity.bound(), Machine.here().cores]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(affinity.cpus()) < 2, reason="nothing to bind")
def test_every_thread_is_bound_to_a_core_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, after, bound, cores = json.loads(done.stdout)
    assert before == after and cores == len(before)
    flat = [cpu for one in bound for cpu in one]
    assert sorted(flat) == before and len(bound) > 1


def test_binding_comes_before_torch() -> None:
    import torch  # noqa: F401

    with pytest.raises(ValueError, match="OMP_PROC_BIND=close and OMP_PLACES=cores"):
        affinity.pin()
