"""Builds the native extensions; all other metadata is in pyproject.toml.

`megatron_bicc._C` is plain C++17. `megatron_bicc._C_cuda` is built where nvcc is on PATH and there are CUDA
sources. Neither includes a torch header, so an isolated build needs only setuptools and pybind11.
"""

import os
import shutil
import sysconfig
from glob import glob

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup

HEADERS = glob("csrc/**/*.h*", recursive=True) + glob("csrc/**/*.cuh", recursive=True)
CUDA_EXTENSION = "megatron_bicc._C_cuda"
# Native code for A100 and H100; the PTX lets the driver compile for later GPUs.
CUDA_TARGETS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]


class BuildExtensions(build_ext):
    """Builds the CUDA extension with nvcc, which finds its own headers and static runtime."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA_EXTENSION:
            super().build_extension(ext)
            return
        output = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(output))
        includes = [f"-I{path}" for path in (*ext.include_dirs, sysconfig.get_path("include"))]
        self.spawn(["nvcc", *ext.extra_compile_args, *includes, *ext.sources, "-o", output])


def native_extensions() -> list[Extension]:
    """Returns the extensions that this machine can build."""
    flags = ["-O3", "-pthread"]
    extensions: list[Extension] = [
        Pybind11Extension(
            "megatron_bicc._C",
            sorted(glob("csrc/*.cpp")),
            include_dirs=["csrc"],
            depends=HEADERS,
            cxx_std=17,
            extra_compile_args=flags,
            extra_link_args=["-pthread"],
        )
    ]
    cuda_sources = sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp"))
    if shutil.which("nvcc") and glob("csrc/cuda/*.cu"):
        host = ["-shared", "-std=c++17", "-O3", "-Xcompiler=-fPIC,-pthread,-fvisibility=hidden"]
        extensions.append(
            Extension(
                CUDA_EXTENSION,
                cuda_sources,
                include_dirs=["csrc", pybind11.get_include()],
                depends=HEADERS,
                extra_compile_args=host + CUDA_TARGETS,
            )
        )
    return extensions


ParallelCompile(default=0).install()
setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildExtensions})
