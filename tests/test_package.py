"""Import is cheap and does nothing; public names are there."""

import subprocess
import sys

import pytest


def python(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_import_brings_neither_torch_nor_transformers() -> None:
    code = "import sys, alphaprune, alphaprune.cli; alphaprune.cli.parser()"
    heavy = python(
        f"{code}; print([m for m in ('torch', 'transformers', 'numpy', 'rich', 'tqdm') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_public_names_exist() -> None:
    import alphaprune

    for name in alphaprune.__all__:
        assert getattr(alphaprune, name) is not None
        assert name in dir(alphaprune)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        alphaprune.nothing  # noqa: B018


@pytest.mark.parametrize(
    "order", ["import alphaprune, transformers", "import transformers.quantizers.auto, alphaprune"]
)
def test_the_quantizer_is_registered_in_either_order(order: str) -> None:
    code = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('alphaprune' in m)"
    assert python(f"{order}; {code}").strip() == "True"


def test_the_hook_steps_aside_once_it_has_run() -> None:
    code = "import alphaprune, sys; import transformers.quantizers.auto as a"
    names = "any(type(f).__name__ == '_RegisterAfterImport' for f in sys.meta_path)"
    assert python(f"{code}; print({names}, type(a.__loader__).__name__)").split() == ["False", "SourceFileLoader"]
