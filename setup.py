"""Builds the native CPU kernels; everything else about the package is in setup.cfg.

The kernels are optional: without a compiler, or where the build fails, the package installs without them and
`nat_dense.ops.cpu` says why, from the note that is left here.
"""

import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = Path("nat_dense/ops/csrc")
NOTE = Path("nat_dense/ops/_cpu_build_failure.txt")  # read by nat_dense/ops/cpu.py

if sys.platform == "win32":
    COMPILE, LINK = ["/O2", "/openmp"], []
elif sys.platform == "darwin":
    COMPILE, LINK = ["-O3", "-ffp-contract=fast"], []
else:
    # -fopenmp: at::parallel_for is a template; libgomp.so.1 is already there, torch's own.
    COMPILE = ["-O3", "-ffp-contract=fast", "-fopenmp", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    LINK = ["-fopenmp", "-s"]


class OptionalBuild(BuildExtension):
    """Turns a failed build into a note."""

    def build_extensions(self) -> None:
        NOTE.unlink(missing_ok=True)
        try:
            super().build_extensions()
        except Exception as error:
            NOTE.write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
            print(f"The native CPU kernels were not built ({error}); the package works without them.", file=sys.stderr)
            self.extensions = []

    def get_export_symbols(self, ext) -> list[str]:
        return []  # a plain library of torch operators, not a Python module


setup(
    ext_modules=[
        CppExtension(
            "nat_dense.ops._cpu",
            sorted(str(path) for path in SOURCES.glob("*.cpp")),
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
        )
    ],
    cmdclass={"build_ext": OptionalBuild.with_options(no_python_abi_suffix=True, use_ninja=True)},
)
