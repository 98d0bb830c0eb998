# minivid: `make lab` opens the notebooks, `make test` runs every check. Each sets everything up by itself, once.
#
# Plain `torch` from PyPI is, on Linux, the CUDA build of several GB. The CPU build is enough for everything here:
# with uv, `export UV_TORCH_BACKEND=cpu` before the first `make`; with pip, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS
# to where PyTorch publishes its CPU wheels.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv)
WORKERS ?= 2

# Speed here comes from two processes of one thread each: two threads each fight for the two cores.
export OMP_NUM_THREADS := 1
export PYTHONHASHSEED := 0
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

.DEFAULT_GOAL := help
.PHONY: help lab test notebooks freeze clean

help:
	@echo "make lab        open JupyterLab on the first notebook"
	@echo "make test       run every check"
	@echo "make notebooks  run all notebooks again from notebooks/source and store their outputs"
	@echo "make clean      remove caches and builds (the environment stays: rm -r .venv)"

# The stamp makes every later call instant; a change of what is required installs again.
$(VENV)/ready: pyproject.toml constraints.txt
ifneq ($(UV),)
	test -x $(BIN)/python || $(UV) venv --quiet --seed --python 3.11 $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
endif
	touch $@

# Without a display (a server, a container) the address is printed instead of a browser being opened; root needs a flag.
LAB_FLAGS := $(if $(DISPLAY)$(WAYLAND_DISPLAY)$(filter Darwin,$(shell uname -s)),,--no-browser)
LAB_FLAGS += $(if $(filter 0,$(shell id -u)),--allow-root)
lab: $(VENV)/ready
	$(BIN)/jupyter lab $(LAB_FLAGS) --LabApp.default_url=/lab/tree/notebooks/00_start.ipynb $(LAB_ARGS)

# Whole files go to one worker (loadfile): the cells of a notebook share one kernel.
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with=tests/nbval.cfg --nbval-cell-timeout=120
test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests notebooks $(NBVAL) -n $(WORKERS) --dist loadfile $(TEST_ARGS)

# `make notebooks ONLY=papers/simvq` runs one.
notebooks: $(VENV)/ready
	$(BIN)/python notebooks/record.py $(ONLY)

freeze: $(VENV)/ready
	head -2 constraints.txt > constraints.new
	$(BIN)/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools --exclude wheel \
		| sed 's/+cpu//' >> constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find minivid tests notebooks -name __pycache__ -prune -exec rm -rf {} +
	find notebooks -name .ipynb_checkpoints -prune -exec rm -rf {} +
