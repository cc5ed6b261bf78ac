"""The sweeps that give a transport plan its marginals, with momentum."""

import math

import torch
from torch import Tensor

from recbole_mmdiff.transport.cost import Costs, Kernel

#: scalings beyond this are absorbed into the potentials; of beyond its square, the sweep is done in logs
ABSORBED = 1e5
#: entries
IN_CACHE = 2**18
#: sweeps after which the momentum is set anew
WINDOW = 6
#: the slowest rate of plain sweeps that it reckons with
SLOWEST = 0.9999


class Momentum:
    """Steps of log u: ``length`` times what a plain sweep would do, and ``carried`` times the last step.

    Near the solution a plain sweep multiplies the error by a matrix whose eigenvalues lie in [0, r], and r
    close to 1 makes it slow. With m = 1 - r, the heavy-ball method takes length 4 / (1 + sqrt(m))^2 and
    carries ((1 - sqrt(m)) / (1 + sqrt(m)))^2: errors fall by (1 - sqrt(m)) / (1 + sqrt(m)), the square root
    of as many sweeps. r is not known: it is the largest that the fall of the errors, window by window,
    speaks for. Errors that grow begin it anew.

    Source: Polyak, Some methods of speeding up the convergence of iteration methods, 1964; that it suits
    Sinkhorn's sweeps: Thibault et al., Overrelaxed Sinkhorn-Knopp, Algorithms 14, 2021, who relax both sides.
    """

    def __init__(self):
        self.restart()

    def restart(self, error: float | None = None) -> None:
        """Plain sweeps again."""
        self.length, self.carried, self.rate = 1.0, 0.0, 0.0
        self.errors = [] if error is None else [error]

    def see(self, error: float) -> None:
        """Take note of the error before a sweep."""
        self.errors.append(error)
        if len(self.errors) <= WINDOW or error == 0:
            return
        if not error < self.errors[0]:
            self.restart(error)
            return
        half = WINDOW // 2
        fall = (error / self.errors[half]) ** (1 / (WINDOW - half))
        if fall >= 1:
            fall = (error / self.errors[0]) ** (1 / WINDOW)
        # A faster fall than the square root of what is carried tells nothing: so fall all smaller rates.
        if fall**2 >= 0.9 * self.carried:
            rate = 1 - (1 + self.carried - fall - self.carried / fall) / self.length
            self.rate = min(SLOWEST, max(self.rate, rate))
        root = math.sqrt(1 - self.rate)
        self.length, self.carried = 4 / (1 + root) ** 2, ((1 - root) / (1 + root)) ** 2
        self.errors = [error]


def balanced(costs: Costs, masses: tuple[Tensor, Tensor], epsilon: float, f: Tensor, tolerance: float,
             max_sweeps: int, block_elements: int) -> tuple[Kernel, tuple[Tensor, Tensor], int, float]:
    """The plan u_i K_ij v_j with given marginals, and with the least <pi, Q> - epsilon H(pi).

    A sweep passes once over the kernel: it takes K v, which also tells the row sums of the plan before it,
    divides, goes on by ``Momentum``, and adds up K^T u. Scalings that grow are absorbed into the potentials
    of a new kernel; a sweep that overflows is done over again in logarithms, and without momentum.

    Args:
        costs: (n, m).
        masses: (n,) and (m,), positive, of equal sums.
        epsilon: in the unit of the costs.
        f: (n,) potentials to start from.
        tolerance: for the error, below which no further sweep is made.
        max_sweeps: if the error stays above.
        block_elements: as in ``Kernel``.

    Returns:
        The kernel; u (n,) and v (m,); how many sweeps; and the error: the sum of |row sum - mass| as a
        share of all mass. The columns are exact.
    """
    a, b = masses
    kernel, v = _with_exact_columns(Kernel(costs, epsilon, f, torch.zeros_like(b), block_elements), b)
    ones = torch.ones_like(a), torch.ones_like(b)
    scaling, sweeps, exact, total = (ones[0], v), 0, False, float(a.double().sum())
    momentum, step = Momentum(), ones[0]
    while True:
        swept, error = _sweep(kernel, scaling, a, b, momentum, step)
        ends = torch.stack([error, *(end for part in swept for end in part.aminmax())]).tolist()
        error, beyond = ends[0] / total, max(*ends[2::2], *(1 / max(end, 1e-300) for end in ends[1::2]))
        # Rounding of new potentials leaves the columns inexact until the next sweep.
        if (exact and error <= tolerance) or sweeps == max_sweeps:
            return kernel, scaling, sweeps, error
        sweeps += 1
        if not beyond <= ABSORBED**2:
            kernel, scaling, exact = _sweep_in_logs(_absorbed(kernel, scaling), a, b), ones, False
            momentum.restart()
            continue
        step = swept[0] / scaling[0]
        momentum.see(error)
        if beyond > ABSORBED:
            kernel, scaling, exact = _absorbed(kernel, swept), ones, False
        else:
            scaling, exact = swept, True


def _with_exact_columns(kernel: Kernel, b: Tensor) -> tuple[Kernel, Tensor]:
    """Potentials of the columns and v (m,) with which these sum to ``b``. Of a logarithm of sums, which takes
    an exponential of each entry, the largest term does: v makes up for the rest, a factor of up to n."""
    g = kernel.epsilon * (b.log() - kernel.column_maxima() - math.log(len(kernel.f)) / 2)
    kernel, sums = kernel.moved(kernel.f, g), torch.zeros_like(b)
    for _, part in kernel.blocks():
        sums += part.sum(0)
    return kernel, b / sums


def _sweep(kernel: Kernel, scaling: tuple[Tensor, Tensor], a: Tensor, b: Tensor, momentum: Momentum,
           step: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The next scalings, and the sum of |row sum - a| before; ``step`` (n,) is what u was multiplied by."""
    u, v = scaling
    products, moved, sums = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(v)
    for block, part in kernel.blocks():
        # In pieces that a cache holds, so that both products read an entry from memory once.
        for rows in torch.arange(block.start, block.stop).split(max(1, IN_CACHE // len(v))):
            piece = slice(int(rows[0]), int(rows[-1]) + 1)
            entries = part[piece.start - block.start:piece.stop - block.start]
            products[piece] = entries @ v
            moved[piece] = a[piece] / products[piece]
            if momentum.carried:
                moved[piece] = u[piece] * (moved[piece] / u[piece]) ** momentum.length \
                    * step[piece] ** momentum.carried
            sums.addmv_(entries.T, moved[piece])
    return (moved, b / sums), (u * products - a).abs().sum()


def _absorbed(kernel: Kernel, scaling: tuple[Tensor, Tensor]) -> Kernel:
    u, v = scaling
    return kernel.moved(kernel.f + kernel.epsilon * u.log(), kernel.g + kernel.epsilon * v.log())


def _sweep_in_logs(kernel: Kernel, a: Tensor, b: Tensor) -> Kernel:
    kernel = kernel.moved(kernel.f + kernel.epsilon * (a.log() - kernel.row_logsums()), kernel.g)
    return kernel.moved(kernel.f, kernel.g + kernel.epsilon * (b.log() - kernel.column_logsums()))
