"""`alphaprune serve`: a model behind OpenAI's HTTP interface, until it is told to stop."""

import os
import sys
from pathlib import Path
from typing import Any

from alphaprune import model as models
from alphaprune.console import size

BACKLOG = 2048  # connections that wait to be accepted; uvicorn's own number


def run(model: str, **options: Any) -> None:
    _check(options)
    folder = models.resolve(model)
    from alphaprune import data, hf

    try:
        from alphaprune.serving import server
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'alphaprune[serve]'") from error

    sock = server.bind(options["host"], options["port"])  # before the model: a taken port is known at once
    with sock:
        import torch

        if options["threads"]:
            torch.set_num_threads(options["threads"])
        tokenizer = data.load_tokenizer(folder)
        if options["chat_template"]:
            tokenizer.chat_template = data.read_text(options["chat_template"])
        # On a GPU nothing is expanded, whatever a time table says: memory there is for keys and values.
        tokens = 1 if options["device"] == "cpu" else None
        loaded = hf.load(
            folder, options["dtype"], options["device"], tokens, not options["mapped"], options["activations"]
        )
        service = _service(loaded, tokenizer, options["name"] or folder.resolve().name, options)
        try:
            sock.listen(BACKLOG)  # whoever reads the address may connect at once
            host, port = sock.getsockname()[:2]
            print(_summary(service), f"http://{f'[{host}]' if ':' in host else host}:{port}", sep="\n", flush=True)
            server.run(service, sock, options["drain"])
        finally:
            service.engine.stop()


def _check(options: dict[str, Any]) -> None:
    least = {"max_running": 1, "queue": 0, "max_body": 1, "block_size": 4, "drain": 0, "threads": 1}
    for name, low in {**least, "kv_blocks": 1, "kv_memory": 0, "copies": 0}.items():
        if options[name] is not None and not options[name] >= low:
            raise ValueError(f"--{name.replace('_', '-')} {options[name]}: wanted {low} or more")
    if not 0 <= options["port"] < 2**16:
        raise ValueError(f"--port {options['port']}: wanted 0 to 65535; 0 takes a free one")
    if options["kv_blocks"] and options["kv_memory"]:
        raise ValueError("give one of --kv-blocks and --kv-memory")
    from alphaprune import devices

    devices.named(options["device"])
    template = options["chat_template"]
    if template and not Path(template).is_file():
        raise ValueError(f"{template}: there is no such file")


def _service(loaded: Any, tokenizer: Any, name: str, options: dict[str, Any]) -> Any:
    from alphaprune.generate import not_done
    from alphaprune.serving import copies, kv
    from alphaprune.serving.app import Limits, Service
    from alphaprune.serving.engine import Engine
    from alphaprune.serving.metrics import Metrics
    from alphaprune.serving.shortage import BATCH_TOKENS

    if ignored := not_done(loaded.generation_config):
        print(f"not done by serve, though generation_config asks for it: {', '.join(ignored)}", file=sys.stderr)
    running, block = options["max_running"], options["block_size"]
    blocks, memory = options["kv_blocks"], options["kv_memory"] and options["kv_memory"] * 1e9
    asked = blocks * kv.block_bytes(loaded.config, loaded.dtype, block) if blocks else memory
    calls = copies.calls_of(loaded, options["steps"] != "compile", options["engine"] != "transformers")
    room = kv.room_for_copies(loaded.device, asked)
    if options["copies"] is not None:
        room = min(room, options["copies"] * 1e9)
    copies.make(calls, max(running, BATCH_TOKENS), loaded.dtype, room)
    cache = kv.plan(loaded.config, loaded.dtype, running, block, blocks, memory, loaded.device)
    metrics = Metrics()
    engine = Engine(loaded, tokenizer, cache, running, metrics.tell, options["engine"], options["steps"])
    metrics.watch(engine)
    engine.start()
    key = options["api_key"] or os.environ.get("ALPHAPRUNE_API_KEY") or None
    limits = Limits(running, options["queue"], options["max_body"])
    return Service(engine, metrics, name, limits, kv.defaults(loaded.generation_config), key)


def _summary(service: Any) -> str:
    engine, limits = service.engine, service.limits
    key = "with an API key" if service.key else "without an API key"
    return (
        f"{service.name}: {size(engine.weight_bytes)} of weights on {engine.model.device}; {engine.kv}; batches by "
        f"{engine.batching.name}\n"
        f"{limits.running} requests at a time, {limits.queue} more wait; requests up to {size(limits.body)}; {key}"
    )
