"""`bench/decode.py --device cuda`: models of random weights in graphs, packed and dense by turns of models.

python bench/decode.py --device cuda --minutes 20 --out bench/results/decode-h100.jsonl

One model at a time is made on the device, dense first, then packed at each sparsity, and is given the loads: steps of
1 and of 32 sequences, and a prompt of 2048 tokens. The rows that matter most come first; none is begun after
`--minutes`. What does not fit is a row with the reason. Rows, one JSON object each, seconds and bytes throughout:

machine, torch, cuda       where it ran
command                    that made the row
model, blocks, values      the shapes, and how many decoder blocks; dtype of weights and activations
sparsity, pattern          of the packed weights; 0 for dense
head                       int8 where the output layer has such values
load, sequences            decode or prefill, and how many sequences or tokens
decoder, how               alphaprune in graphs, compiled or eager, or a prompt by that kernel; transformers: its
                           generate, of the dense model
step_seconds, kernel_seconds, step_over_kernels      see alphaprune.stepping.time_steps; of a decode
prefill_seconds            of a prompt
tokens_per_second          of all sequences together
ahead                      of the next product's weight that each has fetched meanwhile, MB, if it was asked for
ratio                      tokens per second over those of our decoder with dense weights, of the same load
weight_bytes               of the whole model
allocated, peak            bytes taken after the load, and at most
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rows import append, kept

COLUMNS = ("model", "weights", "load", "decoder", "tokens/s", "step s", "over kernels", "ratio", "GB")
MODELS = "llama2-7b,llama3-8b,mistral-7b"
GPU_SPARSITY = "0.7,0.5,2:4,0.8"
LIBRARY = "nm_cusparselt"  # multiplies 2:4 prompts, too, and is not taken unasked


@dataclass(frozen=True)
class Case:
    """A model: dense without a sparsity."""

    model: str
    sparsity: float | None
    pattern: str = "unstructured"
    head: str | None = None

    def __str__(self) -> str:
        if self.sparsity is None:
            return "dense"
        weights = self.pattern if ":" in self.pattern else f"{self.sparsity:.0%}"
        return weights + (f", head in {self.head}" if self.head else "")


def cases(models: str, sparsities: str, heads: Sequence[str | None] = (None,)) -> list[Case]:
    """In the order in which they are measured: each model dense, then packed."""
    found = []
    for model in models.split(","):
        found.append(Case(model, None))
        for text in sparsities.split(","):
            keep, _, of = text.partition(":")
            kind = (1 - int(keep) / int(of), text) if of else (float(text), "unstructured")
            found += [Case(model, *kind, head) for head in heads]
    return found


class Run:
    """Measures cases and writes their rows."""

    def __init__(self, options: argparse.Namespace, write: Callable[[dict[str, Any]], None], end: float) -> None:
        self.options, self.write, self.end = options, write, end
        self.device = "cpu" if options.dry_run else options.device
        self.dense: dict[tuple[str, str, int], float] = {}

    def left(self) -> bool:
        return time.monotonic() < self.end

    def case(self, case: Case, common: dict[str, Any]) -> None:
        """All loads of one model; what does not fit is one row with the reason."""
        import torch

        from alphaprune import decoding, memory
        from alphaprune.pattern import parse

        dtype = torch.bfloat16
        row = common | {"model": case.model, "values": "bfloat16"}
        row |= {"sparsity": case.sparsity or 0.0, "pattern": case.pattern}
        row |= {"head": case.head} if case.head else {}
        print(f"{case.model}, {case}: {self.needs(case)}", file=sys.stderr, flush=True)
        try:
            how_stored = {"pattern": parse(case.pattern), "device": self.device, "rounded_head": case.head is not None}
            model = decoding.random_model(case.model, case.sparsity, dtype, **how_stored)
        except (ValueError, torch.OutOfMemoryError) as error:
            self.write(row | {"skipped": str(error).splitlines()[0]})
            return
        row |= {"blocks": model.config.num_hidden_layers}
        row |= {"weight_bytes": sum(tensor.nbytes for tensor in model.state_dict().values())}
        for load, sequences, decoder, how, ahead in self.loads(case):
            if not self.left():
                break
            made = row | {"load": load, "sequences": sequences, "decoder": decoder, "how": how}
            made |= {"ahead": ahead} if ahead else {}
            try:
                made |= self.measure(model, load, sequences, decoder, how, ahead)
            except (ValueError, torch.OutOfMemoryError) as error:
                self.write(made | {"skipped": str(error).splitlines()[0]})
                continue
            key = (case.model, load, sequences)
            if case.sparsity is None and decoder == "alphaprune":
                self.dense[key] = made["tokens_per_second"]
            base = self.dense.get(key)
            made["ratio"] = base and made["tokens_per_second"] / base
            self.write(made | {"allocated": memory.allocated(self.device), "peak": memory.peak(self.device)})
        del model
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def needs(self, case: Case) -> str:
        """What a case takes, and what is free, in words: said before anything is allocated."""
        import torch

        from alphaprune import decoding, memory
        from alphaprune.console import size

        config, free = decoding.config_of(case.model), memory.free(self.device)
        weights = decoding.nbytes(config, case.sparsity, torch.bfloat16, None)
        heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        most = max(max(self.options.sequences) * (16 + 3 * self.options.new), self.options.prefill)
        kv = 4 * config.num_hidden_layers * heads * dim * most
        there = "unknown" if free is None else size(free)
        return f"about {size(weights)} for weights and {size(kv)} for keys and values; free on {self.device}: {there}"

    def loads(self, case: Case) -> list[tuple[str, int, str, str, int]]:
        """(decode or prefill, sequences or tokens, decoder, how, MB ahead), the most important first."""
        (first, *others), prompt, how = self.options.sequences, self.options.prefill, self.options.how
        every = [0] if case.sparsity is None else self.options.ahead  # of dense products none is ours
        found = [("decode", first, "alphaprune", how, ahead) for ahead in every]
        found.append(("prefill", prompt, "alphaprune", how, 0))
        found += [("decode", count, "alphaprune", how, ahead) for count in others for ahead in every]
        if case.sparsity is None and self.options.decoder == "both":
            found += [("decode", count, "transformers", "generate", 0) for count in self.options.sequences]
        if ":" in case.pattern:
            # Last: nothing else is multiplied from there on.
            found.append(("prefill", prompt, "alphaprune", LIBRARY, 0))
        return found

    def measure(self, model: Any, load: str, sequences: int, decoder: str, how: str, ahead: int) -> dict[str, float]:
        from alphaprune import stepping

        new = self.options.new
        if how == LIBRARY:
            only(model, how, sequences)
        if load == "prefill":
            return stepping.time_prefill(model, sequences, repeats=max(3, new // 8))
        if decoder == "transformers":
            return stepping.time_theirs(model, sequences, 16, new)
        return stepping.time_steps(model, sequences, 16, new, how, 1_000_000 * ahead)


def only(model: Any, kernel: str, tokens: int) -> None:
    """Has every packed layer of the blocks multiply by this kernel; ValueError with the reason where it cannot.

    tokens: that it is to take.
    """
    from alphaprune.kernels import base
    from alphaprune.recovery_masks import packed_of

    for layer in packed_of(model).values():
        prepared, packed, there = layer.prepared(), layer.packed, base.on(kernel, layer.packed.device)
        if reason := there.supports(packed.shape, tokens, packed.dtype, packed.dtype) or prepared.fits(there):
            raise ValueError(f"kernel {kernel} cannot run: {reason}")
        prepared.keep_to(there)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    weights = kept(row)
    if "skipped" in row:
        return f"{row['model']}  {weights}  {row.get('load', '')}  not measured: {row['skipped']}"
    seconds, over, ratio = row.get("step_seconds") or row["prefill_seconds"], row.get("step_over_kernels"), row["ratio"]
    decoder = row["decoder"] + (f" +{row['ahead']} MB" if row.get("ahead") else "")
    cells = [row["model"], weights, f"{row['load']} {row['sequences']}", decoder]
    cells += [f"{row['tokens_per_second']:.1f}", f"{seconds:.5f}", f"{over:.3f}" if over else ""]
    cells += [f"{ratio:.2f}" if ratio else "", f"{row['weight_bytes'] / 1e9:.2f}"]
    return "  ".join(f"{cell:>12}" for cell in cells)


def main(options: argparse.Namespace) -> int:
    """Measures until everything is measured or the minutes are over; 2 and a sentence where there is no GPU."""
    end = time.monotonic() + 60 * options.minutes
    import torch

    from alphaprune import decoding, timing

    if not options.dry_run and not torch.cuda.is_available():
        print("decode.py: --device cuda, and torch sees no GPU; --dry-run goes through it on the CPU", file=sys.stderr)
        return 2
    try:
        models = options.model or ("tiny" if options.dry_run else MODELS)
        plan = cases(models, options.sparsity or GPU_SPARSITY, options.heads)
        for case in plan:
            decoding.config_of(case.model)
    except ValueError as error:
        print(f"decode.py: {error}", file=sys.stderr)
        return 2
    machine = timing.machine() if options.dry_run else torch.cuda.get_device_name(options.device)
    common = {"machine": machine, "torch": torch.__version__, "cuda": torch.version.cuda, "command": options.command}
    if options.dry_run:
        common["dry_run"] = True

    def write(row: dict[str, Any]) -> None:
        print(json.dumps(row) if options.json else line(row), flush=True)
        if options.out:
            append(options.out, row)

    if not options.json:
        print("  ".join(f"{name:>12}" for name in COLUMNS))
    run, done = Run(options, write, end), 0
    for case in plan:
        if not run.left():
            break
        run.case(case, common)
        done += 1
    print(f"{done} of {len(plan)} models", file=sys.stderr)
    return 0
