# Each target makes the virtual environment it needs, from exact pins, and again only when the pins change.
# Another Python: `make test PYTHON=python3.13`. More arguments for pytest: `make test ARGS="-k crash"`, one after the
# other: `make test ARGS="-n 0"`.

PYTHON ?= python3
ARGS ?=
BESIDE := --numprocesses auto --dist worksteal

VERSION := $(shell $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) and print("%d.%d" % sys.version_info[:2] + sys.abiflags)')
ifeq ($(VERSION),)
$(error taskpool needs Python 3.11 or newer, and `$(PYTHON)` is not one. Name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3)
endif
VENVS := .venv/$(VERSION)
bin = $(VENVS)/$(1)/bin

.DELETE_ON_ERROR:
.PRECIOUS: $(VENVS)/%/ready
.PHONY: demo test core lint format types docs docs-serve build bench bench-quick lock clean

demo: $(VENVS)/demo/ready  ## run the main job: parse the standard library, whatever the tasks do
	$(call bin,demo)/python examples/demo.py $(ARGS)

test: $(VENVS)/test/ready  ## the tests, side by side
	$(call bin,test)/python -m pytest $(BESIDE) $(ARGS)

core: $(VENVS)/test/ready  ## the quick tests of every promise
	$(call bin,test)/python -m pytest $(BESIDE) -m "core and not repeated" $(ARGS)

lint: $(VENVS)/lint/ready  ## style, format and import floors
	$(call bin,lint)/ruff check .
	$(call bin,lint)/ruff format --check .
	$(call bin,lint)/lint-imports

format: $(VENVS)/lint/ready  ## put the code in shape
	$(call bin,lint)/ruff check --fix .
	$(call bin,lint)/ruff format .

types: export PATH := $(CURDIR)/$(call bin,lint):$(PATH)
types: $(VENVS)/lint/ready  ## mypy, and pyright with the completeness of the public types
	mypy
	pyright
	pyright --verifytypes taskpool --ignoreexternal

docs: $(VENVS)/docs/ready  ## the site, into site/; a dead link or reference is an error
	$(call bin,docs)/zensical build --clean --strict

docs-serve: $(VENVS)/docs/ready  ## the site while writing, at localhost
	$(call bin,docs)/zensical serve

build: $(VENVS)/lint/ready  ## sdist and wheel, into dist/
	rm -rf dist
	$(call bin,lint)/python -m build --no-isolation

bench: $(VENVS)/bench/ready  ## every workload on every library, in under 20 minutes, into docs/benchmarks/
	$(call bin,bench)/python benchmarks/bench.py --output docs/benchmarks $(ARGS)

bench-quick: $(VENVS)/bench/ready  ## the workloads that say most, on the main peers
	$(call bin,bench)/python benchmarks/bench.py --quick $(ARGS)

lock: $(VENVS)/lock/ready  ## newest versions into requirements/
	for group in demo test lint docs bench lock; do \
	    $(call bin,lock)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --group $$group \
	        --custom-compile-command "make lock" --output-file requirements/$$group.txt pyproject.toml || exit; \
	done

clean:
	rm -rf .venv dist site .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(VENVS)/%/ready: requirements/%.txt
	$(PYTHON) -m venv --clear $(VENVS)/$*
	$(call bin,$*)/python -m pip install -qq --disable-pip-version-check --requirement requirements/$*.txt
	$(call bin,$*)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
