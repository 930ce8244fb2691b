"""The native build. Metadata is in pyproject.toml; how the library is built, or left out, in csrc/native_build.py."""

import sys
from pathlib import Path

from setuptools import Distribution, setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))

from native_build import NativeBuild, native_extension


class NativeDistribution(Distribution):
    """A wheel of this platform, whether or not the native build succeeded."""

    def has_ext_modules(self):
        return True


setup(
    ext_modules=[native_extension()],
    cmdclass={"build_ext": NativeBuild},
    distclass=NativeDistribution,
)
