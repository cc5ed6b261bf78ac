"""Item features of a domain as tensors."""

import numpy as np
import pytest
import torch

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.features import write_features
from recbole_mmdiff.data.modalities import item_modalities
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
