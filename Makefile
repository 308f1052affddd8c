# Every target makes its own environment in .venv: nothing needs to be activated or installed beforehand.
#
#   make train          install, train the quickstart, evaluate it, print a sample and where the report is
#   make test           install, run the quick tests: at most 12 minutes on two cores
#   make test-deep      the laws on every example, deeper grids, notebooks in their FAST setting: at most 20 minutes
#   make test-long      everything else, section by section; run again, it continues; writes docs/test_long.json
#   make test-lowest    a smoke run on Python 3.11 and the lowest supported versions
#   make test-compile   compile kernels, and training steps of the 340M and 1.3B configs, for the accelerators they are
#                       meant for, without one (several GB of downloads); run again, it continues
#   make lint           style
#
# PYTHON=3.12 or PYTHON=/path/to/python3 chooses another Python than launch/python.sh would. TRAIN_FLAGS="--steps 50",
# PYTEST_FLAGS="-k mqar" and LONG_FLAGS="--only resume --minutes 60" are handed on.

PYTHON =
VENV = .venv
LOWEST = .venv-lowest
COMPILE_GPU = .venv-compile-gpu
COMPILE_TPU = .venv-compile-tpu
RUN = runs/quickstart
TRAIN_FLAGS =
PYTEST_FLAGS =
LONG_FLAGS =

# One worker a core, up to 8. worksteal gives each worker a contiguous half of the list, so what a module has compiled
# stays with it, and moves tests only when a worker has none left.
WORKERS = $$("$(VENV)/bin/python" -c "import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()))")
PYTEST = "$(VENV)/bin/python" -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_FLAGS)

.PHONY: help train test test-deep test-long test-lowest test-compile test-compile-gpu test-compile-tpu lint clean

help:
	@sed -n 's/^#   //p' Makefile

train:
	@sh launch/venv.sh "$(VENV)" "" $(PYTHON)
	"$(VENV)/bin/engrax" train quickstart --run-dir "$(RUN)" $(TRAIN_FLAGS)
	"$(VENV)/bin/engrax" evaluate "$(RUN)"
	"$(VENV)/bin/engrax" generate "$(RUN)" --prompt "def "
	@ls -t "$(RUN)"/evals/*/report.html | head -n 1 | sed 's/^/The report is in /'

test:
	@sh launch/venv.sh "$(VENV)" test $(PYTHON)
	$(PYTEST) -m "not deep and not long"

test-deep:
	@sh launch/venv.sh "$(VENV)" test $(PYTHON)
	$(PYTEST) -m "deep and not long"

test-long:
	@sh launch/venv.sh "$(VENV)" test $(PYTHON)
	"$(VENV)/bin/python" tests/run_long.py --workers $(WORKERS) --output docs/test_long.json $(LONG_FLAGS)

test-lowest:
	@sh launch/venv.sh --lowest "$(LOWEST)" test
	"$(LOWEST)/bin/python" -m pytest -m smoke $(PYTEST_FLAGS)

test-compile: test-compile-gpu test-compile-tpu

test-compile-gpu:
	@sh launch/venv.sh "$(COMPILE_GPU)" cuda $(PYTHON)
	"$(COMPILE_GPU)/bin/python" tests/compile_gpu.py --output benchmarks/results/compile_gpu.json
	"$(COMPILE_GPU)/bin/python" tests/compile_configs.py --devices h200

test-compile-tpu:
	@sh launch/venv.sh "$(COMPILE_TPU)" tpu $(PYTHON)
	"$(COMPILE_TPU)/bin/python" tests/compile_tpu.py --output benchmarks/results/compile_tpu.json
	"$(COMPILE_TPU)/bin/python" tests/compile_configs.py --devices v5e v6e

lint:
	@sh launch/venv.sh "$(VENV)" dev $(PYTHON)
	"$(VENV)/bin/ruff" check .

clean:
	rm -rf "$(VENV)" "$(LOWEST)" "$(COMPILE_GPU)" "$(COMPILE_TPU)" build dist *.egg-info .pytest_cache .ruff_cache
