"""How patches are registered, and applied to RecBole's modules when these are imported."""

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from types import ModuleType
from typing import Any

_MARK = "_recbole_mmdiff_patches"  # Module attribute: the patches that were applied to it.


@dataclass(frozen=True)
class Patch:
    """One workaround: ``apply`` changes a module after it ran, if ``needed()``.

    ``number`` is the same for the patches that mend one breakage, ``modules`` a regular expression
    for the names of the modules concerned. With ``around``, ``apply`` is instead a context manager
    that holds while the module runs.
    """

    number: int
    name: str
    modules: str
    reason: str
    needed: Callable[[], bool]
    apply: Callable[[ModuleType], Any]
    around: bool = False


PATCHES: list[Patch] = []


def patch(
    number: int,
    modules: str,
    needed: Callable[[], bool] = lambda: True,
    around: bool = False,
    **since: tuple[int, ...],
) -> Callable:
    """Register the decorated function as a patch; the first line of its docstring is the reason.

    It is needed from the releases of other packages named in ``since`` on.
    """

    def is_needed() -> bool:
        return needed() and all(release(package) >= first for package, first in since.items())

    def register(apply: Callable) -> Callable:
        name, reason = apply.__name__.strip("_"), apply.__doc__.splitlines()[0]
        PATCHES.append(Patch(number, name, f"recbole.{modules}", reason, is_needed, apply, around))
        return apply

    return register


@cache
def release(package: str) -> tuple[int, ...]:
    """The installed release of a package, (2, 4, 6) for "2.4.6"; () if it is not installed."""
    try:
        return tuple(map(int, re.findall(r"\d+", metadata.version(package))[:3]))
    except metadata.PackageNotFoundError:
        return ()


def active_patches() -> list[Patch]:
    """The patches that the installed versions need, in order of number."""
    return sorted((found for found in PATCHES if found.needed()), key=lambda found: found.number)


def install() -> None:
    """Mend RecBole's modules: those loaded already now, the others when they are imported.

    May be called again without effect.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in [name for name in sys.modules if _patches_for(name)]:
        _mend(sys.modules[name])


def _patches_for(name: str) -> list[Patch]:
    if not name.startswith("recbole."):
        return []
    return [found for found in PATCHES if re.fullmatch(found.modules, name) and found.needed()]


def _mend(module: ModuleType) -> None:
    applied = vars(module).setdefault(_MARK, set())
    for found in _patches_for(module.__name__):
        if found.name not in applied and not found.around:
            found.apply(module)
            applied.add(found.name)


def _run_mended(run: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Run a module that is being imported, and mend it."""
    vars(module).pop(_MARK, None)  # A reloaded module starts anew but keeps its attributes.
    with ExitStack() as stack:
        for found in _patches_for(module.__name__):
            if found.around:
                stack.enter_context(found.apply(module))
        run(module)
    _mend(module)


class _Finder:
    """Finds the modules that have patches as the other finders do, and has them mended."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if not _patches_for(name):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (other.find_spec(name, path, target) for other in others)), None)
        if spec is not None:  # Every module of a folder has a loader of its own.
            spec.loader.exec_module = partial(_run_mended, spec.loader.exec_module)
        return spec


class Namespace(ModuleType):
    """A module of which a few names are replaced; every other name is looked up in the original."""

    def __init__(self, original: ModuleType, **names: Any) -> None:
        super().__init__(original.__name__)
        vars(self).update(names, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_original"], name)
