# Two commands for a newcomer: `make merged_model` and `make test`. Both make their own environment in .venv first.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# Where torch comes from, if not from pip's own index: see "Installing" in the README.
TORCH_INDEX ?=
CONFIG ?=
# Tests at a time: each computes on one core.
WORKERS ?= 2
BIN := $(VENV)/bin
SNAKEMAKE := $(BIN)/snakemake --cores 1

# Any of these serves the tests of the pages.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
APT := DEBIAN_FRONTEND=noninteractive timeout 600 apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20

.PHONY: merged_model report all test browser lint settings prune lock clean

merged_model report all: $(VENV)/.ready
	@$(BIN)/adder check --quiet $(CONFIG)
	$(SNAKEMAKE) $@ $(if $(CONFIG),--configfile $(CONFIG))

# Adder itself is installed as it stands here, so an edit needs no new installation.
$(VENV)/.ready: pyproject.toml $(VENV)/.libraries
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.libraries: envs/requirements.lock
	@echo "Installing into $(VENV): two minutes or so, once"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Adder needs Python 3.11 or later; this is {sys.version}")'
	@$(PYTHON) -m venv $(VENV)
	@$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --disable-pip-version-check --index-url $(TORCH_INDEX) "$$(grep '^torch==' $<)")
	@$(BIN)/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/.ready-dev: envs/requirements-dev.lock $(VENV)/.ready
	@$(BIN)/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test: lint browser
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# Where there is none and Debian's can't be had, those tests are skipped; nothing else needs it.
browser:
	@command -v $(BROWSERS) > /dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "Installing Chromium for the tests of the pages, once"; \
		{ $(APT) install -y --no-install-recommends chromium || \
		  { $(APT) update && $(APT) install -y --no-install-recommends chromium; }; } > /dev/null 2>&1 || \
		echo "It can't be had here: those tests will be skipped"; \
	fi

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint

# Writes config/schema.json, the tables in config/README.md and what profiles/slurm asks for from the declarations.
settings: $(VENV)/.ready
	$(BIN)/adder document

# Lists stage folders that no configured run needs, and removes them when told to. CONFIG="a.yaml b.yaml" names more.
prune: $(VENV)/.ready
	$(BIN)/adder prune $(CONFIG)

# Resolves envs/*.in anew; run it in an empty VENV.
lock:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r envs/requirements.in
	$(BIN)/pip freeze --exclude pip --exclude setuptools | sed 's/+cpu//' > envs/requirements.lock
	$(BIN)/pip install --quiet -r envs/requirements-dev.in
	$(BIN)/pip freeze --exclude pip --exclude setuptools | sed 's/+cpu//' > envs/requirements-dev.lock

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis
