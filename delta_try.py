"""Variants of delta_spmv side by side: microseconds per call, graphs of calls over copies of the weight. Temporary."""
import os, statistics, sys, time
import torch
from types import SimpleNamespace
from alphaprune.formats import native, sbt
from alphaprune.kernels import cuda, delta_layout as d

# name: warps, early, packs before x
VARIANTS = {f"{24 // w}*{w}{'e' if e else ''}-{k}": (w, e, k) for w, e, k in
            ((24, 1, 2), (12, 1, 2), (12, 1, 4), (12, 1, 0), (8, 1, 2), (8, 1, 4), (12, 0, 0), (12, 0, 2))}
SHAPES = [(28672, 4096), (4096, 14336), (11008, 4096)]
BUDGET = float(sys.argv[1]) if len(sys.argv) > 1 else 150
began = time.time()
torch.manual_seed(0)
L2 = torch.cuda.get_device_properties(0).L2_cache_size
dev = torch.device("cuda")

def timed(calls):
    s = torch.cuda.Stream()
    with torch.cuda.stream(s):
        for c in calls: c()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(4):
            for c in calls: c()
    g.replay(); torch.cuda.synchronize()
    out = []
    for _ in range(15):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); b.record(); torch.cuda.synchronize()
        out.append(a.elapsed_time(b) * 1000 / (4 * len(calls)))
    return statistics.median(out), min(out)

def bind(rows, dtype):
    address = [t.data_ptr() if t.numel() else 0 for t in rows.tensors]
    return cuda._bound(cuda.load().DeltaWeight(*address, rows.sizes, native.DTYPES[dtype], 0), SimpleNamespace(shape=rows.shape, device=dev), rows)

cuda._device(0)
print(torch.cuda.get_device_name(0), "L2", L2)
for shape in SHAPES:
    n, k = shape
    w = torch.randn(n, k, device=dev).bfloat16()
    ws = [w] + [w.clone() for _ in range(max(1, 4 * L2 // w.nbytes))]
    dense = {}
    for m in (1, 2):
        x = torch.randn(m, k, device=dev).bfloat16()
        dense[m] = min(timed([lambda o=o: torch.nn.functional.linear(x, o) for o in ws])[0], timed([lambda o=o: (o @ x.T) for o in ws])[0])
    print(f"{n}x{k} dense M=1 {dense[1]:.2f} M=2 {dense[2]:.2f} us", flush=True)
    del ws
    for sparsity in ((0.8, 0.9, 0.7) if n == 28672 else (0.8, 0.9)):
        mask = torch.rand(n, k, device=dev) >= sparsity
        packed = sbt.pack(w * mask, mask)
        sets = [(v, None) for v in VARIANTS]
        layouts = {}
        for v, fifth in sets:
            if time.time() - began > BUDGET: sys.exit(print("time is over"))
            warps, early, before = VARIANTS[v]
            d.WARPS, d.THREADS = warps, 32 * warps
            os.environ.update(ALPHAPRUNE_DELTA_BEFORE=str(before), ALPHAPRUNE_DELTA_EARLY=str(early))
            os.environ.pop("ALPHAPRUNE_DELTA_FIFTH", None)
            if fifth: os.environ["ALPHAPRUNE_DELTA_FIFTH"] = fifth
            key = warps, fifth
            if key not in layouts:
                layouts.clear()
                rows = d.build(packed)
                from dataclasses import replace
                names = ["values", "deltas", "fifths", "begins", "starts", "counts", "sums", "rows"]
                count = max(2, -(-4 * L2 // rows.nbytes))
                layouts[key] = [replace(rows, **{f: getattr(rows, f).clone() for f in names}) for _ in range(count)]
            copies = layouts[key]
            line = f"{n}x{k} {sparsity} {v}{' fifth=' + fifth if fifth else ''} MB {copies[0].nbytes / 1e6:.1f} spread {int(copies[0].counts.min())}-{int(copies[0].counts.max())}"
            for m in (1, 2):
                x = torch.randn(m, k, device=dev).bfloat16()
                bound = [bind(rows, torch.bfloat16) for rows in copies]
                y = bound[0](x, None)
                want = x.double() @ (w * mask).double().T
                err = ((y.double() - want).abs().max() / want.abs().max()).item()
                med, low = timed([lambda b=b: b(x, None) for b in bound])
                line += f" | M={m} {med:.2f} (min {low:.2f}) us x{dense[m] / med:.2f} {copies[0].nbytes / med / 1e6:.2f} TB/s err {err:.1e}"
            print(line, flush=True)
        layouts.clear()
print("done", time.time() - began)
