"""MCDRec's convolutional U-Net on vectors that are read as images."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.diffusion._checks import check_count, check_interval
from recbole_mmdiff.diffusion.denoisers import check_time_dim, embedded_time


class ConvUNet(nn.Module):
    """A U-Net of convolutions over a noisy vector and its conditions, each a channel of the input.

    Ma et al., Multimodal Conditioned Diffusion Model for Recommendation, WWW 2024 companion: a vector of
    length ``d`` is an image of sqrt(d) x sqrt(d), and the network predicts the first channel without its
    noise. The paper leaves open what the U-Net is made of. Here a level of the way down is
    ``num_blocks`` residual blocks (Ho et al. 2020) of ``multiplier * channels`` maps, images are halved
    between levels by averages and doubled again by repetition, one block stands in the middle, and the
    first block of a level on the way up also takes what the way down ended with there. Nothing
    normalises the last maps: the length of a vector tells something, too.

    Args:
        dim: length of the vectors, a square; its root must be divisible by 2 for each level but one.
        num_conditions: vectors beside the noisy one, 0 or more.
        channels: maps of the first level, 2 at least.
        multipliers: maps of each level, in ``channels``.
        num_blocks: residual blocks of a level.
        time_dim: length of the sinusoidal embedding, even.
        dropout: share of the maps that a block drops, whole maps of a row.

    Raises:
        ValueError: an argument outside of what is said above.
    """

    def __init__(
        self,
        dim: int,
        num_conditions: int,
        channels: int = 8,
        multipliers: tuple[int, ...] = (1, 2),
        num_blocks: int = 2,
        time_dim: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("num_conditions", num_conditions, minimum=0)
        check_count("channels", channels, minimum=2)
        check_count("num_blocks", num_blocks)
        check_time_dim("time_dim", time_dim)
        check_interval("dropout", dropout, 0.0, 1.0)
        for index, multiplier in enumerate(multipliers):
            check_count(f"multipliers[{index}]", multiplier)
        self.side, self.dropout = _side(dim, len(multipliers)), dropout
        widths = [channels * multiplier for multiplier in multipliers]

        def level(inputs: int, width: int) -> nn.ModuleList:
            sizes = pairwise([inputs, *[width] * num_blocks])
            return nn.ModuleList(_Block(*size, time_dim) for size in sizes)

        self.time = nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU())
        self.input = nn.Conv2d(1 + num_conditions, channels, 3, padding=1)
        self.down = nn.ModuleList(level(*size) for size in pairwise([channels, *widths]))
        self.middle = _Block(widths[-1], widths[-1], time_dim)
        self.up = nn.ModuleList(level(before + width, width)
                                for before, width in pairwise([widths[-1], *reversed(widths)]))
        self.output = nn.Conv2d(channels * multipliers[0], 1, 3, padding=1)
        blocks = [module for module in self.modules() if isinstance(module, _Block)]
        self.block_maps = [block.second.out_channels for block in blocks]

    @property
    def num_maps(self) -> int:
        """How many maps of a row dropout decides on."""
        return sum(self.block_maps)

    def forward(self, x: Tensor, t: float | Tensor, conditions: Tensor | None = None,
                uniforms: Tensor | None = None) -> Tensor:
        """The prediction (n, d).

        ``x (n, d)``; ``t`` a float or ``(n,)``, as the sinusoids take it; ``conditions (n, m, d)``, zero
        where a row lacks one, None if m = 0; ``uniforms (n, num_maps)`` in [0, 1): maps whose number
        is below ``dropout`` are dropped; None drops nothing.
        """
        image = x[:, None] if conditions is None else torch.cat([x[:, None], conditions.to(x.dtype)], 1)
        image = image.view(len(x), -1, self.side, self.side)
        time = self.time(embedded_time(t, self.time[0]))
        kept = iter(self._kept(uniforms, x.dtype))
        maps, skips = self.input(image), []
        for number, level in enumerate(self.down):
            maps = functional.avg_pool2d(maps, 2) if number else maps
            for block in level:
                maps = block(maps, time, next(kept))
            skips.append(maps)
        maps = self.middle(maps, time, next(kept))
        for number, level in enumerate(self.up):
            maps = functional.interpolate(maps, scale_factor=2) if number else maps
            maps = torch.cat([maps, skips.pop()], 1)
            for block in level:
                maps = block(maps, time, next(kept))
        return self.output(functional.silu(maps)).reshape(x.shape)

    def _kept(self, uniforms: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
        """For each block (n, maps, 1, 1): 0 where a map is dropped, else what makes up for the others."""
        if uniforms is None or not self.dropout:
            return [None] * len(self.block_maps)
        kept = (uniforms >= self.dropout).to(dtype) / (1 - self.dropout)
        return [part[:, :, None, None] for part in kept.split(self.block_maps, 1)]


class _Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + W t))), with a 1 x 1 convolution of x to other widths."""

    def __init__(self, inputs: int, outputs: int, time_dim: int) -> None:
        super().__init__()
        # One group: with one for each map the norm would take out what the time adds to a map.
        self.first_norm, self.second_norm = nn.GroupNorm(1, inputs), nn.GroupNorm(1, outputs)
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time_linear = nn.Linear(time_dim, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, maps: Tensor, time: Tensor, kept: Tensor | None) -> Tensor:
        hidden = self.first(functional.silu(self.first_norm(maps)))
        hidden = hidden + self.time_linear(time)[..., None, None]
        hidden = functional.silu(self.second_norm(hidden))
        return self.shortcut(maps) + self.second(hidden if kept is None else hidden * kept)


def _side(dim: int, levels: int) -> int:
    """The side of the image of a vector."""
    check_count("dim", dim)
    side, factor = math.isqrt(dim), 2 ** (levels - 1)
    if levels < 1:
        raise ValueError("multipliers=() must hold at least one number, one a level")
    if side * side != dim or side % factor:
        raise ValueError(f"dim={dim!r} is no image of {levels} levels; accepted: squares of multiples of "
                         f"{factor}, such as {(8 * factor) ** 2}")
    return side
