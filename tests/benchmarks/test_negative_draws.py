"""Curricular negatives of a batch: known pairs as sorted rows against a users x items mask and a loop.

The shape of Amazon Baby: 19,445 users, 7,050 items, 117,352 known pairs, vectors of length 64, a tenth of
the items as candidates, a batch of 2,048 rows; float32, CPU, one thread. All ways take the same uniform
numbers and draw the same items. They are timed in turn.
"""

import math
import statistics
import time
from functools import partial

import pytest
import torch
from measuring import peak_bytes

from recbole_mmdiff.diffusion import keyed_uniform
from recbole_mmdiff.negatives import KnownItems, candidate_items, curricular_negatives

USERS, ITEMS, PAIRS, SIZE, ROWS, SHARE = 19_445, 7_050, 117_352, 64, 2_048, 0.1
LOOPED = 64                 # rows of the batch that the loop draws for
REQUIRED_RATIO = {"mask": 1.1, "loop": 10.0}     # 1.5 and 30 on a busy machine

pytestmark = pytest.mark.usefixtures("one_thread")


class Batch:
    """Random known pairs, a pool, and rows of a batch."""

    def __init__(self, num_items):
        generator = torch.Generator().manual_seed(1)
        # Some items are known to many users, and some users know many.
        draws = [torch.rand(PAIRS + PAIRS // 8, generator=generator) ** 2 for _ in range(2)]
        keys = torch.unique((draws[0] * USERS).long() * num_items + 1 + (draws[1] * (num_items - 1)).long())
        keys = keys[torch.randperm(len(keys), generator=generator)[:PAIRS]]
        assert len(keys) == PAIRS
        self.pairs = keys // num_items, keys % num_items
        self.known = KnownItems(*self.pairs, USERS, num_items)
        self.pool = torch.randn(num_items, SIZE, generator=generator)
        rows = torch.randperm(PAIRS, generator=generator)[:ROWS]
        self.users, self.positives = (ids[rows] for ids in self.pairs)
        self.candidates = candidate_items(num_items, SHARE, 7, "cpu")
        self.uniforms = keyed_uniform(rows, 1, 7, torch.float64)

    def ours(self, **keys):
        return curricular_negatives(self.pool, self.known, self.users, self.positives, self.candidates,
                                    SHARE, self.uniforms, **keys)

    def dense_mask(self):
        """What is known, (users, items) bool."""
        mask = torch.zeros(USERS, len(self.pool), dtype=torch.bool)
        mask[self.pairs] = True
        return mask

    def with_mask(self, mask):
        """The same with the rows and columns of ``mask`` that the batch needs."""
        similarity = self.pool[self.positives] @ self.pool[self.candidates].T
        left_out = mask[self.users][:, self.candidates] | (self.candidates == self.positives[:, None])
        most = math.ceil(SHARE * len(self.candidates))
        top = similarity.masked_fill(left_out, -math.inf).topk(most, dim=1).indices
        number = (SHARE * (~left_out).sum(1)).ceil().long()[:, None]
        return self.candidates[top.gather(1, (self.uniforms * number).long())]

    def looped(self):
        """The first rows, one after the other, with sets."""
        known = {}
        for user, item in zip(*(ids.tolist() for ids in self.pairs), strict=True):
            known.setdefault(user, set()).add(item)
        start, drawn = time.perf_counter(), []
        for row in range(LOOPED):
            user, positive = int(self.users[row]), int(self.positives[row])
            left = torch.tensor([item for item in self.candidates.tolist()
                                 if item not in known[user] and item != positive])
            similar = left[(self.pool[left] @ self.pool[positive]).argsort(descending=True)]
            drawn.append(int(similar[int(self.uniforms[row, 0] * math.ceil(SHARE * len(similar)))]))
        return drawn, (time.perf_counter() - start) * ROWS / LOOPED


def medians(functions, rounds):
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def test_equal_and_faster_at_the_shape_of_baby():
    batch = Batch(ITEMS)
    mask = batch.dense_mask()
    found = batch.ours()
    assert torch.equal(found, batch.with_mask(mask))
    assert not batch.known.contains(batch.users[:, None], found).any()
    assert found[:LOOPED, 0].tolist() == batch.looped()[0]
    # The machine may be busy with something else: a noisy round is measured again.
    for _ in range(3):
        seconds = medians({"ours": batch.ours, "mask": partial(batch.with_mask, mask)}, rounds=15)
        seconds["loop"] = batch.looped()[1]
        ratios = {name: seconds[name] / seconds["ours"] for name in REQUIRED_RATIO}
        if all(ratios[name] >= required for name, required in REQUIRED_RATIO.items()):
            break
    print(f"\n{ROWS:,} rows: ours {seconds['ours'] * 1e3:.1f} ms, dense mask {seconds['mask'] * 1e3:.1f} ms "
          f"= {ratios['mask']:.1f}x, loop {seconds['loop'] * 1e3:.0f} ms = {ratios['loop']:.0f}x")
    assert all(ratios[name] >= required for name, required in REQUIRED_RATIO.items())


def added_bytes(num_items, folder, **keys):
    """The most that is added to a batch: by our known pairs and draw, and by the mask and its draw."""
    batch = Batch(num_items)

    def ours():
        batch.known = KnownItems(*batch.pairs, USERS, num_items)
        return batch.ours(**keys)

    added = [peak_bytes(way, "cpu", folder / "trace.json")
             for way in (ours, lambda: batch.with_mask(batch.dense_mask()))]
    print(f"\n{num_items:,} items: ours adds {added[0] / 2**20:.0f} MiB, a dense mask "
          f"{added[1] / 2**20:.0f} MiB")
    return added


def test_memory_at_the_shape_of_baby(tmp_path):
    ours, mask = added_bytes(ITEMS, tmp_path)
    assert 0 < ours < mask / 4


@pytest.mark.slow
def test_memory_at_ten_times_the_items(tmp_path):
    """The mask grows tenfold; blocks of similarities, and what is known, do not."""
    ours, mask = added_bytes(10 * ITEMS, tmp_path, block_elements=2**20)
    assert 0 < ours < mask / 30
