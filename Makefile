# Thin calls of the tools below; everything works from a bare clone.
#   make quickstart   train, resume, export and sample a small model (about six minutes after installation)
#   make quickstart-esft   find the experts that a task uses and train only those (about four minutes)
#   make quickstart-nexus  upcycle dense experts into one mixture and add one more (about four minutes)
#   make quickstart-self-moe  a model writes its own data and becomes a mixture of LoRA experts (about five minutes)
#   make test         lint and the tests
#   make faults       bring about every fault of a list, and show what held (at most 25 minutes)
#   make soak         a hundred random kills in a row over a small run; KILLS=10 for fewer
#   make bench        the benchmarks, one table of their results; ONLY="NAME ..." for some of them
# PYTHON chooses the interpreter, TORCH the build of torch; a GPU user might say
#   make test TORCH="torch==2.13.0 --index-url URL"     with the URL of a CUDA build, from the selector on pytorch.org

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin
SOURCES := $(wildcard csrc/*)
CODE := moe_dist tests configs setup.py $(wildcard csrc/*.py benchmarks)

.PHONY: install quickstart quickstart-esft quickstart-nexus quickstart-self-moe test lint format bench parity faults soak families clean
.DELETE_ON_ERROR:

install: .venv/.package

quickstart: .venv/.package
	$(BIN)/moe-dist run configs/quickstart.yaml

quickstart-esft: .venv/.package
	$(BIN)/moe-dist run configs/esft/quickstart.yaml

quickstart-nexus: .venv/.package
	$(BIN)/moe-dist run configs/nexus/quickstart.yaml

quickstart-self-moe: .venv/.package
	$(BIN)/moe-dist run configs/self_moe/quickstart.yaml

test: lint
	$(BIN)/python -m pytest -v -rs

lint: .venv/.package
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: .venv/.package
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: .venv/.package
	$(BIN)/python -m benchmarks $(ONLY)

parity: .venv/.package
	$(BIN)/python -m pytest -q tests/parity --all-cells

faults: .venv/.package
	$(BIN)/python -m tests.faults.report

soak: .venv/.package
	$(BIN)/python -m tests.faults.soak

families: .venv/.package
	$(BIN)/python -m tests.families

# torch comes first and by its exact pin: several packages, deepspeed among them, would pull another build.
.venv/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(TORCH)
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(BIN)/pip freeze | grep '^torch==' >> .venv/constraints.txt
	touch $@

# deepspeed is built from source with the torch that is there; the constraint keeps it from choosing another.
.venv/.dependencies: .venv/.torch
	$(BIN)/pip install -q -c .venv/constraints.txt setuptools wheel
	$(BIN)/pip install -q -c .venv/constraints.txt torch deepspeed
	touch $@

.venv/.package: .venv/.dependencies pyproject.toml setup.py $(SOURCES)
	$(BIN)/pip install -q -c .venv/constraints.txt --no-build-isolation -e '.[dev,plots,wandb]'
	touch $@

clean:
	rm -rf .venv build *.egg-info moe_dist/*.so moe_dist/*/*.so
