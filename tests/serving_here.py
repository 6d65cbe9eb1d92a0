"""What tests of the server need; whoever imports it where that is missing is skipped, with the reason."""

import pytest

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed: pip install openai")
try:
    import alphaprune.serving.app  # noqa: F401
except (ImportError, ValueError) as error:
    pytest.skip(f"the server does not run here: {error}", allow_module_level=True)
