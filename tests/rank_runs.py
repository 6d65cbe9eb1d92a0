"""Commands by several processes, forked so that imports cost nothing: a JSON line per run from a JSON list of them.

    python tests/rank_runs.py RUNS.json

A run is {"commands": one list of words per rank, "patch": {rank: word}}; its line holds the exit status of each rank
and what each said on stderr. "exit": this rank dies like a killed one when it comes to the weights; "code": it takes
itself for other sources; "text": it has another text in the same file.
"""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(rank: int, size: int, port: int, words: list[str], patch: str | None, said: str) -> int:
    process = os.fork()
    if process:
        return process
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from alphaprune import analysis, cli, data, ranks

    if patch == "exit":
        analysis._by_weights = lambda *_: os._exit(9)
    elif patch == "code":
        ranks.code = lambda: "other sources"
    elif patch == "text":
        read = data.read_text
        data.read_text = lambda file: read(file) + "x"
    os._exit(cli.main(words))


def run(commands: list[list[str]], patch: dict[str, str], folder: Path) -> dict[str, Any]:
    port, size = free_port(), len(commands)
    said = [folder / f"stderr-{rank}" for rank in range(size)]
    for file in said:
        file.write_text("")
    processes = [
        start(rank, size, port, words, patch.get(str(rank)), str(said[rank])) for rank, words in enumerate(commands)
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    return {"codes": codes, "stderr": [file.read_text() for file in said]}


def main() -> None:
    import torch
    import torch.distributed

    import alphaprune.commands.analyze
    import alphaprune.commands.prune
    import alphaprune.hf  # noqa: F401 - children take over what is imported

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for wanted in json.loads(Path(sys.argv[1]).read_text()):
            print(json.dumps(run(wanted["commands"], wanted.get("patch", {}), Path(folder))), flush=True)


if __name__ == "__main__":
    main()
