"""Small data shared by all tests: a synthetic pair of domains, and the real pair where it exists."""

import csv
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Every run tries the same examples, however busy the machine is.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# The helpers of the tests explain a failed assertion as tests do.
pytest.register_assert_rewrite("contract", "running")

ROOT = Path(__file__).resolve().parent.parent
HEADER = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
LABEL = "x_label:float"


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
#: what the items of each taste group look like: the corners of a tetrahedron
CORNERS = np.array([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)], dtype=float)


def taste_of(token):
    """The taste group of a user or an item of the taste pair."""
    return int(token.lstrip("usti")) % TASTES


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
    looks = {row[1]: CORNERS[taste_of(row[1])] for row in rows["src"] + rows["tgt"]}
    return TinyPair(Path(folder), members, [], [], rows["src"], rows["tgt"], looks=looks)


@dataclass(frozen=True)
class TasteDomain:
    """One domain of taste groups, divided by a column ``x_label``, with features of its items.

    Attributes:
        folder: the data path; holds ``tgt/tgt.inter`` and the features ``text`` and ``image``.
        rows: (user, item, rating, time, label) as text: training rows first, so that other held-out
            rows leave all ids as they are.
        cold: tokens of the users without a training row.
        new: token of an item without a training row.
        taste_of: the taste group of a user's or an item's token.
    """

    taste_of = staticmethod(taste_of)
    folder: Path
    rows: list[tuple[str, str, str, str, str]]
    cold: list[str]
    new: str

    def write(self, folder, rows):
        """The same with other rows, in another folder."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        write_domain(folder, "tgt", rows, [*HEADER, LABEL])
        return replace(self, folder=Path(folder), rows=rows)


def build_taste_domain(pair, folder):
    """The target of the taste pair by itself. Of what a user likes, one item is for the test, one for
    validation, the others for training; what the cold users rate is for the test."""
    cold, new, rows, liked = [f"u{number:03}" for number in range(6)], "ti2", [], Counter()
    for user, item, rating, time in pair.target_rows:
        if user in cold or item == new:
            label = 2
        elif int(rating) < 4:
            label = 0
        else:
            label = max(0, 2 - liked[user])
            liked[user] += 1
        rows.append((user, item, rating, time, str(label)))
    rows.sort(key=lambda row: row[-1])
    write_domain(folder, pair.target, rows, [*HEADER, LABEL])
    return TasteDomain(Path(folder), rows, cold, new)


def build_toy_domain(folder, users=7, items=12):
    """Rows of a few users and items of uneven degrees, with features ``text`` and ``image``: ``i0`` has
    neither, ``i1`` no image, ``i2`` no text and ``i3`` a text of zeros, ``i5`` the text of ``i4``; ``u6``
    has no training row."""
    from recbole_mmdiff.data.features import write_features

    draw = np.random.default_rng(5)
    favour = 1 / np.arange(1, items + 1)
    rows = []
    for user in range(users):
        chosen = draw.choice(items, size=3 + user % 4, replace=False, p=favour / favour.sum())
        labels = ["2"] * len(chosen) if user == users - 1 else ["2", "1", *"0" * (len(chosen) - 2)]
        rows += [(f"u{user}", f"i{item}", "5", str(number), label)
                 for number, (item, label) in enumerate(zip(chosen, labels, strict=True))]
    # Everybody has a row more, so that every item stands in the file.
    rows += [(f"u{item % (users - 1)}", f"i{item}", "5", "9", "0") for item in range(items)
             if (f"u{item % (users - 1)}", f"i{item}") not in {row[:2] for row in rows}]
    rows.sort(key=lambda row: row[-1])
    write_domain(folder, "tgt", rows, [*HEADER, LABEL])
    for name, dim, without in (("text", 4, (0, 2)), ("image", 3, (0, 1))):
        matrix = draw.normal(1.0, 1.0, size=(items, dim)).astype(np.float32)
        if name == "text":
            matrix[3], matrix[5] = 0, matrix[4]
        kept = [item for item in range(items) if item not in without]
        write_features(Path(folder) / "tgt", "tgt", name, [f"i{item}" for item in kept], matrix[kept],
                       encoder="test")
    return Path(folder)


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
def taste_domain(taste_pair, tmp_path_factory):
    """One domain of taste groups whose items' features tell their group; nobody writes into its folder.
    Some items have no image, one has no text, one has neither."""
    from running import write_item_features

    domain = build_taste_domain(taste_pair, tmp_path_factory.mktemp("domain"))
    without = {"image": {f"ti{number}" for number in range(0, 80, 9)}, "text": {"ti0", "ti40"}}
    pair = replace(taste_pair, folder=domain.folder, source_rows=[])
    write_item_features(pair, without=without, signal=2.0)
    return domain


@pytest.fixture(scope="session")
def ranking_config(tiny_config, taste_domain):
    """``ranking_config(model, **keys)``: a ``config_dict`` of a ranking model on that domain; the key
    ``data_path`` moves it elsewhere."""
    from running import RANKING

    def config(model, **keys):
        return tiny_config(model, **{**RANKING, "data_path": taste_domain.folder, **keys})

    return config


@pytest.fixture(scope="session")
def toy_domain(tmp_path_factory):
    """The folder of a toy domain, small enough to compute by hand; nobody writes into it."""
    return build_toy_domain(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def build_toy(ranking_config, toy_domain):
    """``build_toy(model, **keys)``: the model on the toy domain, untrained, and the training part."""
    from recbole_mmdiff.config import Config
    from recbole_mmdiff.data.preparation import prepare_parts

    def build(model, **keys):
        keys = {"embedding_size": 3, "data_path": toy_domain, **keys}
        config = Config(config_dict=ranking_config(model, **keys))
        train = prepare_parts(config).train
        torch.manual_seed(4)
        return config.model_class(config, train), train

    return build


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
