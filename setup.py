"""The compiled passes for the CPU, one library for each instruction set; all else stands in pyproject.toml."""

import os
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = ["-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-wrapv", "-g0"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
VARIANTS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS |= {"avx2": AVX2, "avx512": AVX512}


class BuildPasses(build_ext):
    """Builds each variant in a folder of its own, with OpenMP where the compiler has it (Apple's has not)."""

    def build_extension(self, ext: Extension) -> None:
        folder, flags = self.build_temp, ext.extra_compile_args
        self.build_temp = os.path.join(folder, ext.name)
        try:
            ext.extra_compile_args, ext.extra_link_args = [*flags, "-fopenmp"], ["-fopenmp"]
            super().build_extension(ext)
        except CompileError:
            ext.extra_compile_args, ext.extra_link_args = [*flags, "-Wno-unknown-pragmas"], []
            super().build_extension(ext)
        finally:
            self.build_temp = folder


setup(
    cmdclass={"build_ext": BuildPasses},
    ext_modules=[
        Extension(
            f"dense_shortcuts.ops.backends.native_{name}",
            ["dense_shortcuts/ops/backends/native.cpp"],
            extra_compile_args=[*FLAGS, *flags],
            language="c++",
            optional=True,  # without a compiler the package runs plain PyTorch
        )
        for name, flags in VARIANTS.items()
    ],
)
