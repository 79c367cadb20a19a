# make quickstart   installs into .venv and runs the whole curriculum on the tiny model
# make test         lint, types, import rules and tests
# make soak         a hundred random kills of the smoke recipe, with a tally

PYTHON ?= python3
BIN := .venv/bin
STAMPS := .tools/stamps
NODE_TOOLS := .tools/node
NODE_PACKAGES := node-llama-cpp@3.22.1 gpt-tokenizer@4.0.0 typescript@6.0.3 eslint@10.15.0 typescript-eslint@8.73.0
TUNIX := .tools/tunix
TUNIX_PACKAGES := google-tunix==0.1.7 qwix==0.1.8 jax==0.10.2 flax==0.12.8
JOBS ?= 2

.PHONY: quickstart test lint types rules tests soak clean

quickstart: $(STAMPS)/installed
	$(BIN)/posttrain run quickstart

test: lint types rules tests

lint: $(STAMPS)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/test-installed
	$(BIN)/mypy

rules: $(STAMPS)/test-installed
	$(BIN)/lint-imports

tests: $(STAMPS)/test-installed $(STAMPS)/node $(STAMPS)/toolchains $(STAMPS)/chromium $(STAMPS)/postgresql $(STAMPS)/tunix
	OMP_NUM_THREADS=1 POSTTRAIN_TEST_TOOLS=$(CURDIR)/$(NODE_TOOLS) \
	POSTTRAIN_NODE_MODULES=$(CURDIR)/$(NODE_TOOLS)/node_modules \
	POSTTRAIN_TUNIX_PYTHON=$(CURDIR)/$(TUNIX)/bin/python $(BIN)/pytest -n $(JOBS) --dist worksteal

soak: $(STAMPS)/test-installed
	$(BIN)/python -m tests.soak

# Stamps name what was installed from; a second call finds them and installs nothing.
$(BIN)/python:
	$(PYTHON) -m venv .venv

$(STAMPS)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/test-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	@mkdir -p $(STAMPS) && touch $@ $(STAMPS)/installed

# From npm: llama.cpp for exported GGUF files and the o200k vocabulary for Harmony, both oracles; what checks
# TypeScript. Tests that need them skip,
# naming what is missing, when node cannot be had.
$(STAMPS)/node: Makefile
	@mkdir -p $(NODE_TOOLS) $(STAMPS)
	@command -v npm >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -y -q nodejs npm; } || true
	@if command -v npm >/dev/null; then \
		npm install --prefix $(NODE_TOOLS) --no-fund --no-audit --loglevel=error $(NODE_PACKAGES) && touch $@; \
	else echo "npm is missing: tests against llama.cpp and the o200k vocabulary will be skipped"; fi

# What checks Rust and Go. Each is left alone where it is there already; its tests skip, naming it, where it is not.
$(STAMPS)/toolchains: Makefile
	@mkdir -p $(STAMPS)
	@for pair in cargo-clippy:cargo cargo-clippy:rust-clippy go:golang-go; do \
		command -v "$${pair%%:*}" >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -y -q --no-install-recommends "$${pair##*:}"; } || \
		echo "$${pair%%:*} is missing: its tests will be skipped"; done
	@if command -v cargo >/dev/null && command -v go >/dev/null; then touch $@; fi

# Tunix wants an older safetensors than transformers does, so it has an environment of its own; without it its tests skip.
$(STAMPS)/tunix: constraints-tunix.txt Makefile
	@mkdir -p $(STAMPS)
	@$(PYTHON) -m venv $(TUNIX) && \
	$(TUNIX)/bin/python -m pip install --disable-pip-version-check -q -c constraints-tunix.txt $(TUNIX_PACKAGES) && \
	touch $@ || { rm -rf $(TUNIX); echo "Tunix cannot be installed: its tests will be skipped"; }

# A browser for the dashboard's tests, which skip, naming it, where it is not.
$(STAMPS)/chromium: Makefile
	@command -v chromium >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -y -q --no-install-recommends chromium; } || true
	@if command -v chromium >/dev/null; then mkdir -p $(STAMPS) && touch $@; \
		else echo "chromium is missing: its tests will be skipped"; fi

# PostgreSQL for the server's tests, which start one of their own and skip, naming it, where it is not.
$(STAMPS)/postgresql: Makefile
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -y -q --no-install-recommends postgresql; } || true
	@if ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null; then \
		mkdir -p $(STAMPS) && touch $@; else echo "postgresql is missing: its tests will be skipped"; fi

clean:
	rm -rf .venv .tools build dist *.egg-info
