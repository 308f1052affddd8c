"""engrax installs, editable and ordinary, and works from wherever its user stands.

A copy of the checkout, in a folder named `engrax` and littered as a used one is, is installed into environments that
borrow this one's dependencies, so nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = {file.parent.name for file in ROOT.glob("*/__init__.py")}  # every package of the checkout
OFFLINE = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")

PROBE = """
import sys
from pathlib import Path

import engrax
from engrax.registry import Registry

ROOT = Path(__file__).resolve().parent.parent

def test_one_copy_of_engrax():
    assert Path(engrax.__file__).parent == ROOT
    assert sys.modules["engrax.registry"].Registry is Registry
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    ours = {name for name, file in files.items() if file and Path(file).is_relative_to(ROOT)}
    ours = {name for name in ours if ".venv" not in files[name] and "tests" not in files[name]}
    assert all(name.split(".")[0] == "engrax" for name in ours), ours
"""


def run(command, cwd, **environment):
    """Runs a command as a user's shell would, without what this test run has set, and returns its output."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHON", "VIRTUAL_ENV"))
    }
    kept.update(environment)
    finished = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, f"{command} in {cwd} ended with {finished.returncode}\n{finished.stdout}"
    return finished.stdout


def tracked_files() -> list[Path]:
    """Paths, relative to the root, of what git tracks or would track."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the source is not known")
    names = run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], ROOT).split("\0")
    return [Path(name) for name in names if name and (ROOT / name).is_file()]


def copy_checkout(target: Path) -> Path:
    for name in tracked_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    for litter in (".venv/lib/trap", "runs/quickstart", "build/lib/engrax"):
        (target / litter).mkdir(parents=True)
        (target / litter / "__init__.py").touch()
        (target / litter / "test_trap.py").write_text("raise SystemExit('this file must not be collected')\n")
    return target


def environment(folder: Path) -> Path:
    """Returns the Python of a new environment that sees this one's installed packages, below its own."""
    venv.create(folder, with_pip=False, symlinks=True)
    own = subprocess.run(
        [folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(own, "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("parent") / "engrax")


@pytest.fixture(scope="module")
def editable(checkout, tmp_path_factory):
    python = environment(tmp_path_factory.mktemp("editable") / "env")
    run([sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, "--editable", "."], checkout)
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a checkout of another name."""
    source = copy_checkout(tmp_path_factory.mktemp("parent") / "main")
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", folder, "."], source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def ordinary(wheel, tmp_path_factory):
    python = environment(tmp_path_factory.mktemp("ordinary") / "env")
    run([sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, wheel], wheel.parent)
    return python


def places(checkout):
    return {"root": checkout, "subfolder": checkout / "layers", "parent": checkout.parent, "/": Path("/")}


@pytest.mark.parametrize(
    "installed, place",
    [
        *(("editable", place) for place in ("root", "subfolder", "parent", "/")),
        ("ordinary", "root"),
        *(pytest.param("ordinary", place, marks=pytest.mark.long) for place in ("subfolder", "parent", "/")),
    ],
)
def test_command_line_works_from_everywhere(installed, place, checkout, request):
    python = request.getfixturevalue(installed)
    cwd = places(checkout)[place]
    assert "train" in run([python, "-m", "engrax.cli", "--help"], cwd)
    if place in ("root", "/"):
        assert "train" in run([python.parent / "engrax", "--help"], cwd)


@pytest.mark.parametrize("installed", ["editable", "ordinary"])
def test_the_installed_copy_is_imported(installed, checkout, request):
    python = request.getfixturevalue(installed)
    where = Path(run([python, "-c", "import engrax.registry; print(engrax.__file__)"], "/").strip()).parent
    assert where == (checkout if installed == "editable" else where)
    assert ROOT not in (where, *where.parents)
    assert (installed == "ordinary") == where.is_relative_to(python.parent.parent)


@pytest.mark.parametrize(
    "place, command",
    [
        ("root", ["pytest"]),
        pytest.param("root", ["python", "-m", "pytest"], marks=pytest.mark.long),
        ("subfolder", ["python", "-m", "pytest", "../tests"]),
        pytest.param("subfolder", ["pytest", "../tests"], marks=pytest.mark.long),
        pytest.param("parent", ["pytest", "engrax/tests"], marks=pytest.mark.long),
        pytest.param("parent", ["python", "-m", "pytest", "engrax/tests"], marks=pytest.mark.long),
        ("/", ["pytest", "{checkout}/tests"]),
    ],
)
def test_pytest_works_from_everywhere(place, command, checkout, editable):
    for test in (checkout / "tests").glob("test_*.py"):
        test.unlink()
    (checkout / "tests" / "test_probe.py").write_text(PROBE)
    words = [word.format(checkout=checkout) for word in command]
    program = [editable, "-m", "pytest"] if words[0] == "python" else [editable, pytest_script(editable)]
    arguments = words[3:] if words[0] == "python" else words[1:]
    output = run([*program, "-p", "no:cacheprovider", "-p", "no:xdist", *arguments], places(checkout)[place])
    assert "1 passed" in output


def pytest_script(python: Path) -> Path:
    """The console script `pytest` in the environment of `python`, which borrows the package but not the script."""
    script = python.parent / "pytest"
    script.write_text(f"#!{python}\nimport sys\nimport pytest\nsys.exit(pytest.main())\n")
    script.chmod(0o755)
    return script


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = [name for name in tracked_files() if name.parts[0] in PARTS]
    modules = [
        name for name in tracked_files() if len(name.parts) == 1 and name.suffix == ".py" and name.stem != "setup"
    ]
    assert names == {f"engrax/{name.as_posix()}" for name in [*sources, *modules, Path("py.typed")]}
    assert "engrax/train/optimizers/lion.py" in names and "engrax/layers/linear/gla.py" in names


def test_an_installed_copy_finds_what_is_registered(ordinary):
    listed = run([ordinary, "-m", "engrax.cli", "list"], "/", JAX_PLATFORMS="cpu")
    for name in ("quickstart", "titans", "language_model", "stdlib_text", "lion", "wsd"):
        assert f"  {name} " in listed


def test_the_wheel_declares_what_users_ask_for(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        (entry_points,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        lines = archive.read(metadata).decode().split("\n\n")[0].splitlines()
        scripts = archive.read(entry_points).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    fields = [tuple(line.split(": ", 1)) for line in lines if ": " in line]
    assert {("License", "Apache-2.0"), ("Requires-Python", ">=3.11")} <= set(fields)
    assert {"test", "dev", "cuda", "tpu"} <= {value for name, value in fields if name == "Provides-Extra"}
    assert "engrax = engrax.cli:main" in scripts
    needed = " ".join(value for name, value in fields if name == "Requires-Dist" and "extra ==" not in value)
    assert all(name in needed for name in ("tensorflow-datasets", "scipy", "jinja2"))
    assert "tensorflow>=" not in needed and "torch" not in needed


MIXER = """
import dataclasses
import engrax, jax.numpy as jnp
from flax import nnx

@engrax.register("sum_so_far")
@dataclasses.dataclass(frozen=True)
class SumConfig(engrax.MixerConfig):
    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return Sum(self, dim, rngs=rngs)

class Sum(nnx.Module):
    def __init__(self, config, dim, *, rngs):
        self.dim, self.write = dim, nnx.Linear(dim, dim, rngs=rngs)

    def init_state(self, batch_size):
        return jnp.zeros((batch_size, self.dim), self.write.kernel.dtype)

    def __call__(self, x, state=None, segment_ids=None):
        y = jnp.cumsum(self.write(x), axis=1) + (0 if state is None else state[:, None])
        return y, y[:, -1].astype(x.dtype)
"""

# As where nothing but what engrax needs is installed: the environment of the tests has these.
WITHOUT_TESTS = "import sys; sys.modules |= dict.fromkeys(('pytest', 'beartype', '_pytest')); from engrax import cli; "


def test_the_laws_come_with_the_wheel(ordinary, tmp_path):
    """`engrax check` needs neither the tests nor what they need; it finds that the mixer does not know documents."""
    (tmp_path / "sum.py").write_text(MIXER)
    check = "code = cli.main(['check', 'sum.py', '--law', 'causality', '--law', 'packing.apart']); print('code', code)"
    output = run([ordinary, "-c", WITHOUT_TESTS + check], tmp_path)
    assert "causality.jacobian" in output and "holds" in output
    assert "sum_so_far: packing.apart broken at row" in output and "code 1" in output
