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


def test_help_brings_neither() -> None:
    code = "import runpy, sys; sys.argv = ['alphaprune', '--help']"
    modules = "[m for m in ('torch', 'transformers', 'numpy', 'rich', 'tqdm') if m in sys.modules]"
    show = f"try:\n    runpy.run_module('alphaprune', run_name='__main__')\nexcept SystemExit:\n    print({modules})"
    found = python(f"{code}\n{show}")
    assert "usage: alphaprune" in found and found.splitlines()[-1] == "[]"


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


@pytest.mark.parametrize(
    ("code", "waiting"),
    [
        ("pass", ["peft.tuners.lora.model", "transformers.quantizers.auto"]),
        ("import transformers.quantizers.auto", ["peft.tuners.lora.model"]),
    ],
)
def test_a_hook_steps_aside_once_it_has_run(code: str, waiting: list[str]) -> None:
    names = "sorted(f.watched for f in sys.meta_path if type(f).__name__ == '_ImportAfter')"
    loaders = "{type(m.__loader__).__name__ for n, m in sys.modules.items() if n == 'transformers.quantizers.auto'}"
    found = python(f"import alphaprune, sys; {code}; print({names}, {loaders})")
    assert found.strip() == f"{waiting} " + ("set()" if code == "pass" else "{'SourceFileLoader'}")
