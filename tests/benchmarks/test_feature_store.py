"""Item features from the store against RecBole's text form read by RecBole: 20,000 items x 384.

Both sides end with float32 rows in the order of the item ids; the rows are compared. The store
also is timed until it is open, when no row has been read.
"""

import statistics
import time

import numpy as np
import pytest
from recbole.data.dataset import Dataset

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.features import FeatureFile, write_features

ITEMS, DIM = 20_000, 384
REQUIRED = 50.0         # to be open
REQUIRED_ROWS = 25.0    # for all rows in id order: 37 to 220 were measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "toy"
    folder.mkdir()
    draw = np.random.default_rng(0)
    tokens = [f"B{i:09d}" for i in draw.permutation(ITEMS)]
    matrix = draw.normal(size=(ITEMS, DIM)).astype(np.float32)
    with open(folder / "toy.inter", "w") as file:
        file.write("user_id:token\titem_id:token\n")
        file.writelines(f"u{i % 100}\t{token}\n" for i, token in enumerate(sorted(tokens)))
    with open(folder / "toy.emb", "w") as file:
        file.write("iid:token\titem_emb:float_seq\n")
        file.writelines(f"{token}\t{' '.join(map(str, row))}\n"
                        for token, row in zip(tokens, matrix.tolist(), strict=True))
    write_features(folder, "toy", "text", tokens, matrix, encoder="random")
    return folder


def recboles(folder, **keys):
    """RecBole's data set, and how long it took to make it."""
    config = Config("BPR", "toy", config_dict={"data_path": str(folder.parent), "state": "ERROR", **keys})
    start = time.perf_counter()
    return Dataset(config), time.perf_counter() - start


def median_seconds(function, repeats=5):
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def test_the_store_against_recboles_text(folder):
    _, without = recboles(folder)
    dataset, with_text = recboles(
        folder, load_col={"inter": ["user_id", "item_id"], "emb": ["iid", "item_emb"]},
        additional_feat_suffix=["emb"], alias_of_item_id=["iid"],
        preload_weight={"iid": "item_emb"})
    text = with_text - without
    tokens = dataset.field2id_token["item_id"].tolist()
    ours = FeatureFile.open(folder, "toy", "text").align(tokens).matrix
    np.testing.assert_allclose(dataset.get_preload_weight("iid"), ours, rtol=1e-6)
    opened = median_seconds(lambda: FeatureFile.open(folder, "toy", "text"))
    aligned = median_seconds(lambda: FeatureFile.open(folder, "toy", "text").align(tokens))
    print(f"\nRecBole {text:.2f} s; open {opened * 1000:.1f} ms = {text / opened:.0f}x, "
          f"all rows in id order {aligned * 1000:.0f} ms = {text / aligned:.0f}x")
    assert text / opened >= REQUIRED
    assert text / aligned >= REQUIRED_ROWS
