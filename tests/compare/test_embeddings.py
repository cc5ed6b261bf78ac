"""Vectors for the t-SNE pictures: what is gathered, and that the truth is made apart."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import PRETRAINING, run_keys

from recbole_mmdiff.compare import compare
from recbole_mmdiff.compare.aligned import POOLS, aligned_points, shown_users
from recbole_mmdiff.compare.embeddings import check_models, true_target_vectors, write_embeddings
from recbole_mmdiff.compare.plan import Comparison
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.quick_start import load_run
from recbole_mmdiff.report.embeddings import embedding_plot

PANELS = ["start: image", "start: text", "start: fused", "trained: image", "trained: text", "trained: fused"]
SMALL = {"embedding_size": 8, "num_steps": 6, "curriculum_interval": 1, "epochs": 3, "learning_rate": 0.01}
QUICK = {"pretrain_epochs": 2}


def test_what_is_gathered(write_comparison, tmp_path, inline):
    path = write_comparison(
        models={"EMCDR": QUICK, "DiffCDR": QUICK, "CMF": {}}, seeds=[1],
        embeddings={"models": ["EMCDR", "DiffCDR"], "evaluations": {"DiffCDR": [3, 30]}, "users": 20})
    store = compare(path, tmp_path / "store")
    with np.load(store / "embeddings.npz") as saved:
        vectors, kind, panel = (saved[name] for name in ("vectors", "kind", "panel"))
    assert len(vectors) == len(kind) == len(panel) and np.isfinite(vectors).all()
    kinds = {title: set(kind[panel == title]) for title in dict.fromkeys(panel)}
    assert kinds == {
        "training users": {"truth", "EMCDR", "DiffCDR"}, "test users": {"truth", "EMCDR", "DiffCDR"},
        "DiffCDR, training users": {"source", "truth", "3 evaluations", "30 evaluations"},
        "DiffCDR, test users": {"source", "truth", "3 evaluations", "30 evaluations"}}
    for title in kinds:
        counts = {name: int(((panel == title) & (kind == name)).sum()) for name in kinds[title]}
        assert len(set(counts.values())) == 1 and max(counts.values()) <= 20
    # 30 evaluations is what the run itself does, and 3 is something else.
    test = vectors[(panel == "test users") & (kind == "DiffCDR")]
    thirty, three = (vectors[(panel == "DiffCDR, test users") & (kind == f"{n} evaluations")]
                     for n in (30, 3))
    np.testing.assert_allclose(thirty, test, atol=1e-5)
    assert np.abs(three - test).max() > 1e-4


def test_the_truth_is_the_base_where_nobody_is_held_out(tiny_config, tmp_path):
    """Same start, same batches: with no held-out rows to add it is the run's own target base."""
    run = run_keys(tiny_config("EMCDR", **PRETRAINING), tmp_path / "run")
    for part in (run.parts.valid, run.parts.test):
        part.inter_feat = part.inter_feat[torch.zeros(len(part.inter_feat), dtype=torch.bool)]
    truth = true_target_vectors(run)
    users = torch.arange(run.parts.train.user_num)
    assert torch.equal(truth, run.model.target.user_factors(users).detach())


def test_the_truth_knows_the_held_out_rows_and_the_run_does_not(tiny_config, tmp_path):
    run = run_keys(tiny_config("EMCDR", **PRETRAINING), tmp_path / "run")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    truth = true_target_vectors(run)
    held_out = run.parts.test.users_with_rows()
    start = run.model.target.user_factors(held_out).detach()
    assert (truth[held_out] - start).abs().amax(1).min() > 0
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_a_model_without_vectors_to_show(write_comparison, tmp_path, inline):
    path = write_comparison(seeds=[1], embeddings={"models": ["CMF"]})
    with pytest.raises(ConfigError, match="embeddings: CMF carries no vector"):
        compare(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("embeddings", "message"), [
    ({"models": ["FREEDOM"]}, "FREEDOM carries no vector .* infers no pools"),
    ({"models": ["plugged"], "evaluations": {"plugged": [3]}}, "evaluations: plugged has no num_evaluations"),
    ({"models": ["plugged", "DiffCDR"]}, r"\['DiffCDR'\] carry users between .*\['plugged'\] align items"),
    ({"models": ["plugged"], "users": 1}, "users: 1 is too few"),
])
def test_models_that_do_not_fit(write_comparison, embeddings, message):
    path = write_comparison(models={"plugged": {"model": "CCDRec"}, "FREEDOM": {}, "DiffCDR": {}},
                            embeddings=embeddings)
    with pytest.raises(ConfigError, match=f"embeddings: .*{message}"):
        check_models(Comparison.read(path))


@pytest.fixture(scope="module")
def finished(ranking_config, tmp_path_factory):
    """``finished(**keys)``: the folder of a run of CCDRec; equal keys are run once."""
    folders = {}

    def folder(**keys):
        name = str(sorted(keys.items()))
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("run") / "run"
            run_keys(ranking_config("CCDRec", **{**SMALL, **keys}), folders[name], console=False)
        return folders[name]

    return folder


@pytest.fixture(scope="module")
def training_items(taste_domain):
    """User token -> tokens of the items that it trains on."""
    found = {}
    for user, item, rating, _, label in taste_domain.rows:
        if label == "0" and int(rating) >= 4:
            found.setdefault(user, set()).add(item)
    return found


def by_panel(points):
    """panel -> kind -> vectors (n, d)."""
    found = {}
    for panel, kind, vectors in points:
        found.setdefault(panel, {})[kind] = vectors
    return found


def raw_features(domain, modality):
    """Item token -> its row in the feature file."""
    path = domain.folder / "tgt" / f"tgt.{modality}"
    tokens = path.with_name(path.name + ".tokens").read_text(encoding="utf-8").split()
    return dict(zip(tokens, np.load(path.with_name(path.name + ".npy")), strict=True))


def same_rows(found, expected):
    """The same vectors in any order."""
    found, expected = (array[np.lexsort(np.round(array, 4).T)] for array in (np.asarray(found), expected))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# ---- items beside their users (RQ5) --------------------------------------------------------------


def test_panels_hold_users_and_their_training_items(finished, taste_domain, training_items):
    done = load_run(finished())
    model, dataset = done.model.eval(), done.parts.train
    panels = by_panel(aligned_points(done, 4))
    assert list(panels)[:6] == PANELS
    names = [kind for kind in panels[PANELS[0]] if kind.startswith("user ")]
    assert len(names) == 4 and all(len(training_items[name[5:]]) >= 5 for name in names)
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    graph = model.backbone.item_graph.to_dense().double().numpy()
    fused = 0.5 * (graph @ state["backbone.item_embedding.weight"] + state["aligned"])
    users = model.representations().users.detach()
    for panel in PANELS:
        assert set(panels[panel]) == {*names, *(f"items of {name}" for name in names)}
    for name in names:
        items = sorted(training_items[name[5:]])
        for number, modality in enumerate(("image", "text")):
            raw = raw_features(taste_domain, modality)
            layer = f"backbone.features.projections.{number}"
            kept = np.stack([raw[item] for item in items if item in raw]).astype(float)
            same_rows(panels[f"trained: {modality}"][f"items of {name}"],
                      kept @ state[f"{layer}.weight"].T + state[f"{layer}.bias"])
        ids = [dataset.token2id("item_id", item) for item in items]
        same_rows(panels["trained: fused"][f"items of {name}"], fused[ids])
        own = users[dataset.token2id("user_id", name[5:])]
        for panel in PANELS[3:]:
            torch.testing.assert_close(panels[panel][name][0], own)
            assert not torch.allclose(panels[panel.replace("trained", "start")][name][0], own)


def test_start_is_where_the_run_began(finished):
    """With steps of no length, and no share of what is inferred, nothing has changed at the end."""
    still = by_panel(aligned_points(load_run(finished(learning_rate=1e-30, diffused_weight=0.0)), 3))
    moved = by_panel(aligned_points(load_run(finished()), 3))
    for start, trained in zip(PANELS[:3], PANELS[3:], strict=True):
        for kind, vectors in still[start].items():
            assert torch.equal(vectors, still[trained][kind])
            # Of one seed: the same users, items and first weights.
            assert start == "start: fused" or torch.equal(vectors, moved[start][kind])
            assert not torch.allclose(moved[start][kind], moved[trained][kind])


def toy_run(build_toy, **keys):
    model, train = build_toy("CCDRec", embedding_size=4, knn_k=3, num_steps=4)
    return SimpleNamespace(model=model, config={"seed": 3, **keys}, parts=SimpleNamespace(train=train))


def test_users_with_few_items_where_nobody_has_more(build_toy):
    toy = toy_run(build_toy)
    users = toy.parts.train.inter_feat["user_id"]
    counts = torch.bincount(users)
    enough = set((counts >= min(5, int(counts.max()))).nonzero()[:, 0].tolist())
    shown = shown_users(toy, 100)
    assert {one.user for one in shown} == enough
    for one in shown:
        assert torch.equal(users[one.rows], torch.full_like(one.rows, one.user))
        assert torch.equal(toy.parts.train.inter_feat["item_id"][one.rows], one.items)
        assert one.name == f"user {toy.parts.train.id2token('user_id', one.user)}"
        assert len(set(one.rows.tolist())) == len(one.rows) == counts[one.user]


def test_so_many_users_and_items_at_most(build_toy, monkeypatch):
    monkeypatch.setattr("recbole_mmdiff.compare.aligned.LEAST_ITEMS", 1)
    monkeypatch.setattr("recbole_mmdiff.compare.aligned.MOST_ITEMS", 2)
    drawn = [[one.user for one in shown_users(toy_run(build_toy, seed=seed), 3)] for seed in range(6)]
    assert all(len(set(users)) == 3 for users in drawn) and len(set(map(tuple, drawn))) > 1
    assert all(len(one.rows) <= 2 for one in shown_users(toy_run(build_toy), 3))


# ---- negatives of the pools (RQ6) ----------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["FREEDOM", "LATTICE", "MCDRec"])
def test_pools_are_those_of_the_best_epoch(finished, backbone):
    """What is inferred anew ends where the run's own inference did."""
    keys = {"embedding_size": 16} if backbone == "MCDRec" else {}
    done = load_run(finished(backbone=backbone, **keys))
    aligned = done.model.aligned.clone()
    aligned_points(done, 2)
    assert torch.equal(done.model.aligned, aligned) and torch.equal(done.model.pools[3], aligned)


def test_negatives_are_the_most_similar_of_their_pool(finished, training_items):
    """All items are candidates, and the hardest alone is drawn: the argmax by a loop."""
    done = load_run(finished(candidate_share=1.0, hard_share=1e-6))
    panels = by_panel(aligned_points(done, 4))
    model, dataset = done.model.eval(), done.parts.train
    pools, final = model.pools.numpy(), model.representations().items.detach()
    shown = shown_users(done, 4)
    assert list(panels)[6:] == [f"negatives of {one.name}" for one in shown[:2]]
    for one in shown[:2]:
        panel = panels[f"negatives of {one.name}"]
        assert list(panel) == ["user", "positives", *POOLS]
        torch.testing.assert_close(panel["user"][0], model.representations().users[one.user])
        torch.testing.assert_close(panel["positives"], final[one.items])
        known = {dataset.token2id("item_id", item) for item in training_items[one.name[5:]]}
        assert known == set(one.items.tolist())
        unknown = [item for item in range(1, model.n_items) if item not in known]
        for pool, kind in zip(pools, POOLS, strict=False):
            similar = [unknown[int(np.argmax([pool[own] @ pool[item] for item in unknown]))]
                       for own in one.items.tolist()]
            torch.testing.assert_close(panel[kind], final[similar])


def test_no_negative_is_known(finished, training_items):
    done = load_run(finished())
    panels = by_panel(aligned_points(done, 2))
    final = done.model.eval().representations().items.detach()
    for one in shown_users(done, 2):
        for kind in POOLS:
            distance = torch.cdist(panels[f"negatives of {one.name}"][kind].double(), final.double())
            tokens = done.parts.train.id2token("item_id", distance.argmin(1).numpy())
            assert distance.min(1).values.max() < 1e-4
            assert not set(tokens) & training_items[one.name[5:]]


# ---- the file and the picture --------------------------------------------------------------------


def test_the_same_file_at_each_call(finished, tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with np.load(write_embeddings(tmp_path / name, {"CCDRec": finished()}, {}, 3)) as saved:
            files.append({key: saved[key] for key in saved})
    assert files[0].keys() == {"vectors", "kind", "panel"}
    assert all((files[0][key] == files[1][key]).all() for key in files[0])


def test_several_models_of_different_sizes(finished, tmp_path):
    folders = {"one": finished(), "two": finished(embedding_size=4)}
    with np.load(write_embeddings(tmp_path, folders, {})) as saved:
        vectors, kind, panel = (saved[key] for key in ("vectors", "kind", "panel"))
    assert list(dict.fromkeys(panel))[:6] == [f"one, {title}" for title in PANELS]
    assert len(set(panel)) == 16 and {name.split(",")[0] for name in panel} == {"one", "two"}
    two = np.char.startswith(panel, "two")
    assert vectors.shape[1] == 8 and (vectors[two, 4:] == 0).all() and (vectors[two, :4] != 0).any(1).all()
    assert len({name for name in kind if name.startswith("user ")}) == 5


def test_a_picture_of_users_and_negatives(write_comparison, ranking_config, tmp_path, inline, monkeypatch):
    keys = ranking_config("CCDRec", **SMALL)
    keys.pop("model")
    path = write_comparison(models={"ours": {"model": "CCDRec"}}, seeds=[1], keys=keys,
                            tables={"ranking": {"metrics": ["ranking_full.ndcg@10"]}},
                            embeddings={"models": ["ours"], "users": 2})
    store, figures = compare(path, tmp_path / "store"), []
    monkeypatch.setattr("recbole_mmdiff.report.embeddings.save", lambda figure, *rest: figures.append(figure))
    embedding_plot(store / "embeddings.npz", tmp_path / "x")
    axes, (legend,) = figures[0].axes, figures[0].legends
    assert [one.get_title() for one in axes[:6]] == PANELS and len(axes) == 8
    names = [text.get_text() for text in legend.get_texts()]
    assert names[4:] == ["user", "positives", *POOLS]
    # Stars and dots of a user have one colour, and every star lies on top.
    colour = {name: tuple(handle.get_facecolor()[0][:3])
              for name, handle in zip(names, legend.legend_handles, strict=True)}
    users = [name for name in names if name.startswith("user ")]
    assert all(colour[name] == colour[f"items of {name}"] for name in users)
    assert len(set(colour.values())) == len(colour) - 2 and colour["user"] == (0, 0, 0)
    for one in axes:
        counts = [len(drawn.get_offsets()) for drawn in one.collections]
        assert counts[-1] == 1 and all(count > 1 for count in counts[:-2])
