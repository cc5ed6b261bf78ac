"""Small data shared by all tests: a synthetic pair of domains, and the real pair where it exists."""

import csv
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

# The helpers of the tests explain a failed assertion as tests do.
pytest.register_assert_rewrite("contract", "running")

ROOT = Path(__file__).resolve().parent.parent
HEADER = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]


@dataclass(frozen=True)
class TinyPair:
    """Two small domains on disk, and who is who in them.

    Attributes:
        folder: the data path; holds ``src/src.inter`` and ``tgt/tgt.inter``.
        overlap, target_only, source_only: sorted user tokens.
        source_rows, target_rows: (user, item, rating, time) as text, in the order of the files.
        looks: item token -> (3,), what its ratings came of; empty where there is no such thing.
    """

    folder: Path
    overlap: list[str]
    target_only: list[str]
    source_only: list[str]
    source_rows: list[tuple[str, str, str, str]]
    target_rows: list[tuple[str, str, str, str]]
    source: str = "src"
    target: str = "tgt"
    looks: dict[str, np.ndarray] = field(default_factory=dict)


def write_domain(folder, name, rows, header=HEADER):
    """Write ``folder/name/name.inter``; the rows are sequences of text."""
    path = Path(folder) / name / f"{name}.inter"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in [header, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_rows(path):
    """The rows of an atomic file by the csv module, without its header."""
    with open(path, encoding="utf-8", newline="") as file:
        return [tuple(row) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][1:]


def build_tiny_pair(folder, seed=7, per_user=(9, 15), choosy=False):
    """Ratings 1-5 out of a taste that users carry between domains: bias plus two factors. With
    ``choosy`` users mostly rate what looks to their taste, so that their items tell it."""
    shuffle, draw = random.Random(seed), np.random.default_rng(seed)
    users = [f"u{number:03}" for number in range(100)]
    shuffle.shuffle(users)
    overlap, target_only, source_only = users[:60], users[60:80], users[80:]
    taste = {user: draw.normal(size=3) for user in users}
    rows, all_looks = {}, {}
    for name, count, members in (("src", 40, overlap + source_only),
                                 ("tgt", 50, overlap + target_only)):
        items = [f"{name[0]}i{number}" for number in range(count)]
        looks = {item: draw.normal(size=3) for item in items}
        all_looks |= looks
        rows[name] = []
        for user in members:
            liking = np.exp(1.5 * np.stack(list(looks.values()))[:, 1:] @ taste[user][1:])
            share = liking / liking.sum() if choosy else None
            chosen = draw.choice(count, size=draw.integers(*per_user), replace=False, p=share)
            for item in (items[number] for number in chosen):
                score = 3.3 + 0.7 * taste[user][0] + 0.5 * looks[item][0] \
                    + 0.5 * float(taste[user][1:] @ looks[item][1:]) + 0.3 * draw.normal()
                rating = int(np.clip(round(score), 1, 5))
                rows[name].append((user, item, str(rating), str(int(draw.integers(10**6)))))
        shuffle.shuffle(rows[name])
        write_domain(folder, name, rows[name])
    return TinyPair(Path(folder), sorted(overlap), sorted(target_only), sorted(source_only),
                    rows["src"], rows["tgt"], looks=all_looks)


TASTES = 4


def taste_of(user):
    """The taste group of a user of the taste pair."""
    return int(user[1:]) % TASTES


def build_taste_pair(folder, seed=7, users=240, items=80, per_user=10, loyalty=0.85):
    """Users like the items of their group (4 or 5) and rate some others (1 to 3), in both domains.

    All users are in both domains, and no group or item is preferred: only the source rows tell what
    a cold user likes in the target.
    """
    draw = np.random.default_rng(seed)
    members = [f"u{number:03}" for number in range(users)]
    rows = {}
    for name in ("src", "tgt"):
        groups = [[f"{name[0]}i{number}" for number in range(taste, items, TASTES)]
                  for taste in range(TASTES)]
        rows[name] = []
        for user in members:
            own = groups[taste_of(user)]
            others = [item for group in groups if group is not own for item in group]
            liked = draw.binomial(per_user, loyalty)
            rated = [(item, draw.integers(4, 6)) for item in draw.choice(own, liked, replace=False)] \
                + [(item, draw.integers(1, 4))
                   for item in draw.choice(others, per_user - liked, replace=False)]
            rows[name] += [(user, str(item), str(rating), str(draw.integers(10**6)))
                           for item, rating in rated]
        write_domain(folder, name, rows[name])
    return TinyPair(Path(folder), members, [], [], rows["src"], rows["tgt"])


def swap_sources(pair, folder):
    """The taste pair with the source rows of other users: a quarter of each group gets those of its
    own, of the next, of the one after and of the last, so that they tell nothing."""
    def other(user):
        number = int(user[1:])
        place, taste = divmod(number, TASTES)
        return f"u{place * TASTES + (taste + place) % TASTES:03}"

    source = [(other(user), *rest) for user, *rest in pair.source_rows]
    write_domain(folder, pair.source, source)
    write_domain(folder, pair.target, pair.target_rows)
    return TinyPair(Path(folder), pair.overlap, [], [], source, pair.target_rows)


def config_for(folder, model, **keys):
    """``config_dict`` of a short, quiet run of ``model`` on the pair in ``folder``."""
    return {"model": model, "data_path": str(folder), "source_domain": {"dataset": "src"},
            "target_domain": {"dataset": "tgt"}, "use_gpu": False, "show_progress": False,
            "log_tensorboard": False, "state": "WARNING", "epochs": 2, "train_batch_size": 256,
            "topk": [5, 10], "valid_metric": "NDCG@10", **keys}


@pytest.fixture(autouse=True, scope="module")
def one_thread(request):
    """Tensors here are small, and the machine is shared; benchmarks choose for themselves. Of module
    scope, so that it also holds for the runs that fixtures make: threads change the last bits."""
    before = torch.get_num_threads()
    if "benchmarks" not in request.path.parts:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_tiny_pair():
    """The builder, for tests that need a pair of their own: ``make_tiny_pair(folder, seed=7)``."""
    return build_tiny_pair


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    """The pair of domains that tests share; nobody writes into its folder."""
    return build_tiny_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def taste_pair(tmp_path_factory):
    """The pair of taste groups; nobody writes into its folder."""
    return build_taste_pair(tmp_path_factory.mktemp("taste"))


@pytest.fixture(scope="session")
def swapped_pair(taste_pair, tmp_path_factory):
    """The same with source rows that tell nothing of their users."""
    return swap_sources(taste_pair, tmp_path_factory.mktemp("swapped"))


@pytest.fixture(scope="session")
def tiny_config(tiny_pair):
    """``tiny_config(model, **keys)``: a ``config_dict``; the key ``data_path`` moves it elsewhere."""

    def config(model, **keys):
        folder = keys.pop("data_path", tiny_pair.folder)
        return config_for(folder, model, **keys)

    return config


@pytest.fixture(scope="session")
def atomic():
    """``atomic.write(folder, name, rows, header)`` and ``atomic.read(path)`` of atomic files."""

    class Atomic:
        write, read, header = staticmethod(write_domain), staticmethod(read_rows), HEADER

    return Atomic


@pytest.fixture(scope="session")
def real_pair():
    """The folder of real data beside the checkout (``ml1m-drama``, ``ml1m-action``)."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data are not beside the checkout")
    return folder
