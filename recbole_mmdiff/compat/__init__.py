"""The only place that works around RecBole 1.2 against today's numpy, pandas, scipy and torch.

Every workaround is a ``Patch`` of ``patches``: the RecBole modules that it mends, why, whether the
installed versions need it, and how to apply it. ``install`` registers an import hook that applies
them right after such a module has run, and mends those that are loaded already. Nothing outside
RecBole changes: a mended module sees numpy, torch, ... through a ``Namespace`` that replaces a few
names (patch 12 alone takes back a global switch that RecBole turned). Spawned workers are mended
too, for unpickling any of our objects imports this package.

Neither torch nor RecBole is imported here before a RecBole module is.
"""

from recbole_mmdiff.compat import patches
from recbole_mmdiff.compat.mending import PATCHES, Namespace, Patch, active_patches, install, release

__all__ = ["PATCHES", "Namespace", "Patch", "active_patches", "install", "patches", "release"]
