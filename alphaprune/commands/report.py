"""`alphaprune report`: files of other commands → one page, and PNGs."""

from pathlib import Path

from alphaprune.commands.shared import check_file, dump
from alphaprune.console import bar, size


def run(files: list[str], output: str, png: str | None, json: bool) -> None:
    from alphaprune.report import make
    from alphaprune.report import png as pictures

    check_file(output)
    if png is not None:
        pictures.check()
        if Path(png).is_file():
            raise ValueError(f"--png {png}: is a file; name a folder")
    found = make.read(files)
    sections = make.sections(found)
    make.write(found, sections, output)
    drawn = []
    if png is not None:
        with bar(len(pictures.pictures(sections)), "png", "picture") as tick:
            for file in pictures.write(sections, Path(png)):
                drawn.append(str(file))
                tick(file.name)
    if json:
        about = [{"file": one.file, "kind": one.kind} for one in found.found]
        print(dump({"report": output, "bytes": Path(output).stat().st_size, "inputs": about, "pictures": drawn}))
        return
    kinds = ", ".join(dict.fromkeys(one.kind for one in found.found))
    print(f"{output}: {size(Path(output).stat().st_size)}, from {len(found.found)} files ({kinds})")
    if png is not None:
        print(f"{png}: {len(drawn)} pictures")
