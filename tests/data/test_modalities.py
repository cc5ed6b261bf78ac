"""Features of the items and users of a domain as tensors."""

import numpy as np
import pytest
import torch

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.features import FeatureFile, write_features
from recbole_mmdiff.data.modalities import item_modalities, user_modalities
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def train(make_tiny_pair, tiny_config, tmp_path_factory):
    """The training part of a pair of which the target has features, none for item ti0."""
    pair = make_tiny_pair(tmp_path_factory.mktemp("features"))
    tokens = sorted({row[1] for row in pair.target_rows} - {"ti0"})
    for name, dim in (("text", 3), ("image", 2)):
        matrix = np.arange(dim * len(tokens), dtype=np.float32).reshape(-1, dim)
        write_features(pair.folder / "tgt", "tgt", name, tokens[::-1], matrix[::-1], encoder="test")
    return prepare_parts(Config(config_dict=tiny_config("MF", data_path=pair.folder))).train


def test_rows_follow_the_item_ids(train):
    found = item_modalities(train, ["text", "image"])
    assert list(found) == ["text", "image"]
    names = train.field2id_token["item_id"].tolist()
    order = sorted(set(names) - {"[PAD]", "ti0"})
    for name, dim in (("text", 3), ("image", 2)):
        features, missing = found[name]
        assert features.shape == (train.item_num, dim) and features.dtype == torch.float32
        assert missing.dtype == torch.bool and missing.nonzero().tolist() == [[names.index("ti0")]]
        for item, token in enumerate(names):
            expected = np.zeros(dim) if token in ("[PAD]", "ti0") \
                else np.arange(dim) + dim * order.index(token)
            np.testing.assert_array_equal(features[item], expected)


def test_policies(train):
    missing = train.field2token_id["item_id"]["ti0"]
    features, mask = item_modalities(train, ["text"], "mean")["text"]
    others = torch.arange(train.item_num) != missing
    others[0] = False
    torch.testing.assert_close(features[missing], features[others].mean(0))
    assert mask[missing], "what was filled in is still marked"
    with pytest.raises(DataError, match=r"1 of 50 tokens have no row, first ti0"):
        item_modalities(train, ["text"], "error")
    with pytest.raises(DataError, match="policy 'median' is unknown"):
        item_modalities(train, ["text"], "median")


def test_what_is_not_there(train):
    assert item_modalities(train, []) == {}
    with pytest.raises(DataError, match=r"feature 'audio' of 'tgt' lacks tgt.audio.npy.*"
                                        r"finished here: image, text.*write_features"):
        item_modalities(train, ["text", "audio"])
    with pytest.raises(DataError, match="feature 'text' of 'src' lacks"):
        item_modalities(train.source, ["text"])
    with pytest.raises(ConfigError, match="'text' stands there twice"):
        item_modalities(train, ["text", "image", "text"])


def mark(token):
    """A value that tells whose row it is."""
    return float(sum(token.encode()) % 97 + 1)


@pytest.fixture(scope="module")
def halved(make_tiny_pair, tiny_config, tmp_path_factory):
    """The training part with half of the links cut; users of both domains have review features,
    of another size and value in each, every third user none."""
    pair = make_tiny_pair(tmp_path_factory.mktemp("users"))
    for name, rows, dim in (("src", pair.source_rows, 2), ("tgt", pair.target_rows, 3)):
        users = sorted({row[0] for row in rows})
        kept = [user for place, user in enumerate(users) if place % 3]
        matrix = np.array([[mark(user) * dim] * dim for user in kept], dtype=np.float32)
        write_features(pair.folder / name, name, "review", kept, matrix, encoder="test", entity="user")
    return prepare_parts(Config(config_dict=tiny_config(
        "MF", data_path=pair.folder, overlap_ratio=0.5))).train


@pytest.mark.parametrize("policy", ["drop_item", "zero", "mean"])
def test_users_have_the_features_of_their_own_domain(halved, policy):
    for dataset, dim in ((halved, 3), (halved.source, 2)):
        features, missing = user_modalities(dataset, ["review"], policy)["review"]
        tokens = dataset.field2id_token["user_id"].tolist()
        stored = set(FeatureFile.open(dataset.dataset_path, dataset.dataset_name, "review").tokens)
        assert features.shape == (len(tokens), dim)
        assert ("" in tokens) == (dataset is halved.source)
        rated = set(dataset.inter_feat["user_id"].tolist())
        known = [row in rated and token in stored for row, token in enumerate(tokens)]
        filled = features[known].mean(0) if policy == "mean" else 0
        assert sum(known) < sum(token in stored for token in tokens) or dataset is halved.source
        for row, token in enumerate(tokens):
            assert missing[row] == (not known[row] and token != "[PAD]")
            expected = mark(token) * dim if known[row] else filled if row in rated else 0
            torch.testing.assert_close(features[row], torch.zeros(dim) + expected)


def test_an_unlinked_person_is_two_users(halved):
    """Each with the features of its own domain."""
    source, target = (data.field2id_token["user_id"] for data in (halved.source, halved))
    both = set(source[1:]) & set(target[1:])
    apart = [token for token in both if np.flatnonzero(source == token) != np.flatnonzero(target == token)]
    assert apart
    for dataset, tokens, dim in ((halved.source, source, 2), (halved, target, 3)):
        features, missing = user_modalities(dataset, ["review"])["review"]
        for token in apart:
            row = int(np.flatnonzero(tokens == token)[0])
            assert missing[row] or features[row].tolist() == [mark(token) * dim] * dim


def test_items_and_users_are_not_mixed_up(halved):
    with pytest.raises(DataError, match="holds features of users, where features of items are wanted"):
        item_modalities(halved, ["review"])
    with pytest.raises(DataError, match=r"of .* tokens have no row"):
        user_modalities(halved.source, ["review"], "error")


def test_features_of_reviews_need_the_split_of_the_run(make_tiny_pair, tiny_config, tmp_path):
    """Or they tell what is held out: in the target domain, and under ``ratio`` also in the source."""
    pair = make_tiny_pair(tmp_path)
    both = sorted({row[0] for row in pair.source_rows} & {row[0] for row in pair.target_rows})

    def parts(**keys):
        return prepare_parts(Config(config_dict=tiny_config("MF", data_path=pair.folder, **keys)))

    def review(dataset, **manifest):
        write_features(dataset.dataset_path, dataset.dataset_name, "review", both,
                       np.ones((len(both), 2), np.float32), entity="user", fields=["review"], **manifest)
        return user_modalities(dataset, ["review"])

    train = parts().train
    split = train.saved_split.digest()
    with pytest.raises(DataError, match=r"tgt.review.npy: was made of reviews without a split, .*--split"):
        review(parts(split_protocol="warm_start").train)
    with pytest.raises(DataError, match="without a split"):
        review(train, fitted_on={"tgt": "0"})
    # A cold-start user's reviews are held out all or none: those of training users tell nothing.
    features, missing = review(train)["review"]
    learned = set(train.inter_feat["user_id"].tolist())
    tokens = train.field2id_token["user_id"]
    for user in range(1, train.user_num):
        known = user in learned and tokens[user] in both
        assert missing[user] == (not known) and features[user].tolist() == [float(known)] * 2
    assert len(learned) < train.user_num - 1
    with pytest.raises(DataError, match="with another split"):
        review(train, split_digest="0" * 64)
    review(train, split_digest=split)
    review(train.source)    # None of its rows is held out.
    assert parts(test_user_ratio=0.5).train.saved_split.digest() != split
    by_ratio = parts(split_protocol="ratio").train
    with pytest.raises(DataError, match="without a split"):
        review(by_ratio.source)
    review(by_ratio.source, split_digest=by_ratio.saved_split.digest())
