"""A pair of domains whose items tell what their users like, and MMDCDR on it."""

import shutil
from dataclasses import replace

import pytest
import torch
from mmdcdr_by_hand import EPOCH, SEED, SMALL
from running import write_item_features
from torch import nn

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts

MODALITIES = [("text", 5), ("image", 3), ("audio", 4)]


@pytest.fixture(scope="session")
def content(make_tiny_pair, tmp_path_factory):
    """``content(missing)``: the folder of a pair whose items tell the users' taste. Every second item of
    the domain with that letter lacks its image; with ``few`` most items of both domains do."""
    folders = {}

    def make(missing=""):
        if missing not in folders:
            pair = make_tiny_pair(tmp_path_factory.mktemp("content"), choosy=True)
            tokens = sorted(pair.looks)
            without = [token for token in tokens if token[0] == missing][::2] if missing != "few" \
                else [token for number, token in enumerate(tokens) if number % 9]
            write_item_features(pair, MODALITIES, {"image": set(without)}, signal=4.0)
            folders[missing] = pair.folder
        return folders[missing]

    return make


@pytest.fixture(scope="session")
def featured_tastes(taste_pair, swapped_pair, tmp_path_factory):
    """The folders of the pairs of taste groups, with items whose features tell their group."""
    folders = []
    for pair in (taste_pair, swapped_pair):
        folders.append(tmp_path_factory.mktemp("featured"))
        shutil.copytree(pair.folder, folders[-1], dirs_exist_ok=True)
        write_item_features(replace(pair, folder=folders[-1], looks=taste_pair.looks), signal=2.0)
    return folders


@pytest.fixture(scope="session")
def built_mmdcdr(tiny_config, content):
    """``built_mmdcdr(**keys)``: a model with drawn weights, its configuration and training data.
    Few items have an image, so that many users know no such item; there is little noise in the end, so
    that networks like these do not blow it up."""

    def build(missing="few", **keys):
        keys = {**SMALL, "modalities": ["text", "image"], "embedding_size": 6, "beta_end": 0.004,
                "data_path": content(missing), **keys}
        config = Config(config_dict=tiny_config("MMDCDR", **keys))
        train = prepare_parts(config).train
        torch.manual_seed(3)
        model = config.model_class(config, train)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        model.fit_profiles()
        model.seed, model.epoch = SEED, EPOCH
        return model, config, train

    return build
