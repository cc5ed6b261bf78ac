"""Nothing of the held-out rows reaches a model.

Items, ratings and timestamps of the target rows that a split holds out are replaced (items only among
themselves, so that the vocabulary stays), the reviews of held-out users and the features of items that
stand in held-out rows alone are replaced or deleted. Weights and predictions must not change by a
single bit; a change of one row that is learned from must change them.
"""

import random
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from running import CROSS_MODELS, FINETUNED_MODELS, contract_of, write_item_features

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.features import FeatureFile, write_features
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.data.splits import FINETUNE, TEST, TRAIN, UNUSED, VALID
from recbole_mmdiff.quick_start import run

KEYS = {"epochs": 2, "eval_step": 0, "seed": 3, "topk": [5], "finetune_epochs": 1}
PROTOCOLS = ["cold_start_users", "warm_start", "cold_start_items", "ratio"]
TINY = {"MMDCDR": {"pretrain_epochs": 1, "diffusion_epochs": 1, "hidden_size": 16, "num_evaluations": 6},
        "MuSiC": {"pretrain_epochs": 1, "feature_epochs": 1, "side_epochs": 1, "hidden_size": 16}}
FEATURES, IDS = {"modalities": ["text", "image"]}, {"modalities": [], "use_ids": True}
EXPLORED = {"item_exploration": True, "exploration_layers": 2, "knn_k": 4, "num_clusters": 3}
VARIANTS = [*((model, {}) for model in CROSS_MODELS), ("SSCDR", {"hops": 1}), ("P2M2CDR", FEATURES),
            ("DisenCDR", EXPLORED),
            ("DiffCDR", {"hidden_activation": "silu", "x_T": "noise"}),
            # As the solver's plan is built faster for fewer steps.
            ("MMDCDR", {"paper": True, "num_steps": 1000}), ("MuSiC", {"paper": True})]


def trained(folder, model, tiny_config, output, **more):
    keys = TINY.get(model) or (contract_of(model).keys if model in CROSS_MODELS else {})
    if model not in FINETUNED_MODELS:
        more = {"finetune_epochs": 0, **more}
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


def one_changed(rows, places, users):
    """The rows with another rating in the first of ``places`` that one of these users rated 5."""
    place = next(n for n in places if rows[n][2] == "5" and rows[n][0] in users)
    return [rerated(row, row[3]) if n == place else row for n, row in enumerate(rows)]


def write_reviews(pair, split):
    """Features of reviews beside both domains, for almost all users, made with this split, or under
    ``cold_start_users``, where a user's are held out all or none, with no split. They are no modality of
    items, where ``modalities`` is all that there is."""
    made_with = {} if split.protocol == "cold_start_users" else {"split_digest": split.digest()}
    for name, rows in ((pair.source, pair.source_rows), (pair.target, pair.target_rows)):
        users = sorted({row[0] for row in rows})[2:]
        matrix = np.random.default_rng(5).normal(size=(len(users), 4)).astype(np.float32)
        write_features(pair.folder / name, name, "review", users, matrix, encoder="test", entity="user",
                       fields=["review"], **made_with)


def rewrite_features(folder, modality, tokens):
    """Replace the target's feature rows of some tokens; delete every third of them, if there are more."""
    file = FeatureFile.open(folder / "tgt", "tgt", modality)
    matrix = np.array(file.matrix)
    places = [place for place, token in enumerate(file.tokens) if token in tokens]
    assert places
    matrix[places] = np.random.default_rng(6).normal(50.0, 9.0, size=(len(places), matrix.shape[1]))
    kept = [place for place in range(len(matrix)) if place not in places[1::3]]
    about = {key: file.manifest[key] for key in ("encoder", "entity", "fields", "split_digest")
             if key in file.manifest}
    write_features(folder / "tgt", "tgt", modality, [file.tokens[place] for place in kept], matrix[kept],
                   **about)


def changed_pairs(pair, parts, protocol, held_out):
    """name -> (source rows, target rows): with other held-out rows, and with another learned one, of a
    linked user, since some models learn from no others."""
    source, target = pair.source_rows, pair.target_rows
    codes = codes_of(parts, target)
    if protocol == "ratio":
        # Their places stay, or RecBole would divide the rows in another way.
        of_source = codes_of(parts, source, source=True)
        held = [[rerated(row, row[3]) if code != TRAIN else row
                 for row, code in zip(rows, part, strict=True)]
                for rows, part in ((source, of_source), (target, codes))]
        learned = [one_changed(rows, places_of(part, TRAIN), pair.overlap)
                   for rows, part in ((source, of_source), (target, codes))]
        assert held[0] != source and held[1] != target
        return {"held out": held, "learned": learned}
    # Under cold_start_items, the held-out users' rows on other items are nobody's, either.
    places = places_of(codes, VALID, TEST) if protocol != "cold_start_items" \
        else [n for n, row in enumerate(target) if row[0] in held_out]
    other = replaced(target, places)
    for n in set(places_of(codes, UNUSED)) - set(places):
        other[n] = rerated(target[n], str(10**7 + n))
    learned = one_changed(target, places_of(codes, FINETUNE if protocol == "warm_start" else TRAIN),
                          pair.overlap)
    return {"held out": (source, other), "learned": (source, learned)}


@pytest.fixture(scope="module")
def parts_of(tiny_pair, tiny_config):
    """``parts_of(protocol, folder)``: the prepared data of a pair."""

    def prepare(protocol, folder=tiny_pair.folder):
        return prepare_parts(Config(config_dict=tiny_config(
            "Bias", data_path=folder, split_protocol=protocol, seed=KEYS["seed"])))

    return prepare


@pytest.fixture(scope="module")
def held_out(parts_of):
    """The tokens of the test and validation users of all protocols but ``ratio``."""
    cold = parts_of("cold_start_users")
    users = {user for part in (cold.valid, cold.test)
             for user in part.field2id_token["user_id"][part.inter_feat["user_id"].numpy()]}
    assert len(users) == 12 + 5
    return users


@pytest.fixture(scope="module")
def folders(tiny_pair, atomic, parts_of, held_out, tmp_path_factory):
    """protocol -> name -> the folder of a pair: as it is, and changed."""
    found, plain = {}, (tiny_pair.source_rows, tiny_pair.target_rows)
    for protocol in PROTOCOLS:
        parts = parts_of(protocol)
        pairs = {"plain": plain, **changed_pairs(tiny_pair, parts, protocol, held_out)}
        codes, found[protocol] = codes_of(parts, tiny_pair.target_rows), {}
        for name, (source, target) in pairs.items():
            folder = found[protocol][name] = tmp_path_factory.mktemp("data")
            atomic.write(folder, "src", source)
            atomic.write(folder, "tgt", target)
            pair, again = replace(tiny_pair, folder=folder), parts_of(protocol, folder)
            write_item_features(pair)
            write_reviews(pair, again.observed.saved_split)
            assert [now for now, code in zip(codes_of(again, target), codes, strict=True)
                    if code in (TRAIN, FINETUNE)] == [code for code in codes if code in (TRAIN, FINETUNE)]
    return found


def copy_of(folder, output, modality, tokens):
    """A copy of a pair with other features of some tokens of the target."""
    shutil.copytree(folder, output)
    rewrite_features(output, modality, tokens)
    return output


# ---- the tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("model", "keys"), VARIANTS, ids=str)
def test_held_out_rows_do_not_touch_the_model(folders, tiny_config, tmp_path, model, keys, protocol):
    results = {name: trained(folder, model, tiny_config, tmp_path / name, split_protocol=protocol, **keys)
               for name, folder in folders[protocol].items()}
    plain = outcome(results["plain"])
    assert not differences(plain, outcome(results["held out"]))
    finetuned = protocol != "warm_start" or model in FINETUNED_MODELS
    assert bool(differences(plain, outcome(results["learned"]))) == finetuned, "rows that nobody goes on from"
    assert results["plain"].metrics["test"] != results["held out"].metrics["test"]
    if protocol == "warm_start" and finetuned and results["plain"].metrics["history"]:
        assert results["plain"].metrics["history"][-1]["stage"] == "finetune"


@pytest.mark.parametrize(("model", "keys"), [
    ("MF", {"domain_view": "merged"}), ("BPR", {}), ("BPR", {"domain_view": "merged"}), ("MMDCDR", IDS),
    ("MuSiC", IDS)], ids=str)
def test_other_views_and_models(folders, tiny_config, tmp_path, model, keys):
    results = {name: trained(folder, model, tiny_config, tmp_path / name, **keys)
               for name, folder in folders["cold_start_users"].items()}
    plain = outcome(results["plain"])
    assert not differences(plain, outcome(results["held out"]))
    assert differences(plain, outcome(results["learned"]))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", ["MMDCDR", "MuSiC"])
def test_reviews_of_held_out_users_do_not_touch_the_model(folders, held_out, tiny_config, tmp_path, model,
                                                          protocol):
    """Nor do their rows, where users are described by features of their own. Under ``ratio`` everybody
    has training rows: the reviews were made without the others, and the split's digest says so."""
    keys = {"user_modalities": ["review"], "split_protocol": protocol}
    plain, others = folders[protocol]["plain"], folders[protocol]["held out"]
    learner = next(user for user in sorted(FeatureFile.open(plain / "tgt", "tgt", "review").tokens)
                   if user not in held_out)
    if protocol != "ratio":
        others = copy_of(others, tmp_path / "others", "review", held_out)
    results = [trained(folder, model, tiny_config, tmp_path / f"run{number}", **keys)
               for number, folder in enumerate((plain, others, copy_of(
                   plain, tmp_path / "learned", "review", {learner})))]
    first, *rest = map(outcome, results)
    assert not differences(first, rest[0])
    assert differences(first, rest[1])
    ids = [number for number, token in enumerate(first[2]) if token in held_out]
    vectors, has = results[0].model.domains["target"].profiles("review", torch.tensor(ids))
    assert (has.any() and vectors.any()) == (protocol == "ratio")


@pytest.mark.parametrize(("model", "keys"), [
    ("P2M2CDR", FEATURES), ("P2M2CDR", {**FEATURES, "modality_policy": "mean"}), ("MMDCDR", {}),
    ("MMDCDR", {"modality_policy": "mean"}), ("MuSiC", {"paper": True, "standardize": True})], ids=str)
def test_features_of_unseen_items_do_not_touch_the_weights(folders, parts_of, tiny_config, tmp_path, model,
                                                           keys):
    """Axes, scales and fillings are those of the items that stand in a training row; the others are
    scored by their features, and change no score but their own."""
    folder = folders["cold_start_items"]["plain"]
    train = parts_of("cold_start_items").train
    seen = torch.zeros(train.item_num, dtype=torch.bool)
    seen[train.inter_feat["item_id"]] = True
    names = train.field2id_token["item_id"][1:]
    seen_names = set(names[seen[1:].numpy()])
    changes = {"unseen": set(names) - seen_names, "learned": {min(seen_names - {"ti0", "ti1"})}}
    results = {"plain": folder} | {name: copy_of(folder, tmp_path / name, "text", tokens)
                                   for name, tokens in changes.items()}
    found = {name: outcome(trained(data, model, tiny_config, tmp_path / f"{name} run",
                                   split_protocol="cold_start_items", **keys))
             for name, data in results.items()}
    assert differences(found["plain"], found["unseen"]) == ["predictions"]
    assert len(differences(found["plain"], found["learned"])) > 1
    scores = [found[name][1].view(-1, 50) for name in ("plain", "unseen")]
    changed = (scores[0] != scores[1]).any(0)
    assert changed.any() and not changed[seen[1:51]].any()


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
