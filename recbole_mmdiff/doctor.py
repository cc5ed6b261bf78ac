"""What is installed, what is mended and what is missing: the first thing to attach to a bug report.

Run it with ``python -m recbole_mmdiff.doctor``. The exit code is 1 if something required is missing
or of an unsupported version. Versions are read from the packages' metadata; of the heavy packages
only torch is imported, for the devices.
"""

import os
import platform
import sys
from importlib import metadata

from recbole_mmdiff import __version__
from recbole_mmdiff.compat import active_patches, release

REQUIRED = {
    "recbole": ((1, 2), (1, 3)),
    "torch": ((2, 6), None),
    "numpy": ((1, 24), None),
    "pandas": ((2, 0), None),
    "scipy": ((1, 10), None),
    "scikit-learn": ((1, 2), None),
    "PyYAML": ((6, 0), None),
}
"""Package: oldest supported release, first one that is not supported any more."""

OPTIONAL = {
    "transformers": "features",
    "sentence-transformers": "features",
    "pillow": "features",
    "polars": "prep",
    "matplotlib": "viz",
    "optuna": "tune",
    "hyperopt": None,
    "ray": None,
    "diffusers": "test",
    "POT": "test",
}
"""Package: the extra of recbole-mmdiff that brings it; None if only RecBole's own tools use it."""


def problems() -> list[str]:
    """One line for every required package that is missing or unsupported, with what to do."""
    found = []
    for package, (oldest, end) in REQUIRED.items():
        wanted = f"{package}>={_dotted(oldest)}" + (f",<{_dotted(end)}" if end else "")
        have = release(package)
        if not have:
            found.append(f'{package} is not installed: pip install "{wanted}"')
        elif have < oldest or (end and have >= end):
            version = metadata.version(package)
            found.append(f'{package} {version} is not supported: pip install "{wanted}"')
    return found


def report() -> str:
    """Versions, active patches, devices and what is missing, as text for people."""
    sections = {
        "Versions": _versions(),
        "Active patches of RecBole": [f"{p.number}. {p.reason}" for p in active_patches()],
        "Devices": _devices(),
        "Optional, not installed": _missing_extras(),
        "Problems": problems() or ["none"],
    }
    return "\n\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)])
        for title, lines in sections.items()
        if lines
    )


def main() -> int:
    """Print the report; 1 if something required is missing or unsupported, else 0."""
    print(report())
    return 1 if problems() else 0


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _versions() -> list[str]:
    lines = [
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"recbole-mmdiff {__version__}",
    ]
    for package in (*REQUIRED, *OPTIONAL):
        if release(package):
            lines.append(f"{package} {metadata.version(package)}")
        elif package in REQUIRED:
            lines.append(f"{package} missing")
    return lines


def _devices() -> list[str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch links to is missing.
        return [f"unknown, torch cannot be imported: {error}"]
    lines = [f"cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}: {device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("no CUDA device: models train on the CPU")
    return lines


def _missing_extras() -> list[str]:
    return [
        f'{package}: pip install "recbole-mmdiff[{extra}]"'
        for package, extra in OPTIONAL.items()
        if extra and not release(package)
    ]


if __name__ == "__main__":
    sys.exit(main())
