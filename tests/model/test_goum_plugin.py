"""GOUM on backbones: the contract, its loss as the sum of what it is made of, and both domains' scores."""

import pytest
import torch
from contract import ModelContract
from recbole.data.interaction import Interaction

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.domain import select
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.registry import MODELS, get_model

KEYS = {"embedding_size": 8, "knn_k": 3}


class TestGOUM(ModelContract):
    """On LATTICE."""

    model = "GOUM"
    featured = True
    more = {"backbone": "LATTICE"}
    accurate_keys = {"epochs": 40, "learning_rate": 0.02, "guidance_weight": 1.0, "guidance_temperature": 0.2,
                     "eval_step": 0}

    @pytest.fixture(scope="class", autouse=True)
    def features(self, content):
        type(self).keys = {**KEYS, "modalities": ["text", "image"], "data_path": content("few"), **self.more}


@pytest.fixture(scope="module")
def built(tiny_config, content):
    """``built(backbone, **keys)``: a model, a batch of both domains, the data and the configuration."""

    def build(backbone, **keys):
        config = Config(config_dict=tiny_config("GOUM", **{
            "embedding_size": 4, "modalities": ["text", "image"], "data_path": content("few"),
            "split_protocol": "ratio", "overlap_ratio": 0.5, "backbone": backbone, **keys}))
        train = prepare_parts(config).train
        torch.manual_seed(3)
        model = config.model_class(config, train)
        model.seed, model.epoch = 5, 1
        model.before_epoch(1)
        return model, next(iter(stage_loader(config, train, "both", 40, seed=5))), train, config

    return build


@pytest.mark.parametrize("backbone", ["LATTICE", "FREEDOM", "MCDRec", "MMGCN", "LGMRec"])
def test_the_loss_is_the_sum_of_both_backbones_and_of_the_matching(built, backbone):
    """A backbone learns as it does alone, from the positive rows of its domain."""
    model, batch, train, config = built(backbone, guidance_weight=0.7)
    alone, users, tables = 0.0, {}, {}
    for name, prefix, domain in (("target", "", train),
                                 ("source", "source_", select(train.source, train.source.positive_rows()))):
        single = get_model(backbone)(config, domain).train()
        single.load_state_dict(model.domains[name].state_dict())
        single.seed, single.epoch = 5, 1
        single.before_epoch(1)
        rows = Interaction({field: batch[prefix + field] for field in ("user_id", "item_id", "sample_id")})
        alone = alone + single.ranking_loss(rows)
        single.before_epoch(1)
        users[name], tables[name] = rows["user_id"], single.representations().users
    guidance = model.guidance_loss(users, tables, batch["sample_id"])
    model.guidance.matcher.matched_before.zero_()
    torch.testing.assert_close(model.ranking_loss(batch), alone + 0.7 * guidance)
    assert guidance > 0


def test_every_backbone_that_fits_is_named(built):
    with pytest.raises(ConfigError, match=r"backbone: 'VBPR' cannot be matched, use one of \['FREEDOM', "
                                          r"'MMGCN', 'LATTICE', 'MCDRec', 'LGMRec'\]"):
        built("VBPR")
    assert "CCDRec" in MODELS
    with pytest.raises(ConfigError, match="backbone: 3 is no name of a model"):
        built(3)
    with pytest.raises(ConfigError, match="there is no model 'Lattis'"):
        built("Lattis")


def test_both_domains_are_scored_as_by_the_backbones(built):
    model, _, train, _ = built("FREEDOM")
    model.eval()
    users = torch.unique(train.inter_feat["user_id"])[:5]
    found = model.full_sort_predict(Interaction({"user_id": users})).view(5, -1)
    expected = model.domains["target"].full_sort_predict(Interaction({"user_id": users})).view(5, -1)
    torch.testing.assert_close(found, expected)
    tables = model.vectors_of("source")
    users = torch.unique(train.source.inter_feat["user_id"])[:5]
    known = users[model.has_rows("source")[users]]
    expected = model.domains["source"].full_sort_predict(Interaction({"user_id": known}))
    torch.testing.assert_close(tables.users[known] @ tables.items.T, expected.view(len(known), -1))
