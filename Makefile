# make demo   install into .venv and draw the information-flow maps of the embedded models (demo/)
# make test   lint, types, import contracts and tests
# make test-hosts   the tests of the hooks with the oldest supported transformers, the one before the caches were renamed,
#             and the newest; HOSTS=5.15.0 names others
# make docs   build the documentation, with its API reference, into site/; a dead link or a bad docstring is an error
# make lint   ruff, mypy and the import contracts alone
# make bench  time and memory of the library beside the model's own
# make clean  remove .venv, demo/ and caches
#
# PYTHON=python3.12 make demo   uses another interpreter (>= 3.11)

PYTHON ?= python3
HOSTS ?= 5.15.0 5.23.0 5.24.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt

FLOOR := $(addprefix tests/test_,$(addsuffix .py,attach check conv_knockout decode edits hook_points newest rows softmax state_edits))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-hosts docs lint bench clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(BIN)/ssm-interp flow --out demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not gpu and not hub" --durations 10

test-hosts: $(HOSTS:%=$(VENV)/hosts/%/.tested)

# An environment with another transformers sees the rest of .venv through a .pth file.
$(VENV)/hosts/%/.tested: $(VENV)/.tools FORCE
	@test -e $(VENV)/hosts/$*/.installed || { echo "installing transformers $*"; \
	  $(BIN)/python -m venv --clear $(VENV)/hosts/$*; \
	  $(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	    > $$($(VENV)/hosts/$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/rest.pth; \
	  $(VENV)/hosts/$*/bin/python -m pip --quiet --disable-pip-version-check install transformers==$*; \
	  touch $(VENV)/hosts/$*/.installed; }
	OMP_NUM_THREADS=1 $(VENV)/hosts/$*/bin/python -m pytest -q -n auto $(FLOOR)

FORCE:

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "open site/index.html"

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.flow --profile
	$(BIN)/python -m benchmarks.decomposition
	$(BIN)/python -m benchmarks.edges

clean:
	rm -rf $(VENV) demo site dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: an interpreter, torch and the build backend in it, the package (editable), the test tools.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: ssm-interp needs Python >= 3.11, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1 || true); say which one to use, as in: make PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "installing torch (the largest part)"
	@$(PIP) torch hatchling editables
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "installing ssm-interp"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	@echo "installing the test tools"
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@echo "installing what builds the documentation"
	@$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@
