"""The PEP 517 build backend: setuptools, with the torch of the target environment at hand.

The extension must be compiled against the headers of the torch that will load it. An isolated build
does not see that torch, and fetching another copy into every build would cost gigabytes; so this
backend adds the target environment's site-packages behind the isolated ones.
"""

import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import version
from typing import TypeVar

from setuptools import build_meta

MIN_TORCH = (2, 11)
Built = TypeVar("Built", str, list[str])


def _site_packages() -> list[str]:
    """Where the interpreter that runs the build keeps its packages, isolated or not."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += site.getsitepackages()
    if site.ENABLE_USER_SITE is not False:
        folders.append(site.getusersitepackages())
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]


def _find_torch() -> None:
    """Makes torch importable, or ends the build with one line that says how to get it."""
    if importlib.util.find_spec("torch") is None:
        sys.path.extend(folder for folder in _site_packages() if folder not in sys.path)
        importlib.invalidate_caches()
    wanted = f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"
    advice = (
        f"install {wanted} into the environment that runs this build and try again, "
        "or pass --no-build-isolation (python -m build: --no-isolation) if it is there"
    )
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            f"lminf_cuda is compiled against torch, and {sys.prefix} has none: {advice}"
        )
    found = version("torch")
    if tuple(int(part) for part in found.split(".")[:2]) < MIN_TORCH:
        raise SystemExit(f"lminf_cuda needs {wanted}, and {sys.prefix} has {found}: {advice}")


def _with_torch(hook: Callable[..., Built]) -> Callable[..., Built]:
    def run(*args: object, **kwargs: object) -> Built:
        _find_torch()
        return hook(*args, **kwargs)

    return run


get_requires_for_build_wheel = _with_torch(build_meta.get_requires_for_build_wheel)
get_requires_for_build_editable = _with_torch(build_meta.get_requires_for_build_editable)
get_requires_for_build_sdist = _with_torch(build_meta.get_requires_for_build_sdist)
prepare_metadata_for_build_wheel = _with_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch(build_meta.prepare_metadata_for_build_editable)
build_wheel = _with_torch(build_meta.build_wheel)
build_editable = _with_torch(build_meta.build_editable)
build_sdist = _with_torch(build_meta.build_sdist)
