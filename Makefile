# The README's two commands are `make train` and `make test`. Every target sets up .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
SCENES ?= data/demo
STAMP := $(VENV)/.installed
FFCV := $(VENV)/.ffcv
READY := $(STAMP) $(FFCV)

.PHONY: train test lint bench study install constraints clean

install: $(READY)

$(VENV)/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "mvp_fast needs Python 3.11 to 3.13; $(PYTHON) is another version. Say which one to use: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 4; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

# uv resolves and installs some 80 packages (torch brings CUDA's libraries: about 6 GB) an order of magnitude faster than pip.
$(STAMP): pyproject.toml constraints.txt $(VENV)/bin/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Left out, with a line that says so, where it can't be compiled: all but the loader `ffcv` works without it.
$(FFCV): $(STAMP) .ci/ffcv .ci/overrides.txt
	@if .ci/ffcv $(BIN); then touch $@; else [ $$? = 3 ] || echo "FFCV does not compile here and is left out (see above)"; fi

train: $(READY)
	$(BIN)/mvp-fast data scenes --out $(SCENES) --images 1024 --profile imagenet
	$(BIN)/mvp-fast data index $(SCENES)
	$(BIN)/mvp-fast train --config configs/demo.yaml --data.index $(SCENES) --run.dir $(RUN) --resume auto
	$(BIN)/mvp-fast export $(RUN) --format timm

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file's tests share what they train, so they stay in one process; each process has one thread, and a core of its own.
test: lint
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest tests -n logical --maxprocesses 4 --dist loadfile

bench: $(READY)
	$(BIN)/pytest benchmarks

# What the students of different teachers are worth: on a GPU where there is one, else in a small form within an hour.
study: $(READY)
	$(BIN)/mvp-fast study --page docs/study.md

# torch 2.11 is the oldest that is supported, and what the pins hold to. FFCV tells its dependencies only where it could
# be compiled.
constraints: $(VENV)/bin/uv $(FFCV)
	printf 'torch==2.11.0\ntorchvision==0.26.0\ntriton==3.6.0\n' > $(VENV)/pins.txt
	echo opencv-python-headless > $(VENV)/headless.in
	PKG_CONFIG_PATH="$(CURDIR)/$(VENV)/opencv:$$PKG_CONFIG_PATH" $(BIN)/uv pip compile --quiet --universal --upgrade \
	  --python-version 3.11 --no-annotate --no-header --constraint $(VENV)/pins.txt --override .ci/overrides.txt --extra dev --extra ffcv \
	  --output-file constraints.txt pyproject.toml $(VENV)/headless.in

clean:
	rm -rf $(VENV) build *.egg-info
