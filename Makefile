# make demo | make test | make bench | make lint: each sets up what it needs, and re-uses what is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints-cpu.txt CMakeLists.txt $(wildcard csrc/*.h csrc/*/*)
PIP := $(BIN)/python -m pip install -q -c constraints-cpu.txt
EXTRAS ?= test
READY := $(VENV)/reid3d-ready-$(EXTRAS)

# OpenMP threads that wait by spinning are several times slower as soon as anything else runs on the machine.
demo test bench: export OMP_WAIT_POLICY = passive

.PHONY: demo test bench lint clean
.DELETE_ON_ERROR:

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" ./demo.sh build/demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

bench: $(READY)
	$(BIN)/reid3d bench kernels

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build $(VENV) reid3d/_C*.so *.egg-info

# torch and the build tools first: the extension is built against the torch of the environment, without isolation.
$(READY): $(SOURCES) | $(VENV)/pyvenv.cfg
	@echo "installing torch and the build tools; this can take minutes"
	$(PIP) torch numpy setuptools cmake ninja
	$(PIP) --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "reid3d needs Python 3.10 or later: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "reid3d needs Python's venv module: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
