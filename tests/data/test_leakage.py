"""Nothing of the held-out rows reaches a model.

Items, ratings and timestamps of the target rows that a split holds out are replaced (items only among
themselves, so that the vocabulary stays). Weights and predictions must not change by a single bit; a
change of one row that is learned from must change them.
"""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from running import contract_of

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.data.splits import FINETUNE, TEST, TRAIN, UNUSED, VALID
from recbole_mmdiff.model.registry import MODELS
from recbole_mmdiff.quick_start import run

KEYS = {"epochs": 2, "eval_step": 0, "seed": 3, "topk": [5], "finetune_epochs": 1}
PROTOCOLS = ["cold_start_users", "warm_start", "cold_start_items", "ratio"]
VARIANTS = [*((model, {}) for model in MODELS), ("SSCDR", {"hops": 1}),
            ("P2M2CDR", {"modalities": ["text", "image"]}),
            ("DiffCDR", {"hidden_activation": "silu", "x_T": "noise"})]


def trained(folder, model, tiny_config, output, **more):
    keys = contract_of(model).keys if model in MODELS else {}
    return run(config_dict=tiny_config(model, data_path=folder, **keys | KEYS | more), output=output,
               console=False)


def outcome(finished):
    """All weights and buffers, and predictions on fixed pairs of tokens."""
    model, part = finished.model, finished.parts.test
    model.eval()
    users, items = np.meshgrid(np.arange(1, 81), np.arange(1, 51), indexing="ij")
    pairs = Interaction({part.uid_field: torch.as_tensor(users.ravel()),
                         part.iid_field: torch.as_tensor(items.ravel())})
    return model.state_dict(), model.predict(pairs), list(part.field2id_token["user_id"]), \
        list(part.field2id_token["item_id"][:51])


def differences(one, other):
    """What differs between two outcomes, by name."""
    weights, predictions, *names = one
    others, same, *other_names = other
    assert names == other_names
    assert list(weights) == list(others)
    found = [name for name in weights if not torch.equal(weights[name], others[name])]
    return found + ["predictions"] * (not torch.equal(predictions, same))


# ---- the data --------------------------------------------------------------------------------------


def rerated(row, time):
    """The row with another rating on the other side of ``positive_rating``, and another time."""
    return (*row[:2], "1" if int(row[2]) >= 4 else "5", time)


def replaced(rows, places, seed=0):
    """The rows with new items, ratings and times at ``places``; no pair twice. The new times are
    later than all others, so that rows that come before them still do."""
    draw = random.Random(seed)
    kept = {row[:2] for n, row in enumerate(rows) if n not in places}
    users, items = [rows[n][0] for n in places], [rows[n][1] for n in places]
    draw.shuffle(items)
    for _ in range(10000):
        pairs = list(zip(users, items, strict=True))
        counts = Counter(pairs)
        wrong = [n for n, pair in enumerate(pairs) if pair in kept or counts[pair] > 1]
        if not wrong:
            break
        other = draw.randrange(len(items))
        items[wrong[0]], items[other] = items[other], items[wrong[0]]
    else:
        raise AssertionError("no other items for these rows")
    changed = list(rows)
    for place, item in zip(places, items, strict=True):
        changed[place] = rerated((rows[place][0], item, rows[place][2]),
                                 str(draw.randrange(10**6, 10**7)))
    same = sum(rows[n][1] == changed[n][1] for n in places)
    assert same < 0.2 * len(places)
    return changed


def codes_of(parts, rows, source=False):
    """The part of each row of a file (n,)."""
    saved = parts.observed.saved_split
    named = (saved.source_user, saved.source_item, saved.source_part) if source \
        else (saved.user, saved.item, saved.part)
    held = {(user, item): code for user, item, code in zip(*named, strict=True)}
    return [held.get(row[:2], TRAIN) for row in rows]


def places_of(codes, *wanted):
    return [n for n, code in enumerate(codes) if code in wanted]


def one_changed(rows, places):
    """The rows with another rating in the first of ``places`` that is rated 5."""
    place = next(n for n in places if rows[n][2] == "5")
    return [rerated(row, row[3]) if n == place else row for n, row in enumerate(rows)]


def changed_pairs(pair, parts, protocol, held_out):
    """name -> (source rows, target rows): with other held-out rows, and with another learned one."""
    source, target = pair.source_rows, pair.target_rows
    codes = codes_of(parts, target)
    if protocol == "ratio":
        # Their places stay, or RecBole would divide the rows in another way.
        of_source = codes_of(parts, source, source=True)
        held = [[rerated(row, row[3]) if code != TRAIN else row
                 for row, code in zip(rows, part, strict=True)]
                for rows, part in ((source, of_source), (target, codes))]
        learned = [one_changed(rows, places_of(part, TRAIN))
                   for rows, part in ((source, of_source), (target, codes))]
        assert held[0] != source and held[1] != target
        return {"held out": held, "learned": learned}
    # Under cold_start_items, the held-out users' rows on other items are nobody's, either.
    places = places_of(codes, VALID, TEST) if protocol != "cold_start_items" \
        else [n for n, row in enumerate(target) if row[0] in held_out]
    other = replaced(target, places)
    for n in set(places_of(codes, UNUSED)) - set(places):
        other[n] = rerated(target[n], str(10**7 + n))
    learned = one_changed(target, places_of(codes, FINETUNE if protocol == "warm_start" else TRAIN))
    return {"held out": (source, other), "learned": (source, learned)}


@pytest.fixture(scope="module")
def folders(tiny_pair, tiny_config, atomic, tmp_path_factory):
    """protocol -> name -> the folder of a pair: as it is, and changed."""
    contract_of("P2M2CDR")
    from test_p2m2cdr import write_item_features

    def parts_of(protocol, folder=tiny_pair.folder):
        return prepare_parts(Config(config_dict=tiny_config(
            "Bias", data_path=folder, split_protocol=protocol, seed=KEYS["seed"])))

    cold = parts_of("cold_start_users")
    held_out = {user for part in (cold.valid, cold.test)
                for user in part.field2id_token["user_id"][part.inter_feat["user_id"].numpy()]}
    assert len(held_out) == 12 + 5
    found, plain = {}, (tiny_pair.source_rows, tiny_pair.target_rows)
    for protocol in PROTOCOLS:
        parts = parts_of(protocol)
        pairs = {"plain": plain, **changed_pairs(tiny_pair, parts, protocol, held_out)}
        found[protocol] = {}
        for name, (source, target) in pairs.items():
            folder = found[protocol][name] = tmp_path_factory.mktemp("data")
            atomic.write(folder, "src", source)
            atomic.write(folder, "tgt", target)
            write_item_features(replace(tiny_pair, folder=folder))
        for name in ("held out", "learned"):
            again = parts_of(protocol, found[protocol][name])
            kept = [n for n, code in enumerate(codes_of(parts, tiny_pair.target_rows))
                    if code in (TRAIN, FINETUNE)]
            rows = pairs[name][1]
            assert [codes_of(again, rows)[n] for n in kept] \
                == [codes_of(parts, tiny_pair.target_rows)[n] for n in kept]
    return found


# ---- the tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("model", "keys"), VARIANTS, ids=str)
def test_held_out_rows_do_not_touch_the_model(folders, tiny_config, tmp_path, model, keys, protocol):
    results = {name: trained(folder, model, tiny_config, tmp_path / name, split_protocol=protocol, **keys)
               for name, folder in folders[protocol].items()}
    plain = outcome(results["plain"])
    assert not differences(plain, outcome(results["held out"]))
    assert differences(plain, outcome(results["learned"]))
    assert results["plain"].metrics["test"] != results["held out"].metrics["test"]
    if protocol == "warm_start" and results["plain"].metrics["history"]:
        assert results["plain"].metrics["history"][-1]["stage"] == "finetune"


@pytest.mark.parametrize(("model", "keys"), [
    ("MF", {"domain_view": "merged"}), ("BPR", {}), ("BPR", {"domain_view": "merged"})], ids=str)
def test_other_views_and_models(folders, tiny_config, tmp_path, model, keys):
    results = {name: trained(folder, model, tiny_config, tmp_path / name, **keys)
               for name, folder in folders["cold_start_users"].items()}
    plain = outcome(results["plain"])
    assert not differences(plain, outcome(results["held out"]))
    assert differences(plain, outcome(results["learned"]))


@pytest.mark.parametrize("model", ["CMF", "EMCDR", "CoNet", "BiTGCF"])
def test_later_rows_are_not_read_without_fine_tuning(folders, tiny_config, tmp_path, model):
    """Nor are the earlier ones: with ``finetune_epochs: 0`` warm start is cold start."""
    results = [trained(folders["warm_start"][name], model, tiny_config, tmp_path / name,
                       split_protocol="warm_start", finetune_epochs=0)
               for name in ("plain", "held out", "learned")]
    plain = outcome(results[0])
    assert not any(differences(plain, outcome(other)) for other in results[1:])


def test_the_same_run_twice_is_the_same(folders, tiny_config, tmp_path):
    """Without this, equality above would prove nothing."""
    one, other = (trained(folders["warm_start"]["plain"], "DiffCDR", tiny_config, tmp_path / name)
                  for name in "ab")
    assert not differences(outcome(one), outcome(other))
    assert one.metrics["test"] == other.metrics["test"]


def test_validation_rows_choose_the_epoch_and_nothing_else(folders, tiny_config, tmp_path):
    """With validation on, only the choice among the same epochs may differ."""
    one, other = (trained(folders["cold_start_users"][name], "MF", tiny_config, tmp_path / name,
                          epochs=3, eval_step=1) for name in ("plain", "held out"))
    losses = [[entry["loss"] for entry in finished.metrics["history"]] for finished in (one, other)]
    shared = min(map(len, losses))
    assert losses[0][:shared] == losses[1][:shared]
