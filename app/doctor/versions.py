"""Versions of Python and of libraries, against what the project's own metadata supports."""

import platform
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from app.doctor.findings import Problem, Section

OPTIONAL = ("transformers", "ray")
"""Shown where they are installed; nothing needs them."""


def check_versions(found: dict[str, str] | None = None) -> Section:
    """Every library that growmoe requires: its version, the supported range, and whether it lies in it.

    Args:
        found: versions to judge instead of those installed.
    """
    section = Section("Versions", ("what", "version", "supported"))
    found = installed_versions() if found is None else found
    ranges = _supported()
    section.rows.append(("growmoe", found.get("growmoe", "not installed"), ""))
    if not ranges:
        fix = "run pip install --editable . in the checkout, or make demo, which makes .venv"
        section.problems.append(Problem("growmoe is not installed, so supported versions are not known", fix, False))
    for name, supported in ranges.items():
        version = found.get(name)
        section.rows.append((name, version or "missing", str(supported) or "any"))
        command = f'pip install "{name}{supported}"'
        if version is None:
            section.problems.append(Problem(f"{name} is not installed", command))
        elif not supported.contains(version, prereleases=True):
            section.problems.append(Problem(f"{name} {version} is not in the supported range {supported}", command))
    section.rows += [(name, found[name], "optional") for name in OPTIONAL if name in found]
    section.rows.append(("CUDA of torch", _cuda(), ""))
    return section


def installed_versions() -> dict[str, str]:
    """Versions by name, of Python and of all that growmoe requires, where they are installed; imports nothing."""
    versions = {"python": platform.python_version()}
    for name in ("growmoe", *_supported(), *OPTIONAL):
        try:
            versions.setdefault(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return versions


def _supported() -> dict[str, SpecifierSet]:
    """The ranges in the project's metadata, Python's first; none where the project is not installed."""
    try:
        about = metadata.distribution("growmoe")
    except metadata.PackageNotFoundError:
        return {}
    required = [Requirement(line) for line in about.requires or []]
    ranges = {"python": SpecifierSet(about.metadata["Requires-Python"])}
    return ranges | {each.name: each.specifier for each in required if each.marker is None}


def _cuda() -> str:
    import torch

    version = torch.version.cuda
    return "none (a CPU build)" if version is None else f"{version}, cuDNN {torch.backends.cudnn.version()}"
