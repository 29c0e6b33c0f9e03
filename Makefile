# reelmae's two commands: `make demo` and `make test`. Everything is installed into .venv from constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo
STAMP  := $(VENV)/.installed
DEMO   := --out $(OUT) $(if $(SRC),--src "$(SRC)") $(if $(QUICK),--quick)

.DEFAULT_GOAL := help
.PHONY: help install demo test check format clean

help:  ## this list
	@echo "make demo               raw bucket -> shards -> pretraining -> runs/demo/report.html (under 10 minutes on 2 cores)"
	@echo "make demo SRC=URL       the same with your own folder or bucket (s3://…)"
	@echo "make demo QUICK=1       the short form"
	@echo "make test               the tests"
	@echo "make check              format, lint, types"
	@echo "make format             rewrite the files in the house format"
	@echo "make install            only the environment, in $(VENV)"
	@echo "make clean              remove $(VENV), build/ and caches (never runs/)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "reelmae needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.11 …" >&2; exit 2; }
	@echo "installing into $(VENV): torch with CUDA and all else, some 7 GB, minutes on a fast line"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/reelmae demo $(DEMO)

test: $(STAMP)
	$(BIN)/python -m pytest -q $(PYTEST)

# mypy cannot follow setuptools' package-dir map: give it a tree of links that looks like the installed package
build/ns/reelmae:
	@mkdir -p $@
	@for part in pipeline model train tools; do ln -sfn ../../../$$part $@/$$part; done

check: $(STAMP) build/ns/reelmae
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
