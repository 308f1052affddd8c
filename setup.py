"""Packaging of engrax: the one place where versions are declared. The repository root IS the package `engrax`."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Named one by one: the root also holds tests, notebooks and whatever a checkout collects (.venv, runs).
PARTS = ("commands", "configs", "data", "evals", "laws", "layers", "models", "pallas_kernels", "train")
PACKAGES = find_packages(str(ROOT), include=[pattern for part in PARTS for pattern in (part, f"{part}.*")])
NOT_MODULES = ("setup", "conftest")  # Python files of the root that belong to the checkout alone
README = ROOT / "README.md"


class BuildPackage(build_py):
    """Leaves setup.py, which the mapping of the root sweeps in, and leftovers of earlier builds out of the wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def find_package_modules(self, package, package_dir):
        return [module for module in super().find_package_modules(package, package_dir) if module[1] not in NOT_MODULES]


# Every minimum below is installed and tried together by `make test-lowest` (Python 3.11).
setup(
    name="engrax",
    version="0.2.0",
    description="JAX/Flax research framework for memory-augmented sequence architectures",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["jax", "flax", "titans", "linear attention", "hopfield", "memory", "pallas"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=["engrax", *(f"engrax.{package}" for package in PACKAGES)],
    package_dir={"engrax": "."},
    package_data={  # templates lie beside the modules that use them; the trained run beside its config
        "": ["*.jinja"],
        "engrax": ["py.typed"],
        "engrax.configs": ["trained/**/*"],
    },
    include_package_data=False,  # with version control plugins about, it would sweep the checkout into the wheel
    cmdclass={"build_py": BuildPackage},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6.4",  # TFDS builders import it and TFDS declares it for old Pythons only
        "array_record>=0.8.3; platform_system == 'Linux'"
        " or (platform_system == 'Darwin' and platform_machine == 'arm64')",  # where it has wheels
        "etils[epath]>=1.12",
        "safetensors>=0.4.5",
        "xxhash>=3.4.1",
        "scipy>=1.15",
        "jinja2>=3.1",
        "wandb>=0.25",
        "tyro>=1.0",
        "jaxtyping>=0.3",
        "matplotlib>=3.9",
        "tqdm>=4.66",
        "tokenizers>=0.20",
        "pyarrow>=17.0",  # Parquet, and Zstandard files
    ],
    extras_require={
        "test": [
            "pytest>=8.2",  # before 8.1 it imported the root's __init__.py as a module of its own
            "pytest-xdist>=3.6.1",
            "beartype>=0.20",
            "nbformat>=5.10",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "tensorboardX>=2.6.4",
            "scikit-learn>=1.5",
            "setuptools>=77.0.3",  # builds wheels offline in tests/test_install.py
        ],
        "dev": ["ruff>=0.8", "build>=1.2"],
        "tensorboard": ["tensorboardX>=2.6.4"],
        "digits": ["scikit-learn>=1.5"],  # real images that it brings along, for the Hopfield notebook
        "harness": ["lm_eval>=0.4.13"],  # lm-evaluation-harness, for `engrax harness`
        "cuda": ["jax[cuda13]>=0.10.2"],
        "cuda12": ["jax[cuda12]>=0.10.2"],  # for drivers older than 580
        "tpu": ["jax[tpu]>=0.10.2"],
    },
    entry_points={
        "console_scripts": ["engrax = engrax.cli:main"],
        "lm_eval.models": ["engrax = engrax.evals.harness:EngraxLM"],  # read by versions of lm_eval after 0.4.13
    },
)
