# The README's two commands are `make train` and `make test`. Every target sets up .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
SCENES ?= data/demo
STAMP := $(VENV)/.installed

.PHONY: train test lint bench install constraints clean

install: $(STAMP)

$(VENV)/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "mvp_fast needs Python 3.11 to 3.13; $(PYTHON) is another version. Say which one to use: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 4; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

# uv resolves and installs some 80 packages (torch brings CUDA's libraries: about 6 GB) an order of magnitude faster than pip.
$(STAMP): pyproject.toml constraints.txt $(VENV)/bin/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(STAMP)
	$(BIN)/mvp-fast data scenes --out $(SCENES) --images 1024 --profile imagenet
	$(BIN)/mvp-fast data index $(SCENES)
	$(BIN)/mvp-fast train --config configs/demo.yaml --data.index $(SCENES) --run.dir $(RUN) --resume auto
	$(BIN)/mvp-fast export $(RUN) --format timm

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest tests

bench: $(STAMP)
	$(BIN)/pytest benchmarks

# torch 2.11 is the oldest that is supported, and what the pins hold to.
constraints: $(VENV)/bin/uv
	printf 'torch==2.11.0\ntorchvision==0.26.0\ntriton==3.6.0\n' > $(VENV)/pins.txt
	$(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.11 --no-annotate --no-header \
	  --constraint $(VENV)/pins.txt --extra dev --output-file constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) build *.egg-info
