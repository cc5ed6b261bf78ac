"""Item features of both domains along the same principal axes, against numpy's SVD."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model import feature_space
from recbole_mmdiff.model.feature_space import (
    principal_axes,
    shared_item_features,
    shared_user_features,
)

ITEMS = 12
#: items in a training row
SEEN = {"target": set(range(1, 10)), "source": {1, 2, 3}}


def by_svd(rows, size):
    """Mean and scaled axes in float64, the largest entry of each positive."""
    mean = rows.mean(0)
    _, spread, axes = np.linalg.svd(rows - mean, full_matrices=False)
    axes, variances = axes[:size].T, spread[:size]**2 / len(rows)
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    return mean, axes / math.sqrt(variances.mean())


@pytest.mark.parametrize("size", [1, 4, 6, 99])
@pytest.mark.parametrize("block", [7, 16384])
def test_principal_axes_against_svd(size, block, monkeypatch):
    monkeypatch.setattr(feature_space, "BLOCK", block)
    draw = np.random.default_rng(4)
    rows = draw.normal(3.0, 1.0, (50, 6)) @ draw.normal(size=(6, 6)) * 10
    parts = [torch.tensor(part).float() for part in (rows[:9], rows[9:9], rows[9:])]
    mean, axes = principal_axes(parts, size)
    expected = by_svd(torch.cat(parts).double().numpy(), size)
    assert axes.shape == (6, min(size, 6))
    np.testing.assert_allclose(mean, expected[0], rtol=1e-5)
    np.testing.assert_allclose(axes, expected[1], rtol=1e-3, atol=1e-6)
    projected = (torch.cat(parts) - mean) @ axes
    assert projected.var(0, correction=0).mean().item() == pytest.approx(1.0, rel=1e-4)
    assert (projected.std(0).diff() < 0).all(), "the largest first"


@pytest.mark.parametrize("rows", [torch.full((6, 4), 3.1), torch.randn(1, 4), torch.zeros(0, 4)],
                         ids=["constant", "one row", "none"])
def test_rows_that_do_not_vary_have_no_axes(rows):
    mean, axes = principal_axes([rows], 3)
    assert torch.isfinite(mean).all() and axes.shape == (4, 3) and not axes.any()


def test_directions_without_variance_are_left_out():
    """Or an item that is not among the rows would stand out along any of them."""
    draw = np.random.default_rng(6)
    rows = torch.tensor(draw.normal(size=(30, 2)) @ draw.normal(size=(2, 5)) + 4.0).float()
    rows[:, 1] = 7.0
    axes = principal_axes([rows], 5)[1]
    assert axes[:, :2].any(0).all() and not axes[:, 2:].any()
    np.testing.assert_allclose(axes[:, :2], by_svd(rows.double().numpy(), 5)[1][:, :2],
                               rtol=1e-3, atol=1e-5)


@pytest.fixture
def spaces(monkeypatch):
    """``spaces(policy, size, change)``: features of both domains; ``change`` (domain, item) draws
    other numbers for an item."""
    target, source = (SimpleNamespace(num=lambda _: ITEMS, iid_field="item_id", inter_feat={
        "item_id": torch.tensor(sorted(SEEN[name]) * 2)}) for name in ("target", "source"))
    target.source = source

    def made(policy="drop_item", size=2, change=None, dims=(4, 4)):
        found = {}
        for name, dim, part in (("target", dims[0], target), ("source", dims[1], source)):
            draw = np.random.default_rng(3 + (name == "source"))
            values = torch.tensor(draw.normal(size=(ITEMS, dim))).float()
            missing = torch.tensor([number in (2, 11) for number in range(ITEMS)])
            values[0] = 0
            if policy == "drop_item":
                values[missing] = 0
            if change and change[0] == name:
                values[change[1]] += 5.0
            found[id(part)] = {"text": (values, missing)}
        monkeypatch.setattr(feature_space, "item_modalities", lambda part, names, _: found[id(part)])
        return shared_item_features(target, ["text"], policy, size), found[id(target)]["text"][0]

    return made


@pytest.mark.parametrize("policy", ["drop_item", "mean", "zero"])
def test_both_domains_are_seen_along_the_same_axes(policy, spaces):
    found, given = spaces(policy)
    plain = spaces(policy, size=None)[0]
    seen = {name: items - {2} if policy == "drop_item" else items for name, items in SEEN.items()}
    rows = np.concatenate([plain[name]["text"].values[sorted(seen[name])].double().numpy() for name in seen])
    mean, axes = by_svd(rows, 2)
    for name in ("target", "source"):
        known = plain[name]["text"].known
        assert known.tolist() == [number > 0 and (policy != "drop_item" or number not in (2, 11))
                                  for number in range(ITEMS)]
        assert torch.equal(found[name]["text"].known, known)
        expected = (plain[name]["text"].values.double().numpy() - mean) @ axes
        np.testing.assert_allclose(found[name]["text"].values, expected * known[:, None].numpy(),
                                   rtol=1e-3, atol=1e-5)
    assert torch.equal(plain["target"]["text"].values, given * known[:, None])


@pytest.mark.parametrize(("name", "item", "moves"), [("target", 10, False), ("source", 9, False),
                                                     ("target", 9, True), ("source", 3, True)])
def test_items_without_a_training_row_do_not_touch_the_axes(name, item, moves, spaces):
    before, after = spaces()[0], spaces(change=(name, item))[0]
    others = torch.arange(ITEMS) != item
    same = all(torch.equal(before[domain]["text"].values[others], after[domain]["text"].values[others])
               for domain in ("target", "source"))
    assert same != moves
    assert not torch.equal(before[name]["text"].values[item], after[name]["text"].values[item])


@pytest.mark.parametrize(("dim", "size"), [(4, 2), (3, 2), (3, 0)])
def test_features_of_users(dim, size, monkeypatch):
    """Along common axes where both domains have as many dimensions, else along axes of each; of users with
    a training row. Users of the source alone, whose ids come last, are left out."""
    draw, users, rated = np.random.default_rng(8), {"target": 9, "source": 13}, {}
    target, source = (SimpleNamespace(user_num=count, num=lambda _, count=count: count, uid_field="user_id",
                                      inter_feat={"user_id": torch.arange(1, count, 2)})
                      for count in users.values())
    target.source, found = source, {}
    for name, part, columns in (("target", target, 4), ("source", source, dim)):
        values = torch.tensor(draw.normal(size=(part.user_num, columns))).float()
        missing = torch.arange(part.user_num) == 3
        values[0] = values[3] = 0
        found[id(part)] = {"review": (values, missing)}
        rated[name] = values[[user for user in range(1, 9, 2) if user != 3]].double().numpy()
    monkeypatch.setattr(feature_space, "user_modalities", lambda part, names: {
        name: (values.clone(), missing) for name, (values, missing) in found[id(part)].items()})
    made = shared_user_features(target, ["review"], size)
    for name, part in (("target", target), ("source", source)):
        values, missing = found[id(part)]["review"]
        known = ~missing[:9] & (torch.arange(9) > 0)
        expected = values[:9].double().numpy()
        if size:
            mean, axes = by_svd(np.concatenate(list(rated.values())) if dim == 4 else rated[name], size)
            expected = (expected - mean) @ axes
        assert torch.equal(made[name]["review"].known, known)
        np.testing.assert_allclose(made[name]["review"].values, expected * known[:, None].numpy(),
                                   rtol=1e-3, atol=1e-4)


def test_other_dimensions_in_the_other_domain(spaces):
    with pytest.raises(ConfigError, match="'text' has 3 dimensions in the source and 4 in the target; enc"):
        spaces(dims=(4, 3))
    assert spaces(size=None, dims=(4, 3))[0]["source"]["text"].values.shape == (ITEMS, 3)
