"""CMF: the contract, and the union that it is trained on."""

from contract import ModelContract

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts


class TestCMF(ModelContract):
    """MF on both domains."""

    model = "CMF"
    accurate_keys = {"epochs": 60, "learning_rate": 0.01, "reg_weight": 0.02,
                     "valid_metric": "RMSE"}
    best_rmse_ratio = 0.85


def test_trains_on_both_domains_and_ranks_one(tiny_config):
    parts = prepare_parts(Config(config_dict=tiny_config("CMF")))
    train, observed = parts.train, parts.observed
    source = observed.source
    assert len(train.inter_feat) == len(observed.inter_feat) + len(source.inter_feat)
    assert train.item_num == observed.item_num + source.item_num - 1
    shared = range(1, observed.num_overlap + 1)
    assert all(train.field2id_token["user_id"][user] == source.field2id_token["user_id"][user]
               for user in shared)
    assert parts.test.num_candidates == observed.item_num
