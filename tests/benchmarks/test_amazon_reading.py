"""From raw reviews to 5-core atomic files, against plain loops, and at ten million reviews.

Theirs: ``json.loads`` line by line into dicts, and a k-core that counts dicts until nothing changes, as
preprocessing scripts do it. Ours: ``prepare``, which also checks every line, hashes the file and writes a
record. Both write the same rows.
"""

import gzip
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dataset_prep.filters import Filters
from dataset_prep.pipeline import Source, prepare

ROOT = Path(__file__).resolve().parents[2]
REQUIRED_RATIO = 1.5     # 2.7 to 4.0 on two idle cores; ours uses both, so a busy machine hurts it more
LEAST_RATE = 15e6        # bytes of text a second, on two cores that may be busy: 27e6 at a load of seven
REVIEWS = 200_000
MANY = 10_000_000
MEMORY = 8 << 30
K = 5


def texts(draw, count=20_000):
    """Reviews of a heavy-tailed length, 80 words on average, with the odd character that JSON escapes."""
    words = np.array(["".join(draw.choice(list("etaoinshrdlu"), draw.integers(2, 9))) for _ in range(3000)])
    words[:3] = ['"so"', "naïve\\", "it's"]
    lengths = np.clip(draw.lognormal(4.0, 0.85, count), 1, 3000).astype(int)
    return np.array([" ".join(draw.choice(words, length)) for length in lengths], dtype=object)


def write_reviews(path, count, seed=0, batch=250_000):
    """``count`` reviews in the layout of 2014: popular items, users of a few reviews and some of many."""
    draw = np.random.default_rng(seed)
    pool, users, items = texts(draw), max(count // 8, 10), max(count // 40, 10)
    with open(path, "wb") as file:
        for start in range(0, count, batch):
            size = min(batch, count - start)
            user = (users * draw.random(size) ** 2).astype(int)
            item = (items * draw.random(size) ** 3).astype(int)
            times = draw.integers(9 * 10**8, 14 * 10**8, size)
            pl.DataFrame({"user": user, "item": item}).select(
                reviewerID=pl.format("A{}", pl.col("user").cast(pl.String).str.zfill(13)),
                asin=pl.format("B{}", pl.col("item").cast(pl.String).str.zfill(9)),
                reviewerName=pl.lit("J. Doe \"reader\""),
                helpful=pl.lit(pl.Series([[0, 1]])).first(),
                reviewText=pl.Series(pool[draw.integers(len(pool), size=size)], dtype=pl.String),
                overall=pl.Series(draw.integers(1, 6, size).astype(float)),
                summary=pl.lit("as good as it gets"),
                unixReviewTime=pl.Series(times),
                reviewTime=pl.lit("09 12, 2006")).write_ndjson(file)
    return path


def plain_five_core(path):
    """The 5-core of a file, read and filtered by plain loops: sorted (user, time, item, rating)."""
    last = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            review = json.loads(line)
            key, when = (review["reviewerID"], review["asin"]), review["unixReviewTime"]
            if key not in last or when >= last[key][0]:
                last[key] = (when, review["overall"])
    rows, before = last, None
    while before != len(rows):
        before = len(rows)
        users, items = Counter(user for user, _ in rows), Counter(item for _, item in rows)
        rows = {key: value for key, value in rows.items() if users[key[0]] >= K and items[key[1]] >= K}
    return sorted((user, when, item, rating) for (user, item), (when, rating) in rows.items())


def plain_file(path, target):
    with open(target, "w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\trating:float\ttimestamp:float\n")
        file.writelines(f"{user}\t{item}\t{rating}\t{when}\n"
                        for user, when, item, rating in plain_five_core(path))


def test_faster_than_plain_loops(tmp_path):
    raw = write_reviews(tmp_path / "reviews.json", REVIEWS)
    seconds = {"ours": [], "plain": []}
    for _ in range(2):
        start = time.perf_counter()
        prepare([Source("ours", "2014", raw)], Filters(k_core=K), tmp_path)
        seconds["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        plain_file(raw, tmp_path / "plain.inter")
        seconds["plain"].append(time.perf_counter() - start)
    ours = (tmp_path / "ours" / "ours.inter").read_bytes()
    assert ours == (tmp_path / "plain.inter").read_bytes()
    assert ours.count(b"\n") > REVIEWS / 4
    ratio = min(seconds["plain"]) / min(seconds["ours"])
    size = raw.stat().st_size / 1e6
    print(f"\n{REVIEWS:,} reviews, {size:,.0f} MB: ours {min(seconds['ours']):.2f} s "
          f"({size / min(seconds['ours']):.0f} MB/s), plain {min(seconds['plain']):.2f} s, ratio {ratio:.1f}")
    assert ratio >= REQUIRED_RATIO
    assert raw.stat().st_size / min(seconds["ours"]) >= LEAST_RATE


PROGRAM = """
import os, resource, sys
if hasattr(os, "sched_setaffinity"):    # before polars counts the cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
from pathlib import Path
from dataset_prep.filters import Filters
from dataset_prep.pipeline import Source, prepare
prepare([Source("large", "2014", Path(sys.argv[1]))], Filters(k_core=5), Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [False, True])
def test_ten_million_reviews_in_bounded_memory(tmp_path, zipped):
    raw = write_reviews(tmp_path / "reviews.json", MANY)
    size = raw.stat().st_size
    if zipped:
        plain, raw = raw, tmp_path / "reviews.json.gz"
        with open(plain, "rb") as source, gzip.open(raw, "wb", compresslevel=1) as target:
            while block := source.read(1 << 24):
                target.write(block)
        plain.unlink()
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROGRAM, raw, tmp_path], cwd=ROOT, check=True,
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    seconds, peak = time.perf_counter() - start, int(done.stdout) * 1024
    record = json.loads((tmp_path / "large" / "large.prep.json").read_text())
    print(f"\n{MANY:,} reviews, {size / 1e9:.1f} GB{' (gzip)' if zipped else ''}: {seconds:.0f} s, "
          f"{size / 1e6 / seconds:.0f} MB/s, peak {peak / 2**30:.2f} GiB, {record['counts']}")
    raw.unlink()
    assert record["raw"][0]["lines"] == MANY
    assert record["counts"]["ratings"] > MANY / 4
    assert peak < MEMORY
    assert size / seconds >= LEAST_RATE
