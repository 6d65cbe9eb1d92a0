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

CLIENTS, NEW = 3, 16

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def prompts(clients: int) -> list[list[int]]:
    """Tokens, more of them for each client."""
    return [list(range(3 + n, 8 + 3 * n)) for n in range(clients)]


def binding(ranks: int) -> str:
    """Cores of each rank, as many as there are; vLLM itself gives each a NUMA node, and fails if there are fewer."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // ranks)
    own = [cores[rank * each : (rank + 1) * each] or cores for rank in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in own)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--new", type=int, default=NEW)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", binding(options.ranks))
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
    asked = [{"prompt_token_ids": prompt} for prompt in prompts(options.clients)]
    greedy = vllm.SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True)
    rates, tokens = [], []
    for _ in range(options.rounds):
        started = perf_counter()
        found = model.generate(asked, greedy, use_tqdm=False)
        rates.append(options.clients * options.new / (perf_counter() - started))
        tokens = [list(one.outputs[0].token_ids) for one in found]
    said = {"tokens": tokens, "rates": rates, "median": statistics.median(rates)}
    print(json.dumps(said | {"vllm": vllm.__version__, "torch": torch.__version__}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
