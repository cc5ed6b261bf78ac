"""From a configuration to parts, and RecBole's own loaders over them."""

import pytest
import torch

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.cross_domain import CrossDomainDataset
from recbole_mmdiff.data.preparation import (
    create_dataset,
    prepare_parts,
    seen_pairs,
    train_loader,
)
from recbole_mmdiff.errors import ConfigError, DataError


def single(tiny_config, model, **keys):
    return Config(config_dict=tiny_config(
        model, dataset="tgt", source_domain=None, target_domain=None,
        load_col={"inter": ["user_id", "item_id", "rating", "timestamp"]}, **keys))


def pair_set(part):
    return set(zip(*(values.tolist() for values in seen_pairs(part)), strict=True))


@pytest.mark.parametrize(("model", "base"), [("BPR", "Dataset"), ("SASRec", "SequentialDataset"),
                                             ("DIN", "SequentialDataset")])
def test_recboles_class_of_the_model_is_used(tiny_config, model, base):
    dataset = create_dataset(single(tiny_config, model, train_neg_sample_args=None)
                             if model == "SASRec" else single(tiny_config, model))
    assert any(cls.__name__ == base and cls.__module__.startswith("recbole.")
               for cls in type(dataset).__mro__)


def test_one_domain_equals_recboles_own_data_set(tiny_config, tiny_pair):
    """The strict reader gives RecBole's ids, rows and split: same seed, same order of calls."""
    from recbole.data.dataset import Dataset
    from recbole.utils import init_seed

    config = single(tiny_config, "BPR")
    ours = prepare_parts(config)
    init_seed(config["seed"], config["reproducibility"])
    theirs = Dataset(config).build()
    for part, same in zip((ours.observed, ours.valid, ours.test), theirs, strict=True):
        for field in ("user_id", "item_id"):
            assert list(part.field2id_token[field]) == list(same.field2id_token[field])
        for field in same.inter_feat:
            assert torch.equal(part.inter_feat[field].to(same.inter_feat[field].dtype),
                               same.inter_feat[field])
            # Times are kept in float64, RecBole's float32 rounds Unix times to minutes.
            expected = torch.float64 if field == "timestamp" else same.inter_feat[field].dtype
            assert part.inter_feat[field].dtype == expected


def test_two_domains_give_a_cross_domain_data_set(tiny_config):
    assert isinstance(create_dataset(Config(config_dict=tiny_config("LightGCN"))),
                      CrossDomainDataset)


@pytest.mark.parametrize("model", ["MF", "BPR"])
def test_what_models_train_on(tiny_config, model):
    """Rating models on all rows, ranking models on positive ones; seen are all rows anyway."""
    parts = prepare_parts(Config(config_dict=tiny_config(model)))
    ratings = parts.observed.inter_feat["rating"]
    positive = int((ratings >= 4).sum())
    assert 0 < positive < len(ratings)
    assert len(parts.train) == (len(ratings) if model == "MF" else positive)
    assert pair_set(parts.train) <= pair_set(parts.observed)


def test_the_view_is_the_models_own_unless_given(tiny_config):
    assert prepare_parts(Config(config_dict=tiny_config("CMF"))).train.item_num == 91
    assert prepare_parts(Config(config_dict=tiny_config("MF"))).train.item_num == 51
    given = tiny_config("BPR", domain_view="merged")
    parts = prepare_parts(Config(config_dict=given))
    assert (parts.train.item_num, parts.observed.item_num) == (91, 51)
    with pytest.raises(ConfigError, match="'merged' needs a source and a target domain"):
        prepare_parts(single(tiny_config, "BPR", domain_view="merged"))
    with pytest.raises(ConfigError, match=r"domain_view: 'merge'.*did you mean 'merged'"):
        prepare_parts(Config(config_dict=tiny_config("BPR", domain_view="merge")))


@pytest.mark.parametrize("view", ["target", "merged"])
def test_recboles_training_loader_draws_negatives_outside_of_training_rows(tiny_config, view):
    config = Config(config_dict=tiny_config("BPR", domain_view=view))
    parts = prepare_parts(config)
    known = pair_set(parts.train)
    rows = 0
    for batch in train_loader(config, parts.train):
        rows += len(batch)
        for user, item, negative in zip(batch["user_id"].tolist(), batch["item_id"].tolist(),
                                        batch["neg_item_id"].tolist(), strict=True):
            assert (user, item) in known
            assert (user, negative) not in known and negative > 0
    assert rows == len(parts.train)


def test_seen_pairs_are_the_rows_of_all_parts(tiny_config):
    parts = prepare_parts(Config(config_dict=tiny_config("BPR")))
    users, items = seen_pairs(parts.observed, parts.valid)
    assert len(users) == len(items) == len(parts.observed) + len(parts.valid)
    assert set(zip(users.tolist(), items.tolist(), strict=True)) \
        == pair_set(parts.observed) | pair_set(parts.valid)


@pytest.mark.parametrize("split", [{"RS": [0.8, 0.2]}, {"RS": [0.9, 0.1, 0.0]},
                                   {"LS": "test_only"}], ids=str)
def test_a_single_domain_needs_three_parts(tiny_config, split):
    with pytest.raises(DataError, match=r"eval_args\.split: of tgt it gives parts of \[\d+, \d+"):
        prepare_parts(single(tiny_config, "BPR", eval_args={"split": split}))


def test_a_single_domain_knows_two_protocols(tiny_config):
    with pytest.raises(ConfigError, match=r"split_protocol: 'cold_start_users' is not known"):
        prepare_parts(single(tiny_config, "BPR", split_protocol="cold_start_users"))


def test_the_seed_of_the_split_holds_in_one_domain_too(tiny_config):
    def rows(**keys):
        return pair_set(prepare_parts(single(tiny_config, "BPR", **keys)).test)

    assert rows(seed=1) == rows(seed=2, split_seed=1) != rows(seed=2)
