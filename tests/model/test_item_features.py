"""Features of items inside a model: projections, the rows' gradient, copies, and what is missing."""

import copy

import pytest
import torch
from torch import nn

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.features import FeatureError
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.item_features import ItemFeatures


@pytest.fixture(scope="module")
def train(ranking_config, toy_domain):
    return prepare_parts(Config(config_dict=ranking_config("BPR", data_path=toy_domain))).train


@pytest.fixture
def make(train):
    """``make(trainable, policy, names)``: the features of the toy domain, drawn from one seed."""

    def build(trainable=False, policy="drop_item", names=("text", "image")):
        torch.manual_seed(2)
        return ItemFeatures(train, None if names is None else list(names), policy, 6, trainable)

    return build


def items_of(train, *tokens):
    return torch.as_tensor(train.token2id("item_id", list(tokens)))


class Plain(nn.Module):
    """The same projections with tables that autograd indexes."""

    def __init__(self, features):
        super().__init__()
        self.tables = nn.ParameterList(features.table(number).detach().clone()
                                       for number in range(len(features.names)))
        self.projections = copy.deepcopy(features.projections)
        self.present = features.present

    def project(self, items):
        projected = [layer(table[items])
                     for layer, table in zip(self.projections, self.tables, strict=True)]
        return torch.stack(projected, 1) * self.present[items][:, :, None]


# ---- projections -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [False, True])
def test_projections_by_hand(make, train, trainable):
    features = make(trainable)
    assert features.names == ["text", "image"]
    items = items_of(train, "i7", "i0", "i1", "i2", "i3")
    found = features.project(items)
    assert found.shape == (5, 2, 6)
    for row, item in enumerate(items):
        for number, layer in enumerate(features.projections):
            by_hand = layer.weight @ features.table(number)[item] + layer.bias
            expected = by_hand if features.present[item, number] else torch.zeros(6)
            torch.testing.assert_close(found[row, number], expected)
    torch.testing.assert_close(features.project_all()[items], found)
    assert not found[1].any(), "an item without any feature has no bias either"
    assert not features.project_all()[0].any()


def test_what_is_there(make, train):
    present = make().present
    assert present.tolist()[0] == [False, False]
    for token, there in (("i0", [0, 0]), ("i1", [1, 0]), ("i2", [0, 1]), ("i3", [1, 1]), ("i11", [1, 1])):
        assert present[items_of(train, token)[0]].tolist() == there


def test_all_modalities_of_the_folder_by_name(make):
    assert make(names=None).names == ["image", "text"]
    assert make(names=["text"]).project_all().shape[1] == 1


def test_frozen_tables_are_not_trained_and_not_saved(make):
    features = make()
    assert {name for name, _ in features.named_parameters()} \
        == {f"projections.{number}.{part}" for number in (0, 1) for part in ("weight", "bias")}
    assert set(features.state_dict()) == {name for name, _ in features.named_parameters()}
    features.project_all().sum().backward()
    assert features.table(0).grad is None


def test_trained_tables_are_parameters(make):
    features = make(trainable=True)
    assert {"table_0", "table_1"} <= {name for name, _ in features.named_parameters()}
    assert {"table_0", "table_1"} <= set(features.state_dict())


# ---- what is missing -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["zero", "mean"])
def test_filled_rows_count_as_there(make, train, policy):
    features = make(policy=policy)
    assert features.present[1:].all() and not features.present[0].any()
    known = make().present[:, 0]
    table, missing = features.table(0), items_of(train, "i2")[0]
    seen = torch.unique(train.inter_feat["item_id"])
    seen = seen[known[seen]]
    expected = table[seen].mean(0) if policy == "mean" else torch.zeros(4)
    torch.testing.assert_close(table[missing], expected)


def test_errors(make, make_tiny_pair, ranking_config, tmp_path):
    with pytest.raises(FeatureError, match="2 of 12 tokens have no row, first i0, i2"):
        make(policy="error")
    with pytest.raises(FeatureError, match="policy 'median' is unknown"):
        make(policy="median")
    with pytest.raises(FeatureError, match=r"audio.*image.*text"):
        make(names=["audio"])
    with pytest.raises(ConfigError, match="modalities: 'text' stands there twice"):
        make(names=["text", "text"])
    with pytest.raises(ConfigError, match=r"modalities: \[\] names none, but this model needs some"):
        make(names=[])
    message = r"modalities: tgt has no features of items, but this model needs some; put .*\.npy"
    bare = make_tiny_pair(tmp_path)
    keys = ranking_config("BPR", data_path=bare.folder, split_protocol="ratio",
                          load_col={"inter": ["user_id", "item_id", "rating"]})
    with pytest.raises(ConfigError, match=message):
        ItemFeatures(prepare_parts(Config(config_dict=keys)).train, None, "zero", 4)


# ---- the gradient of trained tables ---------------------------------------------------------------

OPTIMISERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01),
    "fused": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.001, momentum=0.9, weight_decay=0.01),
}


def steps(module, optimiser, batches, set_to_none=True, clip=None, mirror=False, calls=1, target=1.0):
    """The gradients of the tables and all weights after each step."""
    optimiser, found = optimiser(list(module.parameters())), []
    for items in batches:
        for factor in (1.0, -0.2) if mirror else (1.0,):
            optimiser.zero_grad(set_to_none=set_to_none)
            loss = sum((module.project(part) - target).square().sum() for part in items.chunk(calls))
            (factor * loss).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            tables = [value for name, value in module.named_parameters() if name.startswith("table")]
            found.append([value.grad.clone() for value in tables])
            optimiser.step()
            found.append([value.detach().clone() for value in module.parameters()])
    return found


@pytest.mark.parametrize("keys", [
    {}, {"set_to_none": False}, {"clip": 0.1}, {"mirror": True}, {"calls": 2},
    {"set_to_none": False, "clip": 0.1, "mirror": True, "calls": 3}], ids=str)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_gradient_is_that_of_autograd(make, optimiser, keys):
    features = make(trainable=True)
    plain = Plain(features)
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randperm(13, generator=draw)[:size] for size in (5, 3, 7, 1, 5, 9, 2)]
    ours, theirs = (steps(module, OPTIMISERS[optimiser], batches, **keys) for module in (features, plain))
    assert len(ours) == len(theirs) >= 14
    for mine, dense in zip(ours, theirs, strict=True):
        for one, other in zip(mine, dense, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_step_allocates_no_table(make):
    features = make(trainable=True)
    optimiser = torch.optim.Adam(features.parameters())
    places = set()
    for start in (1, 4, 7):
        optimiser.zero_grad(set_to_none=True)
        features.project(torch.arange(start, start + 3)).sum().backward()
        grad = features.table(0).grad
        places.add(grad.data_ptr())
        assert grad.any(1).nonzero().flatten().tolist() == [item for item in range(start, start + 3)
                                                            if features.present[item, 0]]
        optimiser.step()
    assert len(places) == 1


def test_a_gradient_of_half_precision(make):
    features = make(trainable=True)
    plain = Plain(features)
    for module in (features, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.project(torch.arange(1, 8)).float().square().sum()
        loss.backward()
    torch.testing.assert_close(features.table(0).grad, plain.tables[0].grad)
    assert features.table(0).grad.dtype == torch.float32


def test_a_gradient_from_elsewhere_is_refused(make):
    """Backward would add it to rows that are not known to be touched."""
    features = make(trainable=True)
    features.table(0).sum().backward()
    with pytest.raises(RuntimeError, match="another gradient than its rows'"):
        features.project(torch.arange(1, 4)).sum().backward()


def test_a_frozen_parameter_gets_no_gradient(make):
    features = make(trainable=True)
    features.table(0).requires_grad_(False)
    features.project(torch.arange(1, 4)).sum().backward()
    assert features.table(0).grad is None and features.table(1).grad is not None


# ---- copies ----------------------------------------------------------------------------------------


def test_a_copy_shares_nothing(make):
    """Steps of the one leave table and gradient of the other as they are."""
    features = make(trainable=True)
    features.project(torch.arange(1, 6)).sum().backward()
    other = copy.deepcopy(features)
    before = [features.table(0).detach().clone(), features.table(0).grad.clone()]
    batches = [torch.tensor([1, 2]), torch.tensor([7, 8]), torch.tensor([2, 9])]
    theirs = steps(other, OPTIMISERS["adam"], batches)
    for value, kept in zip((features.table(0), features.table(0).grad), before, strict=True):
        assert torch.equal(value, kept)
    ours = steps(features, OPTIMISERS["adam"], batches)
    for mine, copied in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, mine, copied))


def test_a_state_goes_into_another_module(make):
    """And the one that it comes from does not see the other's steps."""
    features, other = make(trainable=True), make(trainable=True)
    steps(features, OPTIMISERS["adam"], [torch.tensor([3, 4, 5])])
    other.load_state_dict(features.state_dict())
    for name, value in features.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    kept = features.table(0).detach().clone()
    batches = [torch.tensor([1, 2]), torch.tensor([4])]
    after = steps(other, OPTIMISERS["adam"], batches)
    assert torch.equal(features.table(0), kept)
    for mine, loaded in zip(steps(features, OPTIMISERS["adam"], batches), after, strict=True):
        assert all(map(torch.equal, mine, loaded))


def test_another_dtype_after_a_step(make):
    features = make(trainable=True)
    features.project(torch.arange(1, 6)).sum().backward()
    features.double()
    features.zero_grad(set_to_none=True)
    plain = Plain(features)
    for module in (features, plain):
        module.project(torch.tensor([2, 7])).square().sum().backward()
    assert features.table(0).grad.dtype == torch.float64
    torch.testing.assert_close(features.table(0).grad, plain.tables[0].grad)
