"""Bias: the contract, and the estimates by plain loops."""

import pytest
from contract import ModelContract
from running import SINGLE, run_keys


class TestBias(ModelContract):
    """Closed form: nothing is trained."""

    model = "Bias"
    best_rmse_ratio = 0.9


def estimates(rows, item_damping):
    """Mean, item biases, and what they leave, of (user, item, rating) rows."""
    mean = sum(rating for _, _, rating in rows) / len(rows)
    bias = {}
    for item in {item for _, item, _ in rows}:
        own = [rating - mean for _, other, rating in rows if other == item]
        bias[item] = sum(own) / (len(own) + item_damping)
    return mean, bias, [(user, rating - mean - bias[item]) for user, item, rating in rows]


def rows_of(dataset):
    tokens = dataset.field2id_token[dataset.uid_field]
    return [(str(tokens[user]), item, rating) for user, item, rating in zip(
        dataset.inter_feat["user_id"].tolist(), dataset.inter_feat["item_id"].tolist(),
        dataset.inter_feat["rating"].tolist(), strict=True)]


@pytest.mark.parametrize("single", [False, True], ids=["pair", "one domain"])
def test_equals_plain_loops(single, tiny_config, tmp_path):
    keys = {**(SINGLE if single else {}), "item_damping": 3.0, "user_damping": 2.0}
    if single:
        keys["metrics"] = ["MAE", "RMSE"]
    run = run_keys(tiny_config("Bias", **keys), tmp_path / "run")
    train = run.parts.train
    mean, item_bias, left = estimates(rows_of(train), 3.0)
    if not single:
        left = left + estimates(rows_of(train.source), 3.0)[2]
    tokens = train.field2id_token["user_id"]
    for user in range(1, train.user_num):
        own = [rest for token, rest in left if token == tokens[user]]
        bias = sum(own) / (len(own) + 2.0)
        for item in (1, 7):
            expected = mean + item_bias.get(item, 0.0) + bias
            scores = run.model.item_offset(run.model.item_bias.new_tensor([item]).long())
            assert (scores + run.model.user_bias[user]).item() == pytest.approx(expected, abs=1e-5)
    assert run.model.user_bias[0] == 0
