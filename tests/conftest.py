"""What every test shares: run-time checked array shapes, float64 on request, and Python processes with many devices."""

import collections
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

# All of this must stand before jax and engrax are imported anywhere.
assert "engrax" not in sys.modules, "engrax was imported before its shapes could be checked"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
if "--xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    # Most programs here run once: machine code that is not optimised takes half the time, compilation included.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
# Lines of Python that programs would carry with them for debuggers: a twentieth of the time of compiling.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

_CONTROLLER = "PYTEST_XDIST_WORKER" not in os.environ
_OWN_CACHE = _CONTROLLER and "JAX_COMPILATION_CACHE_DIR" not in os.environ
if _OWN_CACHE:  # programs compiled once are shared by all the processes that tests start
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="engrax-tests-compiled-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from jaxtyping import install_import_hook  # noqa: E402

# With the numeric tower, as every type checker has it: an int serves where a float is asked for.
install_import_hook("engrax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import jax  # noqa: E402
import numpy as np  # noqa: E402

# In the tests' own processes nearly nothing is compiled twice, and filling the cache costs a tenth of the time.
jax.config.update("jax_enable_compilation_cache", False)

# Tracing makes many small objects that live long; looking for dead ones among them takes a twentieth of the time.
gc.set_threshold(100_000, 50, 100)
MOST_MAPPINGS = 20_000  # of 65,530 that Linux allows a process by default; what was compiled holds them

LONGEST = ("test_targets", "test_notebooks")  # minutes for one test

ROOT = Path(__file__).resolve().parent.parent


def pytest_unconfigure(config):
    if _OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """The longest tests go first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


_seconds = collections.Counter()  # of each test file, in all processes together


def pytest_terminal_summary(terminalreporter):
    """Where the time went, for whoever must fit the tests into a number of minutes."""
    most = [f"{name} {seconds / 60:.1f}" for name, seconds in _seconds.most_common(12) if seconds >= 30]
    if most:
        terminalreporter.write_line(f"process minutes by file: {', '.join(most)}")


def pytest_runtest_logreport(report):
    _seconds[report.nodeid.split("::")[0]] += report.duration
    _forget_programs(report)


def _forget_programs(report):
    """Forgets what was compiled before the process runs out of memory mappings, which crashes it."""
    if report.when == "call" and report.duration > 1 and os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            if sum(1 for _ in maps) > MOST_MAPPINGS:
                jax.clear_caches()


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout, which is the package `engrax`."""
    return ROOT


@pytest.fixture(autouse=True)
def _seed():
    """NumPy's global generator starts each test at the same place; JAX's keys are explicit."""
    np.random.seed(0)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Returns `once(name, make)`: what `make()` returned (JSON) in the first worker that asked; the others wait."""

    def once(name, make):
        folder = tmp_path_factory.getbasetemp()
        folder = folder if _CONTROLLER else folder.parent  # the parent is common to all workers
        claim, result = folder / f"{name}.claimed", folder / f"{name}.json"
        try:
            claim.mkdir()
        except FileExistsError:
            deadline = time.monotonic() + 900
            while not result.exists():
                failed = not (claim.exists() or result.exists()) or time.monotonic() > deadline
                assert not failed, f"another worker failed to make {name}"
                time.sleep(0.2)
            return json.loads(result.read_text())
        part = folder / f"{name}.part"
        try:
            part.write_text(json.dumps(make()))
            part.rename(result)
        except BaseException:
            claim.rmdir()  # whoever waits would wait in vain
            raise
        return json.loads(result.read_text())

    return once


@pytest.fixture
def x64():
    """Runs the test with 64-bit types: `jnp.zeros(3)` is float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def run_python(tmp_path):
    """Returns `run(code, devices=8, ...) -> stdout`: Python in a process of its own, where jax sees `devices` CPUs.

    The number of devices is fixed when jax starts, so tests of several devices cannot run in the test's own process.
    Keyword arguments: `args` (sys.argv[1:]), `env` (variables added, or removed where None), `timeout` in seconds,
    `returncode` wanted (None = any; `run.last` is the finished process, with its stderr).
    """

    def run(code, *, devices=8, args=(), env=None, timeout=240, returncode=0):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        flags = environment.get("XLA_FLAGS", "").split()
        flags = [flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count")]
        environment["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
        for name, value in (env or {}).items():
            environment.pop(name, None) if value is None else environment.update({name: str(value)})
        run.last = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if returncode is not None and run.last.returncode != returncode:
            output = f"stdout:\n{run.last.stdout}\nstderr:\n{run.last.stderr}"
            pytest.fail(f"the process ended with {run.last.returncode}, not {returncode}\n{output}", pytrace=False)
        return run.last.stdout

    return run
