# Everything runs inside .venv, which `make setup` builds once; a second run of any target starts at once.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Keeps the current folder off sys.path, where kernels/ would shadow the PyPI package of that name.
export PYTHONSAFEPATH := 1
# Modules are compiled once also where the environment says otherwise: tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup test sanitize demo docs errors lint build format bench gpu clean

setup: $(VENV)/.built

$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt torch numpy setuptools wheel pybind11
	# DeepSpeed's setup.py imports from its own folder, which a safe path leaves out.
	env -u PYTHONSAFEPATH DS_BUILD_OPS=0 $(VENV)/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[train,serve,demo,docs,dev]'
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(wildcard csrc/*)
	$(VENV)/bin/pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Two workers with a thread each: OpenMP threads of several processes on the same cores slow each other down. A worker
# takes whole modules, whose fixtures are then made once, in the order of tests/conftest.py: slow ones first.
test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The tests of the C++ under AddressSanitizer and UBSan, with a copy of the package that has an extension of its own:
# the one in the checkout stays as it is. CPython frees little at its end, so leaks are not looked for.
SANITIZED := build/sanitize
SANITIZED_TESTS := $(patsubst %,tests/test_%.py,packing balance collate prefetch loader sequences chunks)
# Of the many sizes of the resize, those that take every path through it.
SANITIZED_RESIZE := tests/test_resize.py -k '480 or 37 or 1600 or weights or memory or bad'
# Captured output would be lost with the process, the sanitizer's report in it.
PLAIN_PYTEST := -m pytest -q -p no:cacheprovider --capture=sys
LIBRARY = $$(g++ -print-file-name=$(1).so)
UNDER_ASAN = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	PYTHONPATH=$(abspath $(SANITIZED)/package) LD_PRELOAD="$(call LIBRARY,libasan) $(call LIBRARY,libstdc++)" $(RUN)

sanitize: setup
	rm -rf $(SANITIZED)/package
	mkdir -p $(SANITIZED)/package
	cp -r medmax_fast kernels $(SANITIZED)/package
	rm -f $(SANITIZED)/package/medmax_fast/_csrc*
	CXX=g++ $(VENV)/bin/cmake -S . -B $(SANITIZED)/cmake -G Ninja -DMEDMAX_SANITIZE=ON \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) -DPython_EXECUTABLE=$(abspath $(RUN)) \
		-DCMAKE_INSTALL_PREFIX=$(abspath $(SANITIZED)/package)
	$(VENV)/bin/cmake --build $(SANITIZED)/cmake
	$(VENV)/bin/cmake --install $(SANITIZED)/cmake
	$(UNDER_ASAN) -c 'import medmax_fast._csrc as m; assert "$(SANITIZED)" in m.__file__, m.__file__'
	$(UNDER_ASAN) $(PLAIN_PYTEST) -n 2 --max-worker-restart=0 $(SANITIZED_TESTS)
	$(UNDER_ASAN) $(PLAIN_PYTEST) $(SANITIZED_RESIZE)

demo: setup
	$(RUN) examples/demo/run.py --output demo-output

# The documentation as a site in build/site; any warning is an error.
docs: setup
	$(VENV)/bin/mkdocs build --strict

# docs/errors.md; run the tests of new messages first, their examples come from pytest's cache.
errors: setup
	PYTHONPATH=tests $(RUN) -m error_page

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint docker/Dockerfile.*

# The source distribution and a wheel for this machine; wheels for others come from cibuildwheel, see pyproject.toml.
build: setup
	$(RUN) -m build --no-isolation

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: setup
	$(RUN) -m medmax_fast bench --suite cpu

# For a machine with a GPU and no network: into the Python that has torch with CUDA (PYTHON=), with nothing fetched.
# Under nine minutes; what is finished by then is kept in GPU_OUTPUT. GPU_STAGES="vq loss" runs these alone.
GPU_OUTPUT ?= gpu-output
GPU_LIMIT ?= 480
gpu:
	$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "torch sees no GPU; set PYTHON=")'
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps .
	$(PYTHON) -m medmax_fast bench --suite gpu --output $(GPU_OUTPUT) --limit $(GPU_LIMIT) $(GPU_STAGES)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output gpu-output
