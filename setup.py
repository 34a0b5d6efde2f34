"""Build of the C++ extension `medmax_fast._csrc` and the layout of packages; metadata is in pyproject.toml.

The extension is plain C++17 with pybind11 and no torch, so setuptools alone builds it in seconds, offline, for any
torch. CMakeLists.txt builds the same module for development (sanitizers, compile_commands.json).
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KERNELS = "medmax_fast.kernels"


class BuildPy(build_py):
    """Put the kernels' `__init__.py`, which a checkout keeps inside the package, beside them in a wheel.

    The kernels themselves lie in kernels/ at the root, without an `__init__.py`: as a regular package on sys.path
    that folder would shadow the PyPI package `kernels`.
    """

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        if package == KERNELS:
            modules.append((package, "__init__", "medmax_fast/kernels/__init__.py"))
        return modules


def pybind11_include() -> str:
    """Folder of pybind11's headers: the package, or the copy in torch's wheel where there is no network."""
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin:
        include = Path(torch.origin).parent / "include"
        if (include / "pybind11" / "pybind11.h").is_file():
            return str(include)
    raise SystemExit("pybind11 not found; install it first: pip install pybind11")


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


setup(
    packages=sorted({*find_packages(include=["medmax_fast", "medmax_fast.*"]), KERNELS}),
    package_dir={KERNELS: "kernels"},
    package_data={"medmax_fast": ["py.typed", "_csrc.pyi"], "medmax_fast.demo": ["*.css", "examples/*"]},
    cmdclass={"build_py": BuildPy},
    ext_modules=[
        Extension(
            "medmax_fast._csrc",
            sources("*.cpp"),
            depends=sources("*.hpp"),
            include_dirs=[pybind11_include()],
            language="c++",
            # A fused multiply-add, which GCC would make on Arm, rounds the weights of the resize otherwise.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
)
