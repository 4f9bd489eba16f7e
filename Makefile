# One word a task; `make help` lists them. Everything goes into $(VENV), nothing into the system.
#
#   make demo                      from a fresh clone to a run that survives a kill
#   make test ARGS='-k planner'    ARGS goes to the tool behind the word
#
# Our package is installed as a wheel built from a clean copy of the source: a build/lib left from an older build
# would ship modules that are gone, and an editable install would hide a file that the wheel forgot.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Without a GPU a smaller build will do:
#   make venv TORCH='torch==2.13.0 --index-url URL-OF-PYTORCH-CPU-WHEELS'
TORCH ?= torch==2.13.0
ARGS ?=

BIN := $(VENV)/bin
PACKAGES := proto ckpt runtime launcher
METADATA := setup.py pyproject.toml README.md LICENSE
# Folders are prerequisites too, so that a deleted module leads to a new wheel; `proto/.`, because `proto` is a word.
SOURCES = $(shell find $(addsuffix /.,$(PACKAGES)) -name __pycache__ -prune -o -print) $(METADATA)
# -I maps our folder to the path that generated code imports itself by: no sed, no sys.path.
PROTOC = $(BIN)/python -m grpc_tools.protoc -Iholdfast/proto/gen=proto \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) \
	$(patsubst proto/%,holdfast/proto/gen/%,$(wildcard proto/*.proto))

# With the checkout on sys.path, ./proto would shadow the package of that name in every `python -m`.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME

.PHONY: help venv demo demo-neighbours test interop test-interop interop-smoke check format types proto links chaos bench \
	bench-checkpoints clean
.DEFAULT_GOAL := help

help:  ## list these words
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(VENV)/.installed  ## virtual environment with torch, our wheel and the tools (VENV=.venv)

demo: venv  ## train on four processes, kill some, compare with an undisturbed run
	$(BIN)/python examples/demo.py $(ARGS)

demo-neighbours: venv  ## killed stages rebuilt from their neighbours, no snapshots; loss.svg shows both curves
	$(BIN)/python examples/demo_neighbours.py $(ARGS)

# Tests of one process share the cores; those that start jobs run one at a time, or their deadlines would mean little.
# pytest exits with 5 where ARGS selects nothing of a part: that is no failure of the other.
test: venv  ## all tests
	$(BIN)/pytest -q -n 4 tests/unit tests/property tests/sim $(ARGS) || [ $$? = 5 ]
	$(BIN)/pytest -q tests/multiprocess $(ARGS) || [ $$? = 5 ]

# An environment of its own: DeepSpeed has no place among what our users install. It builds nothing but itself here.
interop:
	$(MAKE) venv VENV=$(VENV)/interop
	DS_BUILD_OPS=0 $(VENV)/interop/bin/pip install -q --no-build-isolation 'deepspeed==0.19.8'

test-interop: interop  ## tests against the real DeepSpeed and FSDP2, for some minutes (ARGS goes to pytest)
	HOLDFAST_INTEROP=1 $(VENV)/interop/bin/pytest -q tests/interop $(ARGS)

# The short half, in an environment that stands upon $(VENV): what is there already is not installed again.
interop-smoke: venv  ## each framework's own checkpoint through our format and back, two minutes (ARGS goes to pytest)
	$(BIN)/python -m venv $(VENV)/smoke
	$(BIN)/python -c "import sys; print(*[p for p in sys.path if p.endswith('site-packages')], sep='\n')" \
		> $$(echo $(VENV)/smoke/lib/python3*/site-packages)/base.pth
	DS_BUILD_OPS=0 $(VENV)/smoke/bin/pip install -q --no-build-isolation 'deepspeed==0.19.8'
	HOLDFAST_INTEROP=1 HOLDFAST_INTEROP_QUICK=1 $(VENV)/smoke/bin/python -m pytest -q tests/interop/test_smoke.py $(ARGS)

check: venv  ## lint, formatting, and whether generated code is current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/generated && mkdir -p build/generated
	$(call PROTOC,build/generated)
	@diff -r -x __init__.py -x __pycache__ build/generated/holdfast/proto/gen proto/gen \
		|| { echo "proto/gen is not what proto/*.proto says: make proto" >&2; exit 1; }

format: venv  ## lint fixes and formatting, in place
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# By path: asked for by name, mypy would take our wheel in $(VENV) and name its files in errors.
types: venv links  ## mypy, strict: packages and examples
	MYPYPATH=examples $(BIN)/mypy $(addprefix build/links/holdfast/,$(PACKAGES)) $(wildcard examples/*.py)

proto: venv links  ## generate proto/gen from proto/*.proto
	$(call PROTOC,build/links)

# build/links/holdfast/runtime -> ../../../runtime: the import package as type checkers and protoc want to see it.
links:  ## build/links: the four folders under their import name
	@mkdir -p build/links/holdfast
	@for package in $(PACKAGES); do \
		test -L build/links/holdfast/$$package || ln -s ../../../$$package build/links/holdfast/$$package; done

chaos: venv  ## train while processes are killed, stopped and hung at random (ARGS: options of holdfast chaos)
	$(BIN)/holdfast chaos $(ARGS) -- $(BIN)/holdfast run --nproc-per-node 4 examples/pretrain.py --steps 300

bench: venv  ## measure (ARGS: options of holdfast bench)
	$(BIN)/holdfast bench $(ARGS)

bench-checkpoints: interop  ## measure checkpoints against DeepSpeed's tools and others (ARGS goes to the script)
	$(VENV)/interop/bin/pip install -q huggingface_hub
	$(VENV)/interop/bin/holdfast bench checkpoints $(ARGS)

clean:  ## remove what these words made, but for the virtual environment and your runs
	rm -rf build dist demo-out loss.svg .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) examples tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "holdfast needs Python 3.11 or newer on the PATH, or: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q 'setuptools>=77'
	@touch $@

# One stamp for the wheel, its dependencies and the tools: the second call costs a stat of each source file. It is
# of the time of the copy: what is edited while pip works is newer, and not yet installed.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@touch $@.begun && copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT \
		&& cp -R $(PACKAGES) $(METADATA) "$$copy" && find "$$copy" -name __pycache__ -prune -exec rm -rf {} + \
		&& echo "$(BIN)/pip install holdfast[dev]" \
		&& $(BIN)/pip install -q --no-build-isolation "holdfast[dev] @ file://$$copy"
	@mv $@.begun $@
