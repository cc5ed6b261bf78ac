"""SIEOUG: the contract, its items and losses by slow loops, its matchings, and both domains' evaluation."""

import shutil

import numpy as np
import pytest
import torch
from contract import ModelContract
from recbole.data.interaction import Interaction
from running import positive_pairs, run_keys

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.loaders import stage_loader
from recbole_mmdiff.data.preparation import prepare_parts
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.evaluator import DualEvaluator, make_evaluator
from recbole_mmdiff.model.sieoug import SIEOUG
from recbole_mmdiff.model.user_guidance import GUIDED, UserGuidance
from recbole_mmdiff.model.user_matching import MATCHINGS, UserMatching, shared_places
from recbole_mmdiff.transport import match_users

SMALL = {"embedding_size": 8, "num_layers": 2, "num_clusters": 3, "knn_k": 4, "train_batch_size": 128}
RATIO = {"split_protocol": "ratio", "eval_passes": ["ranking_full"]}


class TestSIEOUG(ModelContract):
    """Items of two modalities in both domains."""

    model = "SIEOUG"
    featured = True
    keys = SMALL
    accurate_keys = {"epochs": 30, "learning_rate": 0.02, "temperature": 0.2, "guidance_temperature": 0.2,
                     "eval_step": 0}
    missing = ""

    @pytest.fixture(scope="class", autouse=True)
    def features(self, content):
        type(self).keys = {**SMALL, "modalities": ["text", "image"], "data_path": content(self.missing)}


class TestSIEOUGWithFewImages(TestSIEOUG):
    """Most items lack an image; all users are matched at once, and linked ones stand together."""

    missing = "few"

    @pytest.fixture(scope="class", autouse=True)
    def features(self, content):
        type(self).keys = {**SMALL, "modalities": ["text", "image"], "data_path": content(self.missing),
                           "guidance": "hard", "matching_scope": "epoch"}


@pytest.fixture(scope="module")
def built(tiny_config, content):
    """``built(**keys)``: a model with drawn weights in float64, a batch of both domains, and the data."""

    def build(missing="", std=0.5, **keys):
        config = Config(config_dict=tiny_config(
            "SIEOUG", **{**SMALL, **RATIO, "modalities": ["text", "image"], "data_path": content(missing),
                         "overlap_ratio": 0.5, "linked_share": 1.0, **keys}))
        train = prepare_parts(config).train
        torch.manual_seed(3)
        model = SIEOUG(config, train).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)
        model.seed, model.epoch = 5, 1
        return model, next(iter(stage_loader(config, train, "both", 40, seed=5))), train

    return build


def numbers(tensor):
    return tensor.detach().numpy()


def unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def known_of(model):
    """By id, who has training rows in the source, and in the target."""
    return model.has_rows("source"), model.has_rows("target")


# ---- items -----------------------------------------------------------------------------------------


def vectors_by_hand(domain, rows, num_users, num_items):
    """U and V of one domain with dense matrices (Eqs. 11 to 15)."""
    adjacency = np.zeros((num_users + num_items,) * 2)
    for user, item in rows:
        adjacency[user, num_users + item] = adjacency[num_users + item, user] = 1
    degrees = np.maximum(adjacency.sum(1), 1)
    adjacency /= np.sqrt(degrees[:, None] * degrees)
    users, items = numbers(domain.user_embedding.weight), numbers(domain.item_embedding.weight)

    def mean_of_layers(step, layer):
        found = [layer]
        for number in range(2):
            found.append(step(found[-1], number))
        return sum(found) / 3

    joined = mean_of_layers(lambda layer, _: adjacency @ layer, np.concatenate([users, items]))
    exploration = domain.exploration
    graph, gamma = exploration.item_graph.to_dense().numpy(), numbers(exploration.gamma)
    similar = mean_of_layers(lambda layer, _: graph @ layer, items)
    nodes, edges = gamma.sum(1), gamma.sum(0)
    nodes = np.where(nodes > 0, 1 / np.sqrt(np.where(nodes > 0, nodes, 1)), 0)
    operator = nodes[:, None] * (gamma / edges) @ (gamma.T * nodes)
    grouped = mean_of_layers(
        lambda layer, number: operator @ layer @ numbers(exploration.weights[number].weight).T, items)
    parts = [joined[num_users:], similar, grouped]
    logits = np.stack([(part * weight).sum(1) for part, weight
                       in zip(parts, numbers(exploration.attention), strict=True)])
    weights = np.exp(logits) / np.exp(logits).sum(0)
    return joined[:num_users], (weights[:, :, None] * np.stack(parts)).sum(0)


@pytest.mark.parametrize("missing", ["", "few"])
def test_vectors_by_hand(built, missing):
    model, _, train = built(missing)
    for name, domain in (("target", train), ("source", train.source)):
        found = model.domains[name].representations()
        users, items = vectors_by_hand(model.domains[name], positive_pairs(domain), domain.user_num,
                                       domain.item_num)
        np.testing.assert_allclose(numbers(found.users), users, atol=1e-6)
        np.testing.assert_allclose(numbers(found.items), items, atol=1e-6)


def test_graphs(built):
    """[PAD] stands nowhere; clusters are of equal size, and rows of the items in the graph sum to 1."""
    model, _, train = built("few", num_clusters=3)
    exploration = model.domains["target"].exploration
    graph, gamma = exploration.item_graph.to_dense(), exploration.gamma
    assert not graph[0].any() and not graph[:, 0].any() and not gamma[0].any()
    assert ((graph > 0).sum(1) <= 2 * 4).all() and (graph.diagonal()[1:] > 0).all()
    torch.testing.assert_close(gamma[1:].sum(1), torch.ones(train.item_num - 1).double())
    torch.testing.assert_close(gamma.sum(0), torch.full((3,), (train.item_num - 1) / 3).double(), rtol=1e-5,
                               atol=0)


# ---- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_contrastive_loss_by_hand(built, temperature):
    """A row's item against the other items of the batch that its user has in no training row (Eq. 16)."""
    model, batch, train = built(temperature=temperature)
    for name, domain, prefix in (("target", train, ""), ("source", train.source, "source_")):
        users, items = batch[prefix + "user_id"], batch[prefix + "item_id"]
        tables = model.domains[name].representations()
        u, v = unit(numbers(tables.users)), unit(numbers(tables.items))
        known, losses = set(positive_pairs(domain)), []
        for user, item in zip(users.tolist(), items.tolist(), strict=True):
            others = [other for other in set(items.tolist()) if (user, other) not in known]
            total = sum(np.exp(u[user] @ v[other] / temperature) for other in others)
            losses.append(np.log(total) - u[user] @ v[item] / temperature if others else 0.0)
        found = model.domains[name].contrastive_loss(users, items, tables, temperature)
        assert found.item() == pytest.approx(np.mean(losses), rel=1e-9)


def guidance_by_hand(plan, source, target, links, temperature, guided):
    """Eq. 23, user by user: negatives are the other domain's users but for the linked and the most
    probable one."""
    total = 0.0
    for own, others, matrix, linked in ((source, target, plan, dict(links)),
                                        (target, source, plan.T, {t: s for s, t in links})):
        losses = []
        for user, row in enumerate(matrix):
            if not row.sum() or (guided == "linked" and user not in linked):
                continue
            matched = unit(sum(mass * others[other] for other, mass in enumerate(row)))
            negatives = [other for other in range(len(others))
                         if other != linked.get(user) and other != row.argmax()]
            losses.append(np.log(sum(np.exp(own[user] @ others[other] / temperature) for other in negatives))
                          - own[user] @ matched / temperature)
        total += np.mean(losses)
    return total


@pytest.mark.parametrize("guided", GUIDED)
@pytest.mark.parametrize("matching", [matching for matching in MATCHINGS if matching != "none"])
def test_loss_across_domains_by_hand(built, matching, guided):
    model, batch, _ = built(matching=matching, guided_users=guided, guidance_weight=0.7, temperature=0.5,
                            guidance_temperature=0.5)
    users = model.guidance.halves(batch["source_user_id"], batch["user_id"],
                                  torch.zeros(model.num_linked + 1), known_of(model))
    tables = [model.domains[name].representations().users for name in ("source", "target")]
    vectors = tuple(table[ids] for table, ids in zip(tables, users, strict=True))
    links = list(zip(*(place.tolist() for place in shared_places(*users, model.num_linked)), strict=True))
    assert len(links) > 3 and all(users[0][s] == users[1][t] for s, t in links)
    plans, plan = [], model.guidance.matcher.plan
    model.guidance.matcher.plan = lambda halves: plans.append(plan(halves)) or plans[-1]
    found = model.guidance(users, tuple(tables))
    assert model.guidance.linked_counts == [len(links)]
    expected = guidance_by_hand(numbers(plans[0]), *(unit(numbers(part)) for part in vectors), links, 0.5,
                                guided)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    rest = sum(model.domains[name].contrastive_loss(batch[prefix + "user_id"], batch[prefix + "item_id"],
                                                    model.domains[name].representations(), 0.5)
               for name, prefix in (("target", ""), ("source", "source_")))
    model.guidance.matcher.matched_before.zero_()
    assert model.ranking_loss(batch).item() == pytest.approx(rest.item() + 0.7 * expected, rel=1e-6)


@pytest.mark.parametrize("guidance", ["mask", "hard", "none"])
def test_loss_across_domains_where_all_users_are_matched_at_once(built, guidance):
    """Partners are of the whole other domain, by vectors of before the epoch; negatives of the batch."""
    model, batch, _ = built(matching_scope="epoch", guidance=guidance, guidance_temperature=0.5)
    tables = [model.domains[name].representations().users for name in ("source", "target")]
    everyone = [known.nonzero().squeeze(1) for known in known_of(model)]
    halves = [unit(numbers(table[ids])) for table, ids in zip(tables, everyone, strict=True)]
    plan = match_users(*(torch.as_tensor(half) for half in halves), model.guidance.matcher.epsilon,
                       links=shared_places(*everyone, model.num_linked), guidance=guidance,
                       tolerance=model.guidance.matcher.tolerance)[0].dense().numpy()
    model.before_epoch(1)
    with torch.no_grad():       # Vectors move on within the epoch; the plan stays.
        for name in ("source", "target"):
            model.domains[name].user_embedding.weight += 0.1
    tables = [model.domains[name].representations().users for name in ("source", "target")]
    users = model.guidance.halves(batch["source_user_id"], batch["user_id"],
                                  torch.zeros(model.num_linked + 1), known_of(model))
    assert any(len(part) < len(ids) for part, ids in zip(users, everyone, strict=True))
    total = 0.0
    for side, matrix in ((0, plan), (1, plan.T)):
        own, others = (unit(numbers(tables[place])) for place in (side, 1 - side))
        batch_others, losses = users[1 - side].tolist(), []
        for user in users[side].tolist():
            row = matrix[everyone[side].tolist().index(user)]
            matched = unit(row @ others[everyone[1 - side]])
            best = int(everyone[1 - side][row.argmax()])
            linked = user if user <= model.num_linked else None
            negatives = [other for other in batch_others if other not in (linked, best)]
            losses.append(np.log(sum(np.exp(own[user] @ others[other] / 0.5) for other in negatives))
                          - own[user] @ matched / 0.5)
        total += np.mean(losses)
    found = model.guidance(users, tuple(tables))
    assert found.item() == pytest.approx(total, rel=1e-6)
    found.backward()
    assert all(model.domains[name].user_embedding.weight.grad.any() for name in ("source", "target"))


@pytest.mark.parametrize(("keys", "reached"), [({}, True), ({"matching": "none"}, False),
                                               ({"guidance_weight": 0.0}, False)])
def test_variant_o_learns_apart(built, keys, reached):
    """Without the loss across domains, source rows teach the target nothing."""
    model, batch, _ = built(**keys)
    alone = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.ranking_loss(batch).backward()
    gradients = [value.grad.clone() for value in model.domains["target"].parameters()]
    model.zero_grad()
    torch.nn.init.normal_(model.domains["source"].user_embedding.weight)
    model.guidance.matcher.matched_before.zero_()
    model.ranking_loss(batch).backward()
    same = all(torch.equal(before, value.grad) for before, value
               in zip(gradients, model.domains["target"].parameters(), strict=True))
    assert same != reached
    assert alone.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("guidance", ["mask", "hard"])
def test_linked_users_are_in_both_halves(built, guidance):
    """And ``hard`` holds them together."""
    model, batch, _ = built(guidance=guidance)
    uniforms = torch.zeros(model.num_linked + 1)
    known = [part.clone() for part in known_of(model)]
    stranger = int(batch["source_user_id"][batch["source_user_id"] <= model.num_linked][0])
    known[1][stranger] = False      # no training row in the target
    source, target = model.guidance.halves(batch["source_user_id"], batch["user_id"], uniforms, known)
    own = {name: set(batch[field].tolist()) for name, field in (("source", "source_user_id"),
                                                              ("target", "user_id"))}
    for name, other, found, rows in (("source", "target", source, known[0]),
                                     ("target", "source", target, known[1])):
        joining = {user for user in own[other] if user <= model.num_linked and rows[user]}
        assert set(found.tolist()) == own[name] | joining
        assert joining - own[name], "nobody joins"
    assert stranger in source and (stranger in target) == (stranger in own["target"])
    links = shared_places(source, target, model.num_linked)
    assert len(links[0]) == len({user for user in source.tolist() if user <= model.num_linked}
                                & set(target.tolist()))
    none = model.guidance.halves(batch["source_user_id"], batch["user_id"], uniforms + 0.5, known)
    model.guidance.linked_share = 0.4
    fewer = model.guidance.halves(batch["source_user_id"], batch["user_id"], uniforms + 0.5, known)
    assert set(none[0].tolist()) == set(source.tolist()) and set(fewer[0].tolist()) <= set(source.tolist())


# ---- scores ----------------------------------------------------------------------------------------


def test_users_without_rows_borrow_from_the_other_domain(built):
    model, _, train = built()
    domain = model.domains["target"]
    domain.has_rows[1] = False      # linked, with source rows
    domain.has_rows[train.num_overlap + 1] = False
    model.eval()
    found, source = model.vectors_of("target").users, model.vectors_of("source").users
    torch.testing.assert_close(found[1], source[1])
    users = domain.representations().users[domain.has_rows].mean(0)
    torch.testing.assert_close(found[train.num_overlap + 1], users / users.norm())
    model.guides = False        # as SIEOUG-O: the domains have nothing to do with each other
    model.forget()
    torch.testing.assert_close(model.vectors_of("target").users[1], users / users.norm())


def test_both_domains_are_evaluated(tiny_config, content, tmp_path):
    """The source's ranking, user by user, and the mean of both as the validation score."""
    keys = tiny_config("SIEOUG", **{**SMALL, **RATIO, "data_path": content(""), "modalities": ["text"],
                                    "overlap_ratio": 0.5, "save_per_user": True})
    made = run_keys(keys, tmp_path / "run")
    found = made.metrics["test"]["source_ranking_full"]
    parts, model = made.parts, made.model.eval()
    train, test = parts.observed.source, parts.test.source
    tables, gains = model.vectors_of("source"), []
    seen = {tuple(pair) for part in (train, parts.valid.source)
            for pair in zip(part.inter_feat["user_id"].tolist(), part.inter_feat["item_id"].tolist(),
                            strict=True)}
    wanted = {}
    for user, item in positive_pairs(test):
        wanted.setdefault(user, set()).add(item)
    for user, items in wanted.items():
        scores = numbers(tables.items @ tables.users[user])
        order = [item for item in np.argsort(-scores, kind="stable") if item and (user, item) not in seen]
        discounts = 1 / np.log2(np.arange(2, 12))
        gains.append(sum(discounts[rank] for rank, item in enumerate(order[:10]) if item in items)
                     / discounts[:min(10, len(items))].sum())
    assert found["ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-9)
    linked = [gain for user, gain in zip(wanted, gains, strict=True) if user <= parts.num_overlap]
    assert 0 < len(linked) < len(gains)
    assert made.metrics["groups"]["linked_users"]["source_ranking_full"]["ndcg@10"] \
        == pytest.approx(np.mean(linked), abs=1e-9)
    history = made.metrics["history"][-1]
    evaluator = make_evaluator(made.config, parts)
    assert isinstance(evaluator, DualEvaluator)
    valid = [evaluator.evaluate(model, "valid").metrics[name]["ndcg@10"]
             for name in ("ranking_full", "source_ranking_full")]
    assert made.metrics["best_epoch"] >= 0 and "valid_score" in history
    assert evaluator.score(model)[0] == pytest.approx(np.mean(valid))
    with np.load(made.folder / "per_user.npz") as per_user:
        assert np.mean(per_user["source_ranking_full.ndcg@10"]) == pytest.approx(found["ndcg@10"])


def test_the_target_alone_is_evaluated_where_the_source_is_not_split(tiny_config, content, tmp_path):
    made = run_keys(tiny_config("SIEOUG", **{**SMALL, "data_path": content(""), "modalities": ["text"],
                                             "split_protocol": "cold_start_users", "epochs": 1,
                                             "eval_passes": ["ranking_full"]}), tmp_path / "run")
    assert list(made.metrics["test"]) == ["ranking_full"]


def test_source_rows_of_the_test_reach_nothing(tiny_config, content, tmp_path):
    """Held-out rows of both domains are other ones, and the weights the same."""
    runs = []
    for name, seed in (("before", 1), ("after", 1)):
        folder = tmp_path / name
        shutil.copytree(content(""), folder)
        keys = tiny_config("SIEOUG", **{**SMALL, **RATIO, "data_path": folder, "modalities": ["text"],
                                        "eval_step": 0, "split_seed": seed})
        runs.append(keys)
    first = run_keys(runs[0], tmp_path / "first")
    for part in ("source", "target"):
        held_out = first.parts.test if part == "target" else first.parts.test.source
        path = tmp_path / "after" / held_out.dataset_name / f"{held_out.dataset_name}.inter"
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        tokens = {(held_out.field2id_token["user_id"][user], held_out.field2id_token["item_id"][item])
                  for user, item in zip(held_out.inter_feat["user_id"].tolist(),
                                        held_out.inter_feat["item_id"].tolist(), strict=True)}
        place = header.split("\t").index("rating:float")
        changed = []
        for line in lines:
            cells = line.split("\t")
            if (cells[0], cells[1]) in tokens:
                cells[place] = "1" if float(cells[place]) > 3 else "5"
            changed.append("\t".join(cells))
        assert changed != lines
        path.write_text("\n".join([header, *changed]) + "\n", encoding="utf-8")
    second = run_keys(runs[1], tmp_path / "second")
    for (key, value), other in zip(first.model.state_dict().items(), second.model.state_dict().values(),
                                   strict=True):
        assert torch.equal(value, other), key


# ---- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value", "message"), [
    ("matching", "nearest", "matching: 'nearest' is not known, use one of"),
    ("guidance", "soft", "guidance: 'soft' is not known"),
    ("matching_scope", "run", "matching_scope: 'run' is not known"),
    ("matching_tolerance", 0, "matching_tolerance: 0 is too small"),
    ("epsilon", 0, "epsilon: 0 is too small"),
    ("train_neg_ratio", 1, "train_neg_ratio: SIEOUG reads no such negatives"),
    ("linked_share", 2, "linked_share: 2 is no share"),
    ("guided_users", "cold", "guided_users: 'cold' is not known, use one of"),
    ("num_clusters", 0, "num_clusters: 0 is too small"),
    ("num_clusters", 10**6, "num_clusters, cluster_weight, anneal_from: .*too large"),
    ("graph_weight", 0, "graph_weight: mu=0"),
    ("cost_scale", "max", "cost_scale")])
def test_bad_keys(built, key, value, message):
    with pytest.raises(ConfigError, match=message):
        model, batch, _ = built(**{key: value})
        model.ranking_loss(batch)


@pytest.mark.parametrize("matching", ["links", "gromov"])
def test_what_is_matched_batch_by_batch_alone(built, matching):
    with pytest.raises(ConfigError, match="matching_scope: epoch is for matching: transport"):
        built(matching=matching, matching_scope="epoch")


@pytest.mark.parametrize("keys", [{}, {"matching_scope": "epoch"}, {"matching": "links"}], ids=str)
def test_weights_that_are_lost_end_in_advice(tiny_config, content, tmp_path, keys):
    """Also where the matching is the first to find it out."""
    keys = {**SMALL, **RATIO, "data_path": content(""), "learning_rate": 1e30, **keys}
    keys = tiny_config("SIEOUG", **keys)
    with pytest.raises(ValueError, match=r"in epoch [01].* lower learning_rate .*, or set clip_grad_norm"):
        run_keys(keys, tmp_path, console=False)


def test_a_guidance_without_linked_users():
    """Two domains with nobody in common are matched all the same."""
    matcher = UserMatching(9, matching="transport", scope="batch", guidance="mask", epsilon=0.1,
                           cost_scale="unit", tolerance=1e-4)
    guidance = UserGuidance(matcher, 0, temperature=1.0, linked_share=1.0, guided="all")
    users = torch.arange(1, 5), torch.arange(5, 8)
    draw = torch.Generator().manual_seed(1)
    tables = tuple(torch.randn(9, 3, generator=draw, requires_grad=True) for _ in users)
    loss = guidance(users, tables)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(table.grad[ids].any() for table, ids in zip(tables, users, strict=True))
    assert guidance.linked_counts == [0]


def test_one_row_is_no_problem(built):
    """A batch whose user knows all of its items has no negatives."""
    model, batch, _ = built()
    one = Interaction({field: batch[field][:1] for field in batch})
    loss = model.ranking_loss(one)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.grad is not None)
