"""`alphaprune info`: what is in a checkpoint, or what runs on this machine."""

from alphaprune.commands.shared import dump, origin
from alphaprune.console import table


def run(model: str | None, tokens: int, device: str, activations: str | None, bandwidth: bool, json: bool) -> None:
    from alphaprune import inspection

    if tokens < 1:
        raise ValueError(f"--tokens {tokens}: wanted a whole number from 1")
    if model and bandwidth:
        raise ValueError(f"--bandwidth is of the machine: leave out {model}")
    if activations and not model:
        raise ValueError("--activations is of a model with int8 values: name its directory, too")
    if model:
        found = inspection.describe_model(model, tokens, device, activations)
    else:
        found = inspection.describe_machine(bandwidth)
    if json:
        print(dump(origin("info", found["model"]) | found if model else origin("machine") | found))
    elif model:
        table(inspection.COLUMNS, inspection.model_rows(found))
        print(inspection.model_summary(found))
    else:
        table(["", ""], inspection.machine_rows(found), header=False)
