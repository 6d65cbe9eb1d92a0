"""A report from files of which a part is wrong, or that are not about the same: a sentence, never a traceback."""

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from test_report import evaluation, made_up, write_files

from alphaprune.report import inputs, make


def parts(found: object, at: tuple = ()) -> Iterator[tuple]:
    """Where the values of a file are: keys and places, of lists the first."""
    inside = found.items() if isinstance(found, dict) else list(enumerate(found))[:1] if isinstance(found, list) else ()
    for key, value in inside:
        yield (*at, key)
        yield from parts(value, (*at, key))


def test_no_part_that_is_wrong_ends_in_a_traceback(tmp_path: Path) -> None:
    """Every value of every kind of file left out, or another in its place: a page, or one sentence with its name."""
    files = write_files(tmp_path)
    made_up(1).save(tmp_path / "analysis.json")  # a short one
    generator, refused = random.Random(0), 0
    for file in files:
        whole = file.read_text()
        for at in parts(json.loads(whole)):
            found = json.loads(whole)
            *way, last = at
            inside = functools.reduce(lambda node, key: node[key], way, found)
            if generator.random() < 0.3:
                del inside[last]
            else:
                inside[last] = generator.choice([None, "text", -1, 0, 1e308, {}, []])
            (tmp_path / "changed.json").write_text(json.dumps(found))
            try:
                read = make.read([tmp_path / "changed.json"])
                make.write(read, make.sections(read), tmp_path / "r.html")
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error) and ("changed.json" in str(error) or "too large" in str(error))
    assert refused > 100


def test_perplexities_on_other_texts_are_not_drawn_together(tmp_path: Path) -> None:
    for name, text, length in (("a", "0" * 64, 64), ("b", "0" * 64, 64), ("c", "1" * 64, 64), ("d", "0" * 64, 32)):
        found = {**evaluation(name, 9.0), "data_sha256": text, "length": length}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    sections = make.sections(inputs.read([tmp_path / f"{name}.json" for name in "abcd"]))
    rows = {s.title: [row[0] for t in s.tables for row in t.rows] for s in sections if "Quality" in s.title}
    assert list(rows.values()) == [["a", "b"], ["c"], ["d"]] and all("text" in title for title in rows)
