# Every command of this repository. `make` alone lists them.

PYTHON     ?= $(shell command -v python3.11 || command -v python3 || command -v python)
VENV       := .venv
CLIENT     := .venv-client
BIN        := $(VENV)/bin
PIP        := -m pip install -qq --no-compile --disable-pip-version-check
PYTEST     := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.plugins.suite_times
BASE_MODEL ?= starter
ARGS       ?=
KILLS      ?= 40
SEED       ?= 1
SETUP      ?= embedded
EXAMPLES   ?= 500

# What is imported is compiled once, not by each of the many processes: torch alone would take them four times as long.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install client demo serve test test-fast test-servers test-object-store test-cookbook test-properties \
	test-mutations chaos check lint types imports format proto clean bench-deterministic \
	bench-durability bench-recovery bench-state-io bench-usage-history

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ------------------------------------------------------------------------------------------------------------- set-up

install: $(VENV)/.installed ## make .venv with pinned dependencies and the command .venv/bin/piecework

client: $(CLIENT)/.installed ## make .venv-client, the environment of the scripts in examples/

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a minute or two; less when pip's cache is warm)"
	$(call make_venv,$(VENV))
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(CLIENT)/.installed: examples/requirements.txt
	@echo "installing the scripts' environment into $(CLIENT)"
	$(call make_venv,$(CLIENT))
	@$(CLIENT)/bin/python $(PIP) --no-deps -r examples/requirements.txt
	@touch $@

define make_venv
	@test -n "$(PYTHON)" || { echo "Python 3.11 is missing: install it, or say where it is: make PYTHON=/path/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "$(PYTHON) is not Python 3.11: install that, or say where it is: make PYTHON=/path/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(1) || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: apt-get install python3.11-venv)" >&2; \
		exit 1; }
endef

# ---------------------------------------------------------------------------------------------------------------- use

demo: install client ## start the service, fine-tune the default model with the tinker SDK, stop; BASE_MODEL=… takes another
	@$(BIN)/python examples/demo.py --base-model "$(BASE_MODEL)" $(ARGS)

serve: install ## run the embedded service in .piecework; ARGS="--port 9000"
	@$(BIN)/piecework serve $(ARGS)

# -------------------------------------------------------------------------------------------------------------- tests

test: install test-servers ## run all tests, on real servers and processes too
	@$(PYTEST) $(ARGS)

test-fast: install ## run the tests that need neither servers nor processes
	@$(PYTEST) -m "not servers and not processes" $(ARGS)

test-servers: install ## install the servers that tests start: PostgreSQL, RabbitMQ, an S3 server
	@bash tests/install_servers.sh

test-object-store: install ## run the object store's contract on any S3: URL=s3://KEY:SECRET@host:port/bucket
	@test -n "$(URL)" || { echo "say which store: make test-object-store URL=s3://KEY:SECRET@host:port/bucket?secure=false" >&2; exit 1; }
	@$(PYTEST) tests/contracts/test_object_store.py --object-store-url "$(URL)" $(ARGS)

test-cookbook: install ## run the unmodified tinker-cookbook's chat and arithmetic recipes against a service
	@$(BIN)/python tests/cookbook/run.py $(ARGS)

test-properties: install test-servers ## many histories of the journal, and the takeover model further than `make test`
	@PIECEWORK_TESTS_EXAMPLES=$(EXAMPLES) $(PYTEST) tests/properties $(ARGS)
	@$(BIN)/python -m tests.model

test-mutations: install ## take each guard away in a copy, and see its tests go red; ARGS="checksum lease" takes some
	@$(BIN)/python -m tests.mutations $(ARGS)

chaos: install test-servers ## kill, stop and cut off a real service while it trains: KILLS=200 SEED=1 SETUP=embedded
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --kills $(KILLS) --seed $(SEED) --setup $(SETUP) $(ARGS)

# --------------------------------------------------------------------------------------------------------- benchmarks

bench-deterministic: install ## price of the deterministic setting, and a cached prompt against a cold one; ARGS="--size small"
	@$(BIN)/python -m benchmarks.deterministic $(ARGS)

bench-durability: install ## price of journal and write-back: training against the same passes in memory; ARGS="--size small"
	@$(BIN)/python -m benchmarks.durability $(ARGS)

bench-recovery: install ## kill -9 of the worker until work goes on, with a fork server and without; ARGS="--kills 20"
	@$(BIN)/python -m benchmarks.recovery $(ARGS)

bench-state-io: install test-servers ## save and load of a run's state against the object store's own put and get
	@$(BIN)/python -m benchmarks.state_io $(ARGS)

bench-usage-history: install test-servers ## a day's usage from a million records and from ten million (20 GB): ARGS="--records 2000000"
	@$(BIN)/python -m benchmarks.usage_history $(ARGS)

# ------------------------------------------------------------------------------------------------------------- checks

check: lint types imports test ## what CI runs: ruff, mypy, import order, tests

lint: install ## ruff: rules and format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: install ## mypy, strict on the packages
	@$(BIN)/mypy

imports: install ## import order: api | worker, jobs, billing, storage; only worker imports torch
	@$(BIN)/lint-imports

format: install ## format the code and sort its imports
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

proto: install ## generate api/tinker_public_pb2.py from its .proto
	@$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. api/tinker_public.proto

clean: ## remove environments and caches; data directories stay
	rm -rf $(VENV) $(CLIENT) .venv-cookbook build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
