"""One minute of bench/soak.py; `python bench/soak.py --minutes 10` is the same for longer."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import soak


@pytest.mark.slow
def test_a_minute_of_32_clients(capsys: pytest.CaptureFixture) -> None:
    status = soak.main(["--minutes", "1", "--clients", "32"])
    found = json.loads(capsys.readouterr().out)
    assert status == 0, found
    assert found["requests"] > 100 and found["left"] > 10 and found["refused"] > 10
