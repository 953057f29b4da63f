# Needs Python 3.11 or newer (another than python3: make PYTHON=python3.12 ...), git and make; installs the rest itself.
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := $(or $(TWOGATE_VENV),.venv)
VENV_DEV := $(or $(TWOGATE_VENV_DEV),.venv-dev)
COMPILE = "$(VENV_DEV)/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --no-header pyproject.toml

.PHONY: help serve test lint format types contract image check requirements install install-dev

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile | expand -t 22

serve: install  ## serve the default bundle on 127.0.0.1:8000 (PORT=9000 for another port, ARGS=... for more flags)
	@exec "$(VENV)/bin/python" -m cli serve $(if $(PORT),--port $(PORT)) $(ARGS)

test: install-dev  ## run the tests (ARGS="-k pixels" for some of them)
	OMP_NUM_THREADS=1 "$(VENV_DEV)/bin/python" -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: install-dev  ## style: ruff
	"$(VENV_DEV)/bin/ruff" check .
	"$(VENV_DEV)/bin/ruff" format --check .

format: install-dev  ## bring the code into the one format
	"$(VENV_DEV)/bin/ruff" check --fix .
	"$(VENV_DEV)/bin/ruff" format .

types: install-dev  ## mypy, strict
	"$(VENV_DEV)/bin/mypy"

contract: install-dev  ## who may import whom
	"$(VENV_DEV)/bin/lint-imports"

image:  ## build the CPU container image, named twogate, with docker, podman or buildah
	@docker/build.sh

check: lint types contract test  ## all of the above

requirements: install-dev  ## pin again what requirements/*.txt hold, after a change in pyproject.toml
	$(COMPILE) requirements/build.in --extra dev -o requirements/dev.txt
	$(COMPILE) requirements/build.in -c requirements/dev.txt --extra cpu --extra batch -o requirements/serve.txt
	$(COMPILE) -c requirements/dev.txt --extra cpu -o requirements/image.txt
	$(COMPILE) -c requirements/dev.txt --extra gpu -o requirements/image-gpu.txt
	$(COMPILE:pyproject.toml=requirements/container.in) -o requirements/container.txt

install:
	@$(PYTHON) requirements/install.py "$(VENV)" requirements/serve.txt

install-dev:
	@$(PYTHON) requirements/install.py "$(VENV_DEV)" requirements/dev.txt
