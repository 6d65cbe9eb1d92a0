"""The command line: builds the parser before anything heavy is imported, and turns bad input into one line."""

import argparse
import importlib
import os
import shlex
import sys

from alphaprune import __version__
from alphaprune.console import COMMAND

ALONE = ("convert", "compress", "recover", "compare")  # that several processes would do over each other
SHAPES = "NxK[,NxK…] or llama2-7b, llama3-8b, mistral-7b"


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `command` to the name of a file in commands/ (eval: evaluate)."""
    top = argparse.ArgumentParser(
        prog="alphaprune",
        description="Prune language models by the heavy tails of their layers, and run the result sparse.",
    )
    top.add_argument("--version", action="version", version=f"alphaprune {__version__}")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _analysis_commands(sub)
    _prune_command(sub)
    _recover_command(sub)
    _compress_command(sub)
    _compare_command(sub)
    _use_commands(sub)
    _chat_command(sub)
    _convert_command(sub)
    _serve_command(sub)
    _measure_commands(sub)
    return top


def _analysis_commands(sub) -> None:
    analyze = sub.add_parser("analyze", help="spectrum and alpha of every prunable layer")
    analyze.add_argument("model", metavar="MODEL", help="folder of a checkpoint, a hub id, or timm:NAME")
    analyze.add_argument("--weights", metavar="FILE", help="of timm:NAME, safetensors or pt; nothing is downloaded")
    analyze.add_argument("--blocks", metavar="PATH", help="of timm:NAME, such as blocks or stages.*.blocks")
    analyze.add_argument("-o", "--output", metavar="FILE", default="analysis.json")
    analyze.add_argument("--fit", choices=("robust", "reference", "mid"), default="robust")
    analyze.add_argument("--device", default="auto", help="auto, cpu or cuda")
    analyze.add_argument("--solver", default="auto", choices=("auto", "float64"), help="float64: exact and slower")
    analyze.add_argument("--calibration", metavar="FILE", help="text for the columns of owl, dlp and lsa")
    _calibration_options(analyze)
    _memory_options(analyze)
    analyze.add_argument("--magnitudes", action="store_true", help="quantiles of weights, for global and lamp")
    analyze.add_argument("--farms", action="store_true", help="alpha of windows of one shape, for allocator farms")
    analyze.add_argument("--window", type=int, default=2000, help="with --farms: rows and columns of a window")
    analyze.add_argument("--windows", type=int, default=15, help="with --farms: positions along either side")
    analyze.add_argument("--json", action="store_true", help="print the analysis as JSON, too")

    plan = sub.add_parser("plan", help="how much to prune in which layer")
    plan.add_argument("analysis", metavar="ANALYSIS", help="what `alphaprune analyze` wrote")
    goal = plan.add_mutually_exclusive_group()
    goal.add_argument("--sparsity", type=float, help="zeros / weights of the prunable layers; N:M patterns imply it")
    goal.add_argument("--latency", type=float, metavar="SECONDS", help="the best model whose layers take no longer")
    goal.add_argument("--max-loss", type=float, metavar="LOSS", help="the fastest model that loses no more")
    _plan_options(plan)
    plan.add_argument("--curves", metavar="FILE", help="error curves of the blocks, for allocator measured")
    plan.add_argument("--times", metavar="FILE", help="time table, or auto: layers that would lose by it stay dense")
    plan.add_argument("--tokens", type=int, default=1, help="with --times: rows of x that the layers are to gain at")
    plan.add_argument("--values", choices=("int8",), help="with --times: the layers are to be packed so")
    plan.add_argument("--activations", choices=("int8",), help="with --values: and called so")
    plan.add_argument("-o", "--output", metavar="FILE", default="plan.json")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON, too")


def _calibration_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--samples", type=int, default=128, help="calibration windows")
    command.add_argument("--length", type=int, help="tokens per window (default 2048, or the context if shorter)")
    command.add_argument("--seed", type=int, default=0, help="which windows of the text")


def _memory_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--memory", type=float, metavar="GB", help="of hidden states (default: 1/4 of what is free)")
    command.add_argument("--spill", metavar="DIR", help="for a file of those beyond it (default: beside the output)")


def _activations_option(command: argparse.ArgumentParser) -> None:
    what = "beside int8 values, kernels of CPUs may round activations to 8 bits: faster; kernels of GPUs keep them"
    command.add_argument("--activations", choices=("int8",), help=what)


def _plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--allocator", default="alpha", help="uniform, ramp, alpha, …: a wrong name lists all")
    command.add_argument("--epsilon", default="auto", help="spread of the sparsities, 0…1, or auto")
    command.add_argument("--pattern", default="unstructured", help="unstructured, 2:4 (any N:M), or N:8: N per layer")
    command.add_argument("--per", choices=("block", "matrix"), default="block", help="what gets a sparsity of its own")
    command.add_argument("--min-sparsity", type=float, help="no layer is pruned less")
    command.add_argument("--max-sparsity", type=float, help="no layer is pruned more")


def _prune_command(sub) -> None:
    prune = sub.add_parser("prune", help="write a pruned checkpoint, packed")
    prune.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a hub id")
    prune.add_argument("-o", "--output", metavar="OUT", required=True, help="folder that does not exist yet")
    prune.add_argument("--sparsity", type=float, help="zeros / weights of the prunable layers")
    prune.add_argument("--plan", metavar="FILE", help="what `alphaprune plan` wrote; instead of --sparsity")
    prune.add_argument("--analysis", metavar="FILE", help="what `alphaprune analyze` wrote; else it is made first")
    _plan_options(prune)
    prune.add_argument("--method", help="wanda (default with --calibration), magnitude, ria, sparsegpt or alps")
    prune.add_argument("--select", choices=("row", "matrix"), help="compare weights within a row or the whole matrix")
    prune.add_argument("--calibration", metavar="FILE", help="text that the model should stay good at")
    _calibration_options(prune)
    _memory_options(prune)
    prune.add_argument("--refit", action="store_true", help="solve for the kept weights anew, after any method")
    prune.add_argument("--channel-permute", action="store_true", help="for N:M: order channels so that more is kept")
    prune.add_argument(
        "--prefix", choices=("pruned", "dense"), default="pruned", help="the blocks that a block's inputs come from"
    )
    prune.add_argument("--device", help="where blocks are calibrated and pruned: cpu, cuda or cuda:N")
    prune.add_argument("--values", choices=("int8",), help="round kept weights to 8 bits; without it they keep theirs")
    prune.add_argument("--group", type=int, choices=(128,), help="of int8 values: a scale per so many columns")
    prune.add_argument("--head", choices=("int8",), help="round the output layer to 8 bits, too; it is not pruned")
    prune.add_argument("--format", choices=("sbt", "dense"), default="sbt", help="packed, or dense with zeros")
    prune.add_argument("--json", action="store_true")


def _recover_command(sub) -> None:
    recover = sub.add_parser("recover", help="train the kept weights of a pruned model on text; its zeros stay")
    recover.add_argument("model", metavar="MODEL", help="pruned: packed, or dense with zeros")
    recover.add_argument("-o", "--output", metavar="OUT", required=True, help="folder that does not exist yet")
    recover.add_argument("--calibration", metavar="FILE", required=True, help="text to train on")
    recover.add_argument("--text", metavar="FILE", help="held-out text to judge by (default: the end of the other)")
    recover.add_argument("--windows", type=int, help="of the held-out text only the first so many")
    recover.add_argument("--length", type=int, help="tokens per window (default 2048, or the context if shorter)")
    recover.add_argument("--dense", metavar="MODEL", help="what was pruned, to say which share of the loss is won back")
    recover.add_argument(
        "--distil", action="store_true", help="learn the probabilities of the --dense model, not the text"
    )
    recover.add_argument("--rank", type=int, default=32, help="of the adapter on every prunable layer")
    recover.add_argument("--alpha", type=float, help="the update is alpha / rank times the product (default 2·rank)")
    recover.add_argument("--learning-rate", type=float, default=2e-3, help="its peak")
    long = recover.add_mutually_exclusive_group()
    long.add_argument("--steps", type=int, help="batches to train on (default 300)")
    long.add_argument("--epochs", type=float, help="or how often all of the text")
    recover.add_argument("--batch", type=int, default=8, help="windows per step")
    recover.add_argument("--at-once", type=int, metavar="N", help="of them so many go through the model together")
    recover.add_argument("--seed", type=int, default=0, help="of the adapters and of the order of the windows")
    recover.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="to train in"
    )
    recover.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    recover.add_argument("--values", choices=("int8",), help="round the result; int8 models are trained as floats then")
    recover.add_argument("--group", type=int, choices=(128,), help="with --values int8: a scale per so many columns")
    recover.add_argument("--format", choices=("sbt", "dense"), default="sbt", help="packed, or dense with zeros")
    recover.add_argument("--save-seconds", type=float, default=60, help="how often the state is saved, to go on from")
    recover.add_argument("--json", action="store_true")


def _compress_command(sub) -> None:
    command = sub.add_parser("compress", help="fewer bits, lower ranks, or heads and channels removed, as alpha says")
    command.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a hub id")
    command.add_argument("-o", "--output", metavar="OUT", help="folder that does not exist yet")
    goal = command.add_mutually_exclusive_group(required=True)
    goal.add_argument("--bits", type=float, metavar="BITS", help="of a weight of the prunable layers, on average")
    goal.add_argument(
        "--rank-ratio", type=float, metavar="RATIO", help="weights of two factors / weights of the layers"
    )
    goal.add_argument(
        "--structured", type=float, metavar="SHARE", help="of the weights, removed with heads and channels"
    )
    goal.add_argument("--plan", metavar="FILE", help="what --save-plan wrote")
    command.add_argument("--save-plan", metavar="FILE", help="write the plan, too; without -o nothing else is done")
    command.add_argument("--analysis", metavar="FILE", help="what `alphaprune analyze` wrote; else it is made first")
    command.add_argument("--allocator", default="alpha", help="uniform, ramp, alpha, …: a wrong name lists all")
    command.add_argument("--epsilon", default="auto", help="spread of what is removed, 0…1, or auto")
    command.add_argument("--per", choices=("block", "matrix"), default="block", help="what gets an amount of its own")
    command.add_argument("--choices", help="with --bits: those that there are, such as 4,8 (default 2,3,4,5,6,7,8)")
    command.add_argument("--scales", choices=("128", "row"), help="with --bits: columns that share one (default 128)")
    command.add_argument(
        "--parts", choices=("both", "heads", "channels"), help="with --structured: what goes (default channels)"
    )
    command.add_argument("--multiple", type=int, help="with --structured: channels are kept by so many (default 8)")
    command.add_argument("--score", choices=("wanda", "magnitude"), help="of channels (default: wanda with text)")
    command.add_argument("--refit", action="store_true", help="of channels: solve for the layers behind them anew")
    command.add_argument("--calibration", metavar="FILE", help="text that the model should stay good at")
    _calibration_options(command)
    command.add_argument("--device", help="where blocks are worked on: cpu, cuda or cuda:N")
    command.add_argument(
        "--format", choices=("packed", "dense"), default="packed", help="dense: old shapes, for others"
    )
    command.add_argument("--json", action="store_true")


def _compare_command(sub) -> None:
    compare = sub.add_parser("compare", help="every allocator with every pruner on held-out text; recommends a plan")
    compare.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a hub id")
    compare.add_argument("-o", "--output", metavar="DIR", required=True, help="for results; an interrupted run goes on")
    compare.add_argument("--sparsity", help="one or more, such as 0.5,0.7; N:M patterns imply it")
    compare.add_argument("--calibration", metavar="FILE", required=True, help="text that the model should stay good at")
    compare.add_argument("--text", metavar="FILE", required=True, help="held-out text that candidates are chosen by")
    compare.add_argument("--test", metavar="FILE", help="text that is read after the choice, to report on it")
    compare.add_argument("--allocators", default="all", help="names with commas, all, metrics (those of spectra)")
    compare.add_argument("--methods", help="names with commas (default wanda,sparsegpt)")
    compare.add_argument("--refit", action="store_true", help="solve for the kept weights anew, after every method")
    compare.add_argument("--epsilon", default="auto", help="one or more spreads, such as auto,0.1")
    compare.add_argument("--pattern", default="unstructured", help="unstructured, 2:4 (any N:M), or N:8: N per layer")
    _calibration_options(compare)
    _memory_options(compare)
    compare.add_argument("--windows", type=int, help="only the first so many of a held-out text")
    compare.add_argument("--device", default="auto", help="auto, cpu or cuda: where blocks are run and pruned")
    compare.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    compare.add_argument("--json", action="store_true")


def _use_commands(sub) -> None:
    evaluate = sub.add_parser("eval", help="perplexity and bits per byte on a text, or tasks of lm-eval")
    evaluate.add_argument("model", metavar="MODEL")
    text = evaluate.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="FILE", help="text, tokenised as it is")
    text.add_argument("--wikitext", metavar="FILE", help="WikiText raw, read in rows as Wanda's evaluation does")
    text.add_argument("--tasks", metavar="NAMES", help="of lm-eval, with commas; data that they need may be fetched")
    evaluate.add_argument("--length", type=int, help="tokens per window (default 2048, or the context if shorter)")
    evaluate.add_argument("--windows", type=int, help="of a text only the first so many")
    evaluate.add_argument("--task-dir", metavar="DIR", help="with --tasks: YAML files to look at first")
    evaluate.add_argument("--shots", type=int, metavar="N", help="with --tasks: examples before each question")
    evaluate.add_argument("--limit", type=int, metavar="N", help="with --tasks: documents of each at most")
    evaluate.add_argument("--batch", type=int, metavar="N", help="with --tasks: requests at a time (default 1)")
    _activations_option(evaluate)
    evaluate.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    evaluate.add_argument("--json", action="store_true")

    generate = sub.add_parser("generate", help="continue a prompt")
    generate.add_argument("model", metavar="MODEL")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new", type=int, default=64, help="tokens")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    generate.add_argument("--top-k", type=int, help="sample from so many of the likeliest (default 50; 0: from all)")
    generate.add_argument("--top-p", type=float, help="sample from the likeliest that have this probability together")
    generate.add_argument("--repetition-penalty", type=float, help="above 1: tokens that were there get less likely")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    generate.add_argument("--seed", type=int, default=0)
    _activations_option(generate)
    generate.add_argument("--json", action="store_true")


def _chat_command(sub) -> None:
    chat = sub.add_parser("chat", help="a conversation in the terminal; from a pipe, a message per line")
    chat.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a hub id")
    chat.add_argument("--system", metavar="TEXT", help="system message, kept when the oldest turns are dropped")
    chat.add_argument("--max-new", type=int, help="tokens of an answer (default: 512, or a quarter of the context)")
    chat.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    chat.add_argument("--seed", type=int, default=0)
    _activations_option(chat)
    chat.add_argument("--chat-template", metavar="FILE", help="Jinja template in place of the tokenizer's")
    chat.add_argument("--plain", action="store_true", help="a transcript of User and Assistant, for models without one")


def _convert_command(sub) -> None:
    convert = sub.add_parser("convert", help="a checkpoint of others → packed, packed → dense; a plan → a recipe")
    convert.add_argument("old", metavar="OLD", help="checkpoint with zeros, sparse-bitmask or packed; or plan.json")
    convert.add_argument("new", metavar="NEW", help="folder that does not exist yet; of a plan a YAML or JSON file")
    convert.add_argument("--format", choices=("sbt", "dense"), help="packed (default), or dense with zeros")
    convert.add_argument("--values", choices=("int8",), help="round kept weights to 8 bits; else they keep theirs")
    convert.add_argument("--group", type=int, choices=(128,), help="of int8 values: a scale per so many columns")
    convert.add_argument("--head", choices=("int8",), help="round the output layer to 8 bits, too")
    convert.add_argument(
        "--negative-zeros", choices=("keep", "drop"), help="whether -0 in dense layers is kept bit by bit (default)"
    )
    convert.add_argument("--modifier", choices=("wanda", "sparsegpt"), help="of a plan's recipe for llm-compressor")
    convert.add_argument("--json", action="store_true")


def _serve_command(sub) -> None:
    serve = sub.add_parser("serve", help="OpenAI-compatible HTTP: chat and text completions, streamed or whole")
    serve.add_argument("model", metavar="MODEL")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0: every network of this machine")
    serve.add_argument("--port", type=int, default=8000, help="0: a free one")
    serve.add_argument("--name", help="what clients call the model (default: the name of its folder)")
    serve.add_argument("--api-key", metavar="KEY", help="that clients must send; or ALPHAPRUNE_API_KEY, not in ps")
    serve.add_argument("--chat-template", metavar="FILE", help="Jinja, for models that come without one")
    serve.add_argument("--max-running", type=int, default=32, metavar="N", help="requests in the batch at a time")
    serve.add_argument("--queue", type=int, default=128, metavar="N", help="requests that may wait; more get 429")
    serve.add_argument("--max-body", type=int, default=2**20, metavar="BYTES", help="of one request; larger get 413")
    serve.add_argument("--kv-blocks", type=int, metavar="N", help="blocks of the KV cache")
    kv = "or its size (default: on a GPU all but 1; else 1, or 1/4 of what is free)"
    serve.add_argument("--kv-memory", type=float, metavar="GB", help=kv)
    kept = "of a GPU, for what kernels keep beside the packed weights; 0: the smallest server (default: what there is)"
    serve.add_argument("--copies", type=float, metavar="GB", help=kept)
    engines = ("auto", "alphaprune", "transformers")
    serve.add_argument("--engine", choices=engines, default="auto", help="whose batching; auto: ours, if it can")
    steps = ("auto", "graphs", "compile", "eager")
    serve.add_argument("--steps", choices=steps, default="auto", help="of our batching; auto: CUDA graphs on a GPU")
    serve.add_argument("--block-size", type=int, default=32, metavar="TOKENS", help="of one block")
    serve.add_argument("--drain", type=float, default=30, metavar="SECONDS", help="after SIGTERM, for running answers")
    serve.add_argument("--threads", type=int, help="of the kernels (default: torch's)")
    shared = "on the CPU, weights stay in their file's pages, which servers share, and decode slower"
    _activations_option(serve)
    serve.add_argument("--mapped", action="store_true", help=shared)
    serve.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    serve.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")


def _measure_commands(sub) -> None:
    bench = sub.add_parser("bench", help="time sparse against dense layers on this machine")
    bench.add_argument("model", metavar="MODEL", nargs="?", help="its layers and its decoding; or give --shape")
    bench.add_argument("--shape", help=SHAPES)
    bench.add_argument("--sparsity", default="0.5,0.6,0.7,0.8,0.9")
    bench.add_argument("--pattern", default="unstructured", help="unstructured or N:M")
    bench.add_argument("--tokens", default="1", help="rows of x, such as 1,4,16")
    bench.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    bench.add_argument("--values", choices=("int8",), help="of the packed weights; without it those of --dtype")
    _activations_option(bench)
    bench.add_argument("--kernel", help="time this kernel only; see `alphaprune info`")
    bench.add_argument("--decode", action="store_true", help="with --shape llama2-7b: whole models too, some minutes")
    bench.add_argument("--prompt", type=int, help="with MODEL: prompt tokens (default 128, or half the context)")
    bench.add_argument("--new", type=int, help="with MODEL: new tokens (default 32, or a quarter of the context)")
    bench.add_argument("--batch", type=int, help="with MODEL: prompts at the same time (default 1)")
    bench.add_argument("--time", type=float, metavar="SECONDS", help="with MODEL: of measuring each way (default 5)")
    bench.add_argument("--warmup", type=float, metavar="SECONDS", help="with MODEL: before it (default 1)")
    bench.add_argument("--per-layer", action="store_true", help="with MODEL: a row for every layer of it")
    bench.add_argument("--threads", type=int, help="of the kernels and torch (default: torch's)")
    bench.add_argument("--pin", choices=("core", "none"), default="none", help="core: a thread per core, bound to it")
    bench.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    bench.add_argument("--tune", action="store_true", help="measure the time table of the device, some 15 minutes")
    bench.add_argument("--quick", action="store_true", help="with --tune: fewer shapes and dtypes, some 3 minutes")
    bench.add_argument("--minutes", type=float, help="with --tune: as many weights as fit, the most telling first")
    bench.add_argument("-o", "--output", metavar="FILE", help="with --tune: instead of the user's cache folder")
    bench.add_argument("--json", action="store_true")

    info = sub.add_parser("info", help="what is in a checkpoint; without MODEL, what runs on this machine")
    info.add_argument("model", metavar="MODEL", nargs="?")
    info.add_argument("--tokens", type=int, default=1, help="rows of x to choose kernels for and predict times of")
    info.add_argument("--device", default="cpu", help="with MODEL: cpu, cuda or cuda:N to choose kernels for")
    _activations_option(info)
    info.add_argument("--bandwidth", action="store_true", help="without MODEL: measure how fast memory is read, too")
    info.add_argument("--json", action="store_true")

    report = sub.add_parser("report", help="one page with pictures of what the other commands wrote")
    report.add_argument("files", metavar="FILE", nargs="+", help="analyses, plans, curves, outputs of --json, folders")
    report.add_argument("-o", "--output", metavar="FILE", default="report.html")
    report.add_argument("--png", metavar="DIR", help="every picture as a PNG, too")
    report.add_argument("--json", action="store_true", help="print what was read and written as JSON")

    demo = sub.add_parser("demo", help="the whole flow on the embedded model, in a minute or two")
    demo.add_argument("-o", "--output", metavar="DIR", default="alphaprune-demo", help="for picture and results")
    demo.add_argument("--json", action="store_true")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 if all went well, 2 with one line on stderr for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = vars(parser().parse_args(arguments))
    command = options.pop("command")
    typed = COMMAND.set(shlex.join(["alphaprune", *arguments]))
    try:
        if command in ALONE and (size := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise ValueError(f"is done by one process, and {size} were started; leave out torchrun")
        if abs(options.get("seed") or 0) >= 2**40:  # some commands draw by a million seeds of their own for each
            raise ValueError(f"--seed {options['seed']}: wanted a whole number between -2**40 and 2**40")
        module = {"eval": "evaluate"}.get(command, command)
        importlib.import_module(f"alphaprune.commands.{module}").run(**options)
    except ValueError as error:
        sys.stdout.flush()
        print(f"alphaprune {command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `alphaprune info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk or a file that failed where nothing more can be said of it
        print(f"alphaprune {command}: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        from alphaprune import memory  # whose torch nobody waits for before there is something to say

        if (reason := memory.device_fault(error)) is None:
            raise
        print(f"alphaprune {command}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"alphaprune {command}: interrupted", file=sys.stderr)
        return 130
    finally:
        COMMAND.reset(typed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
