"""What a solver says about how it ended."""

import warnings
from typing import NamedTuple


class NotConverged(UserWarning):
    """A solver used up its iterations before its error fell below the tolerance."""


class SolverLog(NamedTuple):
    """How a solver ended.

    Attributes:
        iterations: how many it took.
        error: what remained of what it brings to zero; the solver's documentation says what that is.
        converged: whether ``error`` is within the tolerance.
        objectives: the objective before the first iteration and after each (empty if it costs too much).
    """

    iterations: int
    error: float
    converged: bool
    objectives: tuple[float, ...] = ()


def ended(solver: str, iterations: int, error: float, tolerance: float,
          objectives: tuple[float, ...] = ()) -> SolverLog:
    """The log of a solver; warns if ``error`` exceeds ``tolerance``, or is NaN."""
    converged = error <= tolerance
    if not converged:
        warnings.warn(f"{solver}: error {error:.2e} after {iterations} iterations, above the tolerance "
                      f"{tolerance:.0e}; allow more iterations or a larger tolerance", NotConverged,
                      stacklevel=3)
    return SolverLog(iterations, error, converged, objectives)
