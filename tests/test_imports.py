"""The rules of the source tree: which part may import which, what importing engrax loads, sizes, durable Flax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from engrax import plugins

ROOT = Path(__file__).resolve().parent.parent

# What each part of the package may import beside itself. `pallas_kernels <- layers <- models <- laws <- train <-
# evals <- configs <- commands <- cli`; `data` is used from train on and imports none of them. Evaluation reads runs, so
# it may use train.
BASE = {"errors", "files", "lazy", "registry"}
OPS = BASE | {"pallas_kernels"}
MODELS = OPS | {"layers", "models"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "flags": {"errors", "registry", "plugins", "train"},
    "interrupts": set(),
    "lazy": set(),
    "registry": {"errors"},
    "plugins": {"errors"},
    "pallas_kernels": BASE,
    "layers": OPS,
    "models": OPS | {"layers"},
    "laws": MODELS | {"plugins"},
    "data": BASE,
    "train": MODELS | {"laws", "data", "plugins"},
    "evals": MODELS | {"data", "plugins", "train"},
    "configs": MODELS | {"data", "train", "evals", "plugins"},
}
FACES = {"__init__", "cli", "commands"}  # may import everything
# Kernels know nothing of Flax; heavy or optional things are imported inside the function that needs them.
FLAX = {"flax", "optax", "orbax", "grain"}
LAZY = {"pyarrow", "array_record", "wandb", "tensorflow_datasets", "matplotlib", "tensorflow", "torch", "tensorboardX"}
LAZY |= {"lm_eval"}

LONGEST_FILE = 450  # lines
FORBIDDEN_NNX = {"jit", "grad", "value_and_grad", "scan", "remat", "vmap"}  # slow, or tied to Flax's own tracing


def sources() -> list[Path]:
    """The Python files git tracks or would track; without git, those of the package and the tests."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        files = [ROOT / name for name in listed]
    except (OSError, subprocess.CalledProcessError):
        parts = [ROOT / name for name in (*MAY_IMPORT, "tests", "benchmarks")]
        files = [*ROOT.glob("*.py"), *(file for part in parts for file in part.rglob("*.py"))]
    return sorted(file for file in files if file.exists())


def part_of(file: Path) -> str:
    """The part of the package a file belongs to: its folder, or the file's own name at the root."""
    relative = file.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST, package: str):
    """Yields (line, absolute dotted name) of every import; `package` resolves the relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def package_of(file: Path) -> str:
    return ".".join(["engrax", *file.relative_to(ROOT).parent.parts])


def trespasses(file: Path, source: str) -> list[str]:
    """The imports of one file that the rules do not allow, as `file:line: reason`."""
    part = part_of(file)
    tree = ast.parse(source)
    found = []
    for line, name in imports(tree, package_of(file)):
        parts = name.split(".")
        where = f"{file.relative_to(ROOT)}:{line}"
        if parts[0] in MAY_IMPORT or parts[0] in FACES:
            found.append(f"{where}: bare import of {name!r}; write `from engrax...`")
        elif part in MAY_IMPORT and parts[0] == "engrax":
            target = parts[1] if len(parts) > 1 else "__init__"
            if target != part and target not in MAY_IMPORT[part]:
                found.append(f"{where}: {part} must not import engrax.{target}")
        elif part == "pallas_kernels" and parts[0] in FLAX:
            found.append(f"{where}: a kernel knows nothing of {parts[0]}")
    return found


def module_level_imports(tree: ast.Module, package: str):
    """Yields (line, absolute dotted name) of the imports that run when the module is imported."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node, package)
        waiting.extend(ast.iter_child_nodes(node))


def heavy_imports(files: dict[Path, str]) -> list[str]:
    """Imports of optional or slow packages that run with the importing module, as `file:line: name`.

    A module that exists for such a package alone (a TFDS builder) may import it, if nothing imports that module so.
    """
    eager = {}
    for file, source in files.items():
        eager[file] = list(module_level_imports(ast.parse(source), package_of(file)))
    imported = {name for names in eager.values() for _, name in names}
    imported |= {name.rpartition(".")[0] for name in imported}
    found = []
    for file, names in eager.items():
        if f"{package_of(file)}.{file.stem}" in imported or file.stem in FACES:
            found += [f"{file.relative_to(ROOT)}:{line}: {name}" for line, name in names if name.split(".")[0] in LAZY]
    return found


def forbidden_nnx(tree: ast.AST) -> list[tuple[int, str]]:
    """Uses of Flax's lifted transforms: `nnx.jit`, `from flax.nnx import scan`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_NNX and ast.unparse(node.value).endswith("nnx"):
            found.append((node.lineno, f"nnx.{node.attr}"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax.nnx"):
            found += [(node.lineno, f"nnx.{alias.name}") for alias in node.names if alias.name in FORBIDDEN_NNX]
    return found


@pytest.mark.smoke
def test_imports_run_one_way():
    found = [line for file in sources() for line in trespasses(file, file.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "file, source",
    [
        ("layers/test_time/titans.py", "from engrax.models import LanguageModel"),
        ("layers/test_time/titans.py", "import engrax"),
        ("pallas_kernels/neural_memory/xla.py", "def f():\n    import flax.nnx"),
        ("pallas_kernels/neural_memory/xla.py", "from ...layers import mixer"),
        ("data/text.py", "from engrax.train.experiment import Experiment"),
        ("train/loop.py", "from engrax import evals"),
        ("train/loop.py", "import layers"),
        ("tests/test_x.py", "from data.text import StdlibText"),
    ],
)
def test_a_trespass_is_found(file, source):
    assert trespasses(ROOT / file, source)


@pytest.mark.parametrize(
    "file, source",
    [
        ("layers/test_time/titans.py", "from engrax.pallas_kernels import neural_memory\nfrom . import mixer"),
        ("evals/run.py", "from engrax.train import runs\nfrom engrax.data import DATASETS"),
        ("cli.py", "from engrax.configs import quickstart\nimport engrax"),
        ("tests/test_x.py", "import engrax\nfrom engrax.train import loop"),
    ],
)
def test_what_is_allowed_is_not_a_trespass(file, source):
    assert not trespasses(ROOT / file, source)


def test_every_part_has_its_rule():
    parts = {part_of(file) for file in sources() if (file.parent / "__init__.py").exists()}
    assert parts - FACES - {"setup", "conftest"} <= set(MAY_IMPORT)


def test_heavy_packages_are_imported_where_they_are_used():
    files = {file: file.read_text(encoding="utf-8") for file in sources() if part_of(file) in {*MAY_IMPORT, *FACES}}
    found = heavy_imports(files)
    assert not found, "import these inside a function:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "importing", ["from engrax.data import text", "from engrax.data.text import X", "from .data import text"]
)
@pytest.mark.parametrize(
    "heavy", ["try:\n    import wandb\nexcept ImportError:\n    pass", "from matplotlib import pyplot"]
)
def test_a_heavy_import_is_found(heavy, importing):
    assert heavy_imports({ROOT / "data/text.py": heavy, ROOT / "cli.py": importing})
    assert not heavy_imports({ROOT / "data/text.py": heavy, ROOT / "cli.py": f"def f():\n    {importing}"})


def test_no_lifted_flax_transforms():
    found = []
    for file in sources():
        if part_of(file) in {*MAY_IMPORT, *FACES}:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found += [f"{file.relative_to(ROOT)}:{line}: {name}" for line, name in forbidden_nnx(tree)]
    assert not found, "split once, then use jax's own transforms:\n" + "\n".join(found)


@pytest.mark.parametrize("source", ["nnx.jit(f)", "@flax.nnx.scan\ndef f(): ...", "from flax.nnx import grad"])
def test_a_lifted_transform_is_found(source):
    assert forbidden_nnx(ast.parse(source))


def test_no_file_is_too_long():
    lengths = {file.relative_to(ROOT): len(file.read_text(encoding="utf-8").splitlines()) for file in sources()}
    assert not {str(file): lines for file, lines in lengths.items() if lines > LONGEST_FILE}


LOADED = """
import sys
from engrax import cli
before = set(sys.modules)
import engrax
engrax.MixerConfig
mixer = set(sys.modules)
cli.main(["list"])
print("LOADED", *sorted(before), "MIXER", *sorted(mixer), "LIST", *sorted(sys.modules))
"""


@pytest.mark.smoke
def test_importing_engrax_loads_little(tmp_path):
    """Importing engrax loads no library, a mixer's base no other part of engrax, `engrax list` nothing optional."""
    finished = subprocess.run([sys.executable, "-c", LOADED], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    words = finished.stdout.split("LOADED")[1].split()
    engrax, mixer, listing = (
        set(words[words.index(start) + 1 if start else 0 : words.index(end) if end else None])
        for start, end in ((None, "MIXER"), ("MIXER", "LIST"), ("LIST", None))
    )
    assert not engrax & {"jax", "flax", "numpy", "optax"}
    others = {name for name in mixer if name.startswith("engrax.")} - engrax
    assert others <= {"engrax.layers", "engrax.layers.mixer"}, "engrax.MixerConfig loads other parts"
    assert not listing & (LAZY | {"grain", "orbax.checkpoint.checkpointers", "tyro", "jax.experimental.pallas"})
    assert "engrax.layers.linear.gla" in listing


@pytest.mark.smoke
def test_importing_engrax_is_light():
    """In CPU time, since other programs may run; twice the targets, since these are for a machine at rest."""
    import_time = plugins.load(ROOT / "benchmarks" / "import_time.py")
    codes = {import_time.FLAX: import_time.FLAX} | {name: code for name, (code, _) in import_time.COMMANDS.items()}
    seconds = {name: min(import_time.run(code)[1] for _ in range(2)) for name, code in codes.items()}
    for name, (_, target) in import_time.COMMANDS.items():
        above = seconds[name] - seconds[import_time.FLAX]
        assert above < 2 * target, f"{name} took {above:.2f} s of CPU time above flax.nnx"


@pytest.mark.smoke
def test_shapes_are_checked_in_tests():
    """conftest.py's import hook is at work: jaxtyping's loader has loaded engrax's modules."""
    import engrax.registry as module

    assert "jaxtyping" in type(module.__spec__.loader).__module__
