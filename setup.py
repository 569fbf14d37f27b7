"""Builds the CPU kernels with CMake; everything else about the package is in pyproject.toml.

A machine without CMake or a C++17 compiler installs the package without them, and `plan.compile` says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
LIBRARY = "horizon_plugin_pytorch.backends.cpu.lib.horizon_cpu"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


class BuildWithCMake(build_ext):
    """One shared library without anything of Python in it, so its name has no Python's tag, and it lies in a folder without modules."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + SUFFIX

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        output = [f"-DCMAKE_{kind}_OUTPUT_DIRECTORY={build / 'lib'}" for kind in ("LIBRARY", "RUNTIME")]
        commands = (
            ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *output],
            ["cmake", "--build", str(build), "--config", "Release", "--parallel", str(os.cpu_count() or 1)],
        )
        try:
            for command in commands:
                subprocess.run(command, check=True)
            (built,) = (build / "lib").rglob(f"*horizon_cpu{SUFFIX}")
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            raise CompileError(f"the CPU kernels were not built, plans will run on the reference: {error}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))

    def copy_extensions_to_source(self) -> None:
        """For an editable install; the repository does not have the folder."""
        ROOT.joinpath("src", *LIBRARY.split(".")[:-1]).mkdir(exist_ok=True)
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """For any Python 3 of the platform: the library is loaded with ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(LIBRARY, sources=[], optional=True)],
    cmdclass={"build_ext": BuildWithCMake, "bdist_wheel": PlatformWheel},
)
