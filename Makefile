# Everything runs inside .venv, which `make setup` builds once; a second run of any target starts at once.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Keeps the current folder off sys.path, where kernels/ would shadow the PyPI package of that name.
export PYTHONSAFEPATH := 1

.PHONY: setup test demo lint format bench clean

setup: $(VENV)/.built

$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt torch numpy setuptools wheel pybind11
	DS_BUILD_OPS=0 $(VENV)/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[train,dev]'
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(wildcard csrc/*)
	$(VENV)/bin/pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Two workers with a thread each: OpenMP threads of several processes on the same cores slow each other down.
test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2

demo: setup
	$(RUN) examples/demo/run.py --output demo-output

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: setup
	PYTHONPATH=. $(RUN) -m benchmarks.bench_packing
	PYTHONPATH=. $(RUN) -m benchmarks.bench_collate
	PYTHONPATH=. $(RUN) -m benchmarks.bench_vq

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output
