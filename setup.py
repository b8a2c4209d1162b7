"""Builds the native extensions; all other metadata is in pyproject.toml.

`megatron_bicc._C` is plain C++17. `megatron_bicc._C_cuda` is built where nvcc is on PATH; if nvcc fails, the
set-up goes on without it, with a warning: plain torch computes the same. Neither includes a torch header, so
an isolated build needs only setuptools and pybind11.
"""

import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup

HEADERS = glob("csrc/**/*.h*", recursive=True) + glob("csrc/**/*.cuh", recursive=True)
CUDA_EXTENSION = "megatron_bicc._C_cuda"
# A100, H100, B200
CUDA_ARCHITECTURES = ("80", "90", "100")


def cuda_targets() -> list[str]:
    """Returns nvcc's options: native code for each architecture that this nvcc knows, and the last one's PTX.

    The PTX lets the driver compile for later GPUs. Raises CalledProcessError or OSError if nvcc does not run.
    """
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in listed.split()]
    native = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    return [*native, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


class BuildExtensions(build_ext):
    """Builds the CUDA extension with nvcc, which finds its own headers and static runtime."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA_EXTENSION:
            super().build_extension(ext)
            return
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in (*ext.include_dirs, sysconfig.get_path("include"))]
        try:
            targets = cuda_targets()
            command = ["nvcc", *ext.extra_compile_args, *targets, *includes, *ext.sources, "-o", str(output)]
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # an extension of older sources must not remain
            for built in (output, Path(self.get_ext_filename(ext.name))):
                built.unlink(missing_ok=True)
            print(
                f"warning: {CUDA_EXTENSION} is not built: nvcc fails ({type(error).__name__}, see above). "
                "On a GPU, plain torch computes the same, slower",
                file=sys.stderr,
            )


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
                extra_compile_args=host,
                optional=True,  # not copied into the package where it was not built
            )
        )
    return extensions


ParallelCompile(default=0).install()
setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildExtensions})
