"""Greedy tokens and tokens per second of one directory in vLLM, in the environment that tests/vllm_check.py makes.

    python tests/vllm_tokens.py FOLDER [--ranks 2] [--compiled] [--dtype float32] [--clients 3] [--new 16] [--rounds 1]

One line is a JSON object: tokens of each client, tokens per second of each round, versions.
"""

import argparse
import json
import os
import statistics
import sys
from time import perf_counter

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // options.ranks)  # vLLM itself gives each rank a NUMA node, and fails if there are fewer
    own = [cores[rank * each : (rank + 1) * each] or cores for rank in range(options.ranks)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, part)) for part in own))
    import torch
    import vllm

    model = vllm.LLM(
        options.folder,
        tensor_parallel_size=options.ranks,
        enforce_eager=not options.compiled,
        dtype=options.dtype,
        max_model_len=256,
        max_num_seqs=max(4, options.clients),
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": list(range(3 + n, 8 + 3 * n))} for n in range(options.clients)]
    greedy = vllm.SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True)
    rates, tokens = [], []
    for _ in range(options.rounds):
        started = perf_counter()
        found = model.generate(prompts, greedy, use_tqdm=False)
        rates.append(options.clients * options.new / (perf_counter() - started))
        tokens = [list(one.outputs[0].token_ids) for one in found]
    said = {"tokens": tokens, "rates": rates, "median": statistics.median(rates)}
    print(json.dumps(said | {"vllm": vllm.__version__, "torch": torch.__version__}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
