"""Cross-domain and multimodal diffusion recommenders for RecBole.

Importing the package mends RecBole for today's numpy, pandas, scipy and torch (see ``compat``).
It imports neither torch nor RecBole, so that the low rooms (``diffusion``, ``transport``,
``graph``, ``negatives``) stay usable alone.
"""

from recbole_mmdiff import compat

__version__ = "0.1.0"

compat.install()
