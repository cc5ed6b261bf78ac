"""Nothing of the held-out users' target rows reaches a model.

The items, ratings and timestamps of the target rows of test and validation users are replaced (items
only among themselves, so that the vocabulary stays). Weights and predictions must not change by a
single bit; a change of one training row must change them.
"""

import random

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_mmdiff.quick_start import run

MODELS = ["Bias", "MF", "CMF", "EMCDR", "DiffCDR"]
KEYS = {"epochs": 3, "eval_step": 0, "seed": 3, "topk": [5]}
PRETRAINED = {"pretrain_epochs": 2, "pretrain_batch_size": 256}


def trained(folder, model, tiny_config, output, **more):
    keys = KEYS | (PRETRAINED if model in ("EMCDR", "DiffCDR") else {}) | more
    return run(config_dict=tiny_config(model, data_path=folder, **keys), output=output)


def outcome(finished):
    """All weights and buffers, and predictions on fixed pairs of tokens."""
    model, part = finished.model, finished.parts.test
    model.eval()
    users, items = np.meshgrid(np.arange(1, 81), np.arange(1, 51), indexing="ij")
    pairs = Interaction({part.uid_field: torch.as_tensor(users.ravel()),
                         part.iid_field: torch.as_tensor(items.ravel())})
    return model.state_dict(), model.predict(pairs), list(part.field2id_token["user_id"]), \
        list(part.field2id_token["item_id"][:51])


def equal(one, other):
    weights, predictions, *names = one
    others, same, *other_names = other
    assert names == other_names
    assert list(weights) == list(others)
    return all(torch.equal(weights[name], others[name]) for name in weights) \
        and torch.equal(predictions, same)


def replaced(rows, held, seed=0):
    """The rows with new items, ratings and times for the users in ``held``; no pair twice."""
    draw = random.Random(seed)
    places = [n for n, row in enumerate(rows) if row[0] in held]
    items = [rows[n][1] for n in places]
    while True:
        draw.shuffle(items)
        for n in range(len(places)):   # mend users who drew an item twice, by swapping
            for _ in range(50):
                mine = [m for m, place in enumerate(places) if rows[place][0] == rows[places[n]][0]]
                if items[n] not in [items[m] for m in mine if m != n]:
                    break
                other = draw.randrange(len(places))
                items[n], items[other] = items[other], items[n]
        pairs = {(rows[place][0], item) for place, item in zip(places, items, strict=True)}
        if len(pairs) == len(places):
            break
    changed = list(rows)
    for place, item in zip(places, items, strict=True):
        changed[place] = (rows[place][0], item, str(6 - int(rows[place][2])),
                          str(draw.randrange(10**7)))
    return changed


@pytest.fixture(scope="module")
def pairs(tiny_pair, tiny_config, atomic, tmp_path_factory):
    """Folders: the pair as it is, with replaced held-out rows, and with one other training row."""
    plain = trained(tiny_pair.folder, "Bias", tiny_config, tmp_path_factory.mktemp("run") / "0")
    held = set()
    for part in (plain.parts.valid, plain.parts.test):
        held |= set(part.field2id_token["user_id"][part.inter_feat["user_id"].numpy()])
    assert len(held) == 12 + 5
    rows = replaced(tiny_pair.target_rows, held)
    held_places = [n for n, row in enumerate(tiny_pair.target_rows) if row[0] in held]
    assert sorted(rows[n][1] for n in held_places) \
        == sorted(tiny_pair.target_rows[n][1] for n in held_places)
    assert sum(rows[n][1] != tiny_pair.target_rows[n][1] for n in held_places) \
        > 0.8 * len(held_places)
    folders = {"plain": tiny_pair.folder}
    one = list(tiny_pair.target_rows)
    first = next(n for n, row in enumerate(one) if row[0] not in held)
    one[first] = (*one[first][:2], str(6 - int(one[first][2]) if one[first][2] != "3" else 1),
                  one[first][3])
    for name, changed in (("held out", rows), ("training", one)):
        folders[name] = tmp_path_factory.mktemp("data")
        atomic.write(folders[name], "src", tiny_pair.source_rows)
        atomic.write(folders[name], "tgt", changed)
    return folders


@pytest.mark.parametrize("model", MODELS)
def test_held_out_rows_do_not_touch_the_model(pairs, tiny_config, tmp_path, model):
    results = {name: trained(folder, model, tiny_config, tmp_path / name)
               for name, folder in pairs.items()}
    plain = outcome(results["plain"])
    assert equal(plain, outcome(results["held out"]))
    assert not equal(plain, outcome(results["training"]))
    assert results["plain"].metrics["test"] != results["held out"].metrics["test"]


@pytest.mark.parametrize(("model", "keys"), [
    ("CMF", {"split_protocol": "warm_start"}),
    ("MF", {"domain_view": "merged"}),
    ("BPR", {}), ("BPR", {"domain_view": "merged"}),
    ("DiffCDR", {"hidden_activation": "silu", "x_T": "noise"}),
], ids=str)
def test_other_protocols_views_and_models(pairs, tiny_config, tmp_path, model, keys):
    """``warm_start`` too: its fine-tuning rows are not used before fine-tuning is asked for."""
    results = {name: trained(folder, model, tiny_config, tmp_path / name, **keys)
               for name, folder in pairs.items()}
    plain = outcome(results["plain"])
    assert equal(plain, outcome(results["held out"]))
    assert not equal(plain, outcome(results["training"]))


def test_the_same_run_twice_is_the_same(pairs, tiny_config, tmp_path):
    """Without this, equality above would prove nothing."""
    one, other = (trained(pairs["plain"], "DiffCDR", tiny_config, tmp_path / name)
                  for name in "ab")
    assert equal(outcome(one), outcome(other))
    assert one.metrics["test"] == other.metrics["test"]


def test_validation_rows_choose_the_epoch_and_nothing_else(pairs, tiny_config, tmp_path):
    """With validation on, only the choice among the same epochs may differ."""
    one, other = (trained(pairs[name], "MF", tiny_config, tmp_path / name, eval_step=1)
                  for name in ("plain", "held out"))
    losses = [[entry["loss"] for entry in finished.metrics["history"]] for finished in (one, other)]
    shared = min(map(len, losses))
    assert losses[0][:shared] == losses[1][:shared]
