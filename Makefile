# Two commands for a newcomer: `make merged_model` and `make test`. Both make their own environment in .venv first.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# Where torch comes from, if not from pip's own index: see "Installing" in the README.
TORCH_INDEX ?=
CONFIG ?=
# Tests at a time: each computes on one core. One more than two cores have use for: some wait for a cluster or a server.
WORKERS ?= 3
# Which tests: files, folders or names, as pytest takes them.
TESTS ?=
BIN := $(VENV)/bin
SNAKEMAKE := $(BIN)/snakemake --cores 1
PACKAGE := workflow_scripts/adder
# Those that are installed here. A name that only says where to find another one, as pyenv's do, doesn't count.
PYTHONS = $(foreach minor,11 12 13,$(shell python3.$(minor) -c 'print("3.$(minor)")' 2> /dev/null))

# Any of these serves the tests of the pages.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
# A Slurm for tests/slurm, as Debian has it.
SLURM := slurm-wlm munge slurmdbd mariadb-server
APT := DEBIAN_FRONTEND=noninteractive timeout 600 apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20

# Snakemake ends in a traceback under a user without a name (containers, many clusters) or without a home to write to.
export LOGNAME := $(or $(LOGNAME),$(shell id -un 2> /dev/null || echo user-$$(id -u)))
ifneq ($(shell mkdir -p "$$HOME" 2> /dev/null && test -w "$$HOME" && echo yes),yes)
export HOME := $(CURDIR)/.cache/home
endif

.PHONY: merged_model report compare all test pytest test-avx2 test-all-pythons browser slurm lint settings docs prune lock clean

# The workflow checks the settings; Snakemake reads a file that is named before that, and says less of what is wrong.
merged_model report compare all: $(VENV)/.ready
	$(if $(CONFIG),@$(BIN)/adder check --read $(CONFIG))
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

$(VENV)/.ready-dev: envs/requirements-dev.lock envs/triton.lock $(VENV)/.ready
	@$(BIN)/pip install --quiet --disable-pip-version-check -r $<
	@$(BIN)/python -c 'import triton' 2> /dev/null || \
		$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r envs/triton.lock
	@touch $@

test: lint pytest

# Measures how much of the package the tests run; tests/conftest.py says it at the end, .cache/coverage.json has the
# lines. Left out is what torch compiles: there the measuring is in its way on Python 3.11. What runs in processes that
# tests start isn't counted.
pytest: $(VENV)/.ready-dev browser slurm
	@mkdir -p .cache
	$(BIN)/python -m slipcover --source $(PACKAGE) --omit $(PACKAGE)/kernels/packed_attention.py \
		--json --out .cache/coverage.json -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

# As on a machine that has AVX2 alone.
test-avx2:
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(MAKE) pytest

# With another Python, in an environment of its own: `make test-python3.13`.
test-python3.%:
	$(MAKE) pytest PYTHON=python3.$* VENV=.venv-python3.$*

test-all-pythons:
	@echo "Pythons here: $(PYTHONS)"
	set -e; for python in $(PYTHONS); do $(MAKE) test-python$$python; done

# Where there is none and Debian's can't be had, those tests are skipped; nothing else needs it.
browser:
	@command -v $(BROWSERS) > /dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "Installing Chromium for the tests of the pages, once"; \
		{ $(APT) install -y --no-install-recommends chromium || \
		  { $(APT) update && $(APT) install -y --no-install-recommends chromium; }; } > /dev/null 2>&1 || \
		echo "It can't be had here: those tests will be skipped"; \
	fi

# Likewise. The tests start it by themselves and end it; until then nothing of it runs.
slurm:
	@PATH=$$PATH:/usr/sbin; command -v slurmdbd > /dev/null && command -v mariadbd > /dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "Installing Slurm for the tests of the cluster, once"; \
		{ $(APT) install -y --no-install-recommends $(SLURM) || \
		  { $(APT) update && $(APT) install -y --no-install-recommends $(SLURM); }; } > /dev/null 2>&1 || \
		echo "It can't be had here: those tests will be skipped"; \
	fi

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules workflow
	$(BIN)/snakemake --lint
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Writes config/schema.json, the tables in config/README.md and what profiles/slurm asks for from the declarations.
settings: $(VENV)/.ready
	$(BIN)/adder document

# The documentation as a site, in site/.
docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

# Lists stage folders that no configured run needs, and removes them when told to. CONFIG="a.yaml b.yaml" names more.
prune: $(VENV)/.ready
	$(BIN)/adder prune $(CONFIG)

# Resolves envs/*.in anew; run it in an empty VENV.
lock:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r envs/requirements.in
	$(BIN)/pip freeze --exclude pip --exclude setuptools --exclude adder-finetune | sed 's/+cpu//' > envs/requirements.lock
	$(BIN)/pip install --quiet -r envs/requirements-dev.in
	$(BIN)/pip freeze --exclude pip --exclude setuptools --exclude adder-finetune | sed 's/+cpu//' > envs/requirements-dev.lock

clean:
	rm -rf $(VENV) .venv-python3.* .cache site .pytest_cache .ruff_cache .hypothesis
