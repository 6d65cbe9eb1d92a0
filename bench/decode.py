"""Whole-model decoding: packed weights in our decoder beside transformers' dense bfloat16, in processes by turns.

python bench/decode.py --model llama2-7b --sparsity 0.5,0.7,0.8 --values bfloat16,int8 --out bench/results/decode.jsonl

A dense and a packed model of 7e9 weights do not fit into 24 GB together. So `--pairs` times, one process decodes the
dense model and the next ones the packed models, one for each sparsity and kind of values: a pair is a packed model and
the dense one of its round. Every process warms up, decodes `--new` tokens greedily after 16 random ones, and measures
the read bandwidth of the moment. Weights are random; every block lies in memory of its own, on huge pages where the
system has them. Rows, one JSON object each, seconds and bytes throughout:

machine, threads, torch   where it ran
model, blocks             the shapes, and how many decoder blocks
weights, values           dense or packed, and the dtype of the values; x and dense layers are bfloat16
head                      int8 where the output layer has such values; otherwise null, it is in bfloat16
activations               int8 where kernels may round x so beside int8 values; otherwise null
sparsity                  zeros / weights inside the blocks; 0 for dense
pair                      which process of its kind it was, from 0
decoder                   transformers (its generate), or alphaprune
new, tokens_per_second    tokens timed, and their number over their seconds, without the prompt
step_seconds              median of the steps
weight_bytes              of all weights that a step reads
kernel_seconds            all products of a step with weights, called alone, median; only with decoder alphaprune
step_over_kernels         median of step / kernels, measured by turns in this process; only with decoder alphaprune
bandwidth                 bytes/s that this machine read at that moment (alphaprune.timing.read_bandwidth)

At the end follows the summary of each packed model: ratio, the median over pairs of its tokens/s over those of
transformers' dense model in the same pair; ratio_of_weights, the same over our decoder's with dense weights; ratios,
one per pair; pairs.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from typing import Any

from rows import append, command

PROMPT = 16
COLUMNS = ("model", "sparsity", "values", "decoder", "tokens/s", "step s", "over kernels", "weights GB", "GB/s")


def measure(
    model: str,
    sparsity: float | None,
    values: str,
    new: int,
    bandwidth_bytes: int,
    activations: str | None = None,
    head: str | None = None,
) -> list[dict[str, Any]]:
    """The rows of one process: of a packed model one, of a dense model two, transformers' decoder and ours."""
    import torch

    from alphaprune import decoding, timing

    allowed = activations and getattr(torch, activations)
    kinds = {"values": getattr(torch, values), "activations": allowed, "rounded_head": head is not None}
    made = decoding.random_model(model, sparsity, **kinds)
    tensors = [tensor for name, tensor in made.state_dict().items() if "embed_tokens" not in name]
    common = {
        "machine": timing.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": model,
        "blocks": made.config.num_hidden_layers,
        "weights": "dense" if sparsity is None else "packed",
        "values": values,
        "head": head,
        "activations": activations,
        "sparsity": sparsity or 0.0,
        "new": new,
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
        "bandwidth": timing.read_bandwidth(bandwidth_bytes),
    }
    rows = []
    for ours in (False, True) if sparsity is None else (True,):
        row = common | {"decoder": "alphaprune" if ours else "transformers"}
        row |= decoding.time_generation(made, ours, PROMPT, new)
        rows.append(row | (decoding.time_kernels(made, PROMPT, max(4, new // 2)) if ours else {}))
    return rows


def in_process(
    options: argparse.Namespace, sparsity: float | None, values: str, head: str | None = None
) -> list[dict[str, Any]]:
    """`measure` in a process of its own, whose memory is free again afterwards."""
    asked = {"model": options.model, "sparsity": sparsity, "values": values, "head": head, "new": options.new}
    asked["bandwidth_bytes"] = int(options.gigabytes * 1e9)
    asked["activations"] = options.activations if values == "int8" else None
    asking = [sys.executable, __file__, "--measure", json.dumps(asked)]
    done = subprocess.run(asking, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return json.loads(done.stdout)


def summary(pairs: list[tuple[list[dict[str, Any]], dict[str, Any]]]) -> dict[str, Any]:
    """The ratios of (rows of the dense process, row of the packed one)."""
    packed = pairs[0][1]
    by_decoder = [{row["decoder"]: row["tokens_per_second"] for row in dense} for dense, _ in pairs]
    rates = [row["tokens_per_second"] for _, row in pairs]
    ratios = [rate / dense["transformers"] for rate, dense in zip(rates, by_decoder, strict=True)]
    weights = [rate / dense["alphaprune"] for rate, dense in zip(rates, by_decoder, strict=True)]
    kept = ("machine", "threads", "torch", "model", "blocks", "values", "head", "activations", "sparsity")
    return {name: packed[name] for name in kept} | {
        "ratio": statistics.median(ratios),
        "ratio_of_weights": statistics.median(weights),
        "ratios": ratios,
        "pairs": len(pairs),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table; a summary is a sentence."""
    values = row["values"] + (f", x in {row['activations']}" if row["activations"] else "")
    values += f", head in {row['head']}" if row["head"] else ""
    if "ratio" in row:
        return (
            f"{row['model']} at {row['sparsity']:.0%}, {values}: {row['ratio']:.2f} times transformers' dense "
            f"tokens/s (median of {row['pairs']} pairs), {row['ratio_of_weights']:.2f} times our decoder's dense"
        )
    over = row.get("step_over_kernels")
    cells = [
        row["model"],
        f"{row['sparsity']:.2f}",
        values,
        row["decoder"],
        f"{row['tokens_per_second']:.2f}",
        f"{row['step_seconds']:.4f}",
        f"{over:.3f}" if over else "",
        f"{row['weight_bytes'] / 1e9:.2f}",
        f"{row['bandwidth'] / 1e9:.1f}",
    ]
    return "  ".join(f"{cell:>12}" for cell in cells)


def _no_bytes(options: argparse.Namespace) -> str | None:
    """Why nothing that is asked for rounds x, or None."""
    if options.device != "cpu" or options.dry_run:
        return "kernels of GPUs keep x as it is; leave it out"
    return None if "int8" in options.values.split(",") else "x is rounded beside int8 values only; give --values int8"


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name of alphaprune.decoding.MODELS (default llama2-7b; on a GPU three)")
    parser.add_argument("--sparsity", help="default 0.5,0.7,0.8; on a GPU 2:4, too")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; on a GPU see decode_gpu.py")
    parser.add_argument(
        "--values", default="bfloat16", help="of the packed weights: bfloat16, int8, or both by a comma"
    )
    heads = "of the output layer of packed models: none leaves it in bfloat16; both by a comma"
    parser.add_argument("--head", default="none", choices=("none", "int8", "none,int8"), help=heads)
    parser.add_argument("--activations", choices=("int8",), help="of x beside int8 values, where kernels can")
    parser.add_argument("--pairs", type=int, default=3, help="rounds of a dense process and the packed ones")
    parser.add_argument("--new", type=int, default=32, help="tokens timed in each")
    parser.add_argument("--gigabytes", type=float, default=1, help="read for the bandwidth")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--minutes", type=float, default=20, help="no load is begun after so many")
    gpu.add_argument("--sequences", type=_numbers, default=[1, 32], help="in a step, the most important number first")
    gpu.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt")
    gpu.add_argument("--how", default="auto", choices=("auto", "graphs", "compile", "eager"), help="steps run")
    gpu.add_argument(
        "--decoder", default="both", choices=("both", "alphaprune"), help="beside ours transformers' generate"
    )
    gpu.add_argument(
        "--ahead",
        type=_numbers,
        default=[0],
        metavar="MB",
        help="of the next product's weight that each has fetched meanwhile, with commas (default 0: none)",
    )
    gpu.add_argument("--dry-run", action="store_true", help="all of it with a tiny model on the CPU")
    parser.add_argument("--json", action="store_true", help="one JSON object per row instead of the table")
    parser.add_argument("--out", help="append the rows to this file, one JSON object each")
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.heads = [None if head == "none" else head for head in options.head.split(",")]
    if options.activations and (reason := _no_bytes(options)):
        print(f"decode.py: --activations {options.activations}: {reason}", file=sys.stderr)
        return 2
    if options.device != "cpu" or options.dry_run:
        import decode_gpu

        given = sys.argv[1:] if arguments is None else arguments
        options.command = command("bench/decode.py", list(given))
        return decode_gpu.main(options)
    options.model, options.sparsity = options.model or "llama2-7b", options.sparsity or "0.5,0.7,0.8"
    if options.measure:
        try:
            print(json.dumps(measure(**json.loads(options.measure))))
        except ValueError as error:  # no such model, or no memory for it
            print(f"decode.py: {error}", file=sys.stderr)
            return 2
        return 0

    def show(row: dict[str, Any]) -> None:
        print(json.dumps(row) if options.json else line(row), flush=True)
        if options.out:
            append(options.out, row)

    if not options.json:
        print("  ".join(f"{name:>12}" for name in COLUMNS))
    asked = itertools.product(options.values.split(","), map(float, options.sparsity.split(",")), options.heads)
    pairs: dict[tuple[str, float, str | None], list] = {one: [] for one in asked}
    for pair in range(options.pairs):
        dense = [row | {"pair": pair} for row in in_process(options, None, "bfloat16")]
        for row in dense:
            show(row)
        for (values, sparsity, head), found in pairs.items():
            packed = in_process(options, sparsity, values, head)[0] | {"pair": pair}
            show(packed)
            found.append((dense, packed))
    for found in pairs.values():
        show(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
