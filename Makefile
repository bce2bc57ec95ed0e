.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv

JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# uv does not read pip's settings, so the index and the certificates that pip was told to use are handed on.
pip_setting = $$($(BIN)/python -m pip config list | sed -n "s/^[^=]*\.$(1)='\(.*\)'$$/\1/p" | head -n 1)

uv_settings = index=$(call pip_setting,index-url) && cert=$(call pip_setting,cert) \
		&& { [ -z "$$index" ] || export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$index}"; } \
		&& { [ -z "$$cert" ] || export SSL_CERT_FILE="$${SSL_CERT_FILE:-$$cert}"; }

# What must hold with the lowest versions too: all promises, all that is saved, all that is exported.
# (setuptools: torch.compile of the oldest torch imports it, and uv puts none into an environment.)
LOWEST_TESTS ?= tests/promises tests/saving tests/exporting

.PHONY: help demo test lowest fuzz check bench coverage thirdparty venv clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

demo: $(STAMP) ## Install into .venv and run the whole story offline
	$(BIN)/armour-surgery demo

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest -n auto --dist worksteal

lowest: $(STAMP) ## Run the promises with the lowest declared versions, in a second environment
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-lowest
	$(uv_settings) && $(BIN)/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct \
		-e ".[demo,openvino]" --group dev "setuptools>=70"
	.venv-lowest/bin/python -m pytest -n auto --dist worksteal $(LOWEST_TESTS)

fuzz: $(STAMP) ## Damage saved folders, and make up attentions, in many ways, other ones each time
	ARMOUR_TEST_EXAMPLES=$${ARMOUR_TEST_EXAMPLES:-2000} $(BIN)/python -m pytest -n auto tests/saving/test_fuzz.py
	ARMOUR_TEST_EXAMPLES=$${ARMOUR_TEST_EXAMPLES:-200} $(BIN)/python -m pytest tests/promises/test_generated_attentions.py

check: $(STAMP) ## Check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP) ## Measure how much faster converted models are
	$(BIN)/python benchmarks/conversion_speed.py

coverage: $(STAMP) ## Convert every architecture of the three libraries, and write docs/coverage.md
	$(BIN)/armour-surgery coverage --jobs $(JOBS) --markdown docs/coverage.md

thirdparty: $(STAMP) ## The same for models of other packages, in a second environment: docs/coverage-third-party.md
	$(BIN)/python -m venv --without-pip .venv-third-party
	$(BIN)/python -c 'import site; print(*site.getsitepackages(), sep="\n")' \
		> $$(.venv-third-party/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth
	$(BIN)/python benchmarks/third_party_hosts.py | xargs -d '\n' -n 1 $(BIN)/python -m pip --python .venv-third-party install --quiet
	.venv-third-party/bin/python benchmarks/third_party_coverage.py --jobs $(JOBS) --markdown docs/coverage-third-party.md

venv: $(STAMP) ## Create .venv with everything that development needs

clean: ## Remove .venv, caches and build outputs
	rm -rf $(VENV) .venv-third-party .venv-lowest build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@echo "==> Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV)
	@echo "==> Installing armour-surgery and its development tools (PyTorch is large: minutes on the first run)"
	@{ $(BIN)/python -m pip install --quiet uv \
		&& $(uv_settings) \
		&& $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -e ".[demo,openvino]" --group dev; \
	} || { echo "==> uv could not do it; using pip" \
		&& $(BIN)/python -m pip install --upgrade "pip>=25.1" \
		&& $(BIN)/python -m pip install -e ".[demo,openvino]" --group dev; }
	@touch $@
	@echo "==> Ready: $(BIN)/armour-surgery --help"
