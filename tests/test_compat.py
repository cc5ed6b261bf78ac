"""Every breakage of RecBole on today's stack: it fails without its patch and works with it."""

import importlib
import logging
import multiprocessing
import os
import re
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from recbole_mmdiff import compat, storage

INTERACTIONS = [(user, item) for user in range(8) for item in range(10) if (user * 3 + item) % 4]
ITEMS = """item_id:token\tbrand:token\tgenres:token_seq\tprice:float\tvector:float_seq
i0\tacme\tred blue\t1.0\t1.0 2.0
i1\t\tblue\t\t3.0 5.0
i2\tacme\t\t3.0\t2.0
i3\tzeta\tgreen\t5.0\t
"""  # i1, i2 and i3 each lack cells, the items from i4 on the whole row.

needs = {
    "numpy": pytest.mark.skipif(compat.release("numpy") < (2,), reason="numpy 1 needs no patch"),
    "pandas": pytest.mark.skipif(compat.release("pandas") < (3,), reason="pandas < 3 is fine"),
    "scipy": pytest.mark.skipif(compat.release("scipy") < (1, 13), reason="scipy < 1.13 is fine"),
    "torch": pytest.mark.skipif(compat.release("torch") < (2, 6), reason="torch < 2.6 unpickles"),
}


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """RecBole reads the command line and writes to the working directory and the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def config(tmp_path):
    """A function that configures a model on a tiny data set with missing cells."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    rows = "\n".join(f"u{u}\ti{i}\t{1 + (u + i) % 5}\t{10 * u + i}" for u, i in INTERACTIONS)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "tiny.inter").write_text(header + rows + "\n")
    (folder / "tiny.item").write_text(ITEMS)

    def configure(model="BPR", **values):
        from recbole.config import Config

        defaults = {
            "data_path": str(tmp_path),
            "checkpoint_dir": str(tmp_path / "saved"),
            "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
            "gpu_id": "",
            "epochs": 1,
            "embedding_size": 8,
            "show_progress": False,
        }
        return Config(model=model, dataset="tiny", config_dict=defaults | values)

    return configure


def with_items(**values):
    """Settings that load the columns of the item file as well."""
    columns = {"inter": ["user_id", "item_id", "timestamp"]}
    return {"load_col": columns | {"item": ["item_id", "brand", "genres", "price", "vector"]}} | {
        "normalize_all": False,
        "filter_inter_by_user_or_item": False,
        **values,
    }


def without(number: int, module: str) -> ModuleType:
    """A second copy of a RecBole module, with all of its patches but those of one breakage."""
    spec = spec_from_file_location(f"unmended_{module.replace('.', '_')}", find_spec(module).origin)
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    for patch in compat.active_patches():
        if re.fullmatch(patch.modules, module) and patch.number != number and not patch.around:
            patch.apply(copy)
    return copy


def build(config, model=None, dataset_class=None):
    """Data set, loaders and model of a configuration."""
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model

    dataset = dataset_class(config) if dataset_class else create_dataset(config)
    loaders = data_preparation(config, dataset)
    return (model or get_model(config["model"]))(config, loaders[0]._dataset), loaders


def run_python(code: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own that finds the same packages."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_import_is_light():
    done = run_python(
        "import sys, recbole_mmdiff\n"
        "print([m for m in ('torch', 'numpy', 'recbole', 'pandas') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_1_and_2_quick_start_is_importable_and_leaves_no_ray():
    done = run_python(
        "import sys, recbole_mmdiff, recbole.quick_start.quick_start as q\n"
        "q.tune.report(recall=1.0)\n"
        "print(q.run_recbole.__name__, 'ray' in sys.modules)"
    )
    assert done.stdout.strip() == "run_recbole False", done.stderr


@pytest.mark.skipif(not compat.patches._ray_cannot_start(), reason="ray works on this stack")
def test_1_and_2_quick_start_fails_without_the_stand_in():
    with pytest.raises(ImportError):
        without(1, "recbole.quick_start.quick_start")


def test_2_stand_ins_nest_and_give_a_real_module_back(monkeypatch):
    real = ModuleType("ray")
    monkeypatch.setitem(sys.modules, "ray", real)
    with compat.patches._without_ray(real), compat.patches._without_ray(real):
        assert sys.modules["ray"] is not real
    assert sys.modules["ray"] is real


@needs["numpy"]
def test_3_config_is_constructed_and_numpy_left_alone(config):
    settings = config()
    unmended = without(3, "recbole.config.configurator").Config
    with pytest.raises(AttributeError, match=r"np\.float_"):
        unmended.compatibility_settings(settings)
    assert not hasattr(np, "float") and not hasattr(np, "unicode")


@needs["numpy"]
def test_3_metrics_use_the_old_names():
    hits = np.array([[True, False], [False, True]]), np.array([1, 1])
    module = "recbole.evaluator.metrics"
    mended = importlib.import_module(module)
    assert mended.MRR.metric_info(None, hits[0]).tolist() == [[1.0, 1.0], [0.0, 0.5]]
    with pytest.raises(AttributeError, match="float"):
        without(3, module).MRR.metric_info(None, hits[0])


@needs["scipy"]
@pytest.mark.parametrize("name", ["LightGCN", "NGCF", "SpectralCF", "GCMC"])
def test_4_adjacency_of_graph_models(config, name):
    settings = config(name, layers=[8], gcn_output_dim=8)
    model, _ = build(settings)
    module = type(model).__module__
    with pytest.raises(AttributeError, match="_update"):
        build(settings, getattr(without(4, module), name))


@needs["scipy"]
def test_4_adjacency_is_right(config):
    model, loaders = build(config("LightGCN"))
    links = loaders[0]._dataset.inter_matrix(form="csr").astype(float)
    full = sparse.block_array([[None, links], [links.T, None]]).toarray()
    degree = full.sum(axis=1) + 1e-7
    expected = full / np.sqrt(np.outer(degree, degree))
    torch.testing.assert_close(model.norm_adj_matrix.to_dense().numpy(), expected.astype("f4"))


def test_4_every_user_of_update_is_mended():
    for name in ("general.ncl", "knowledge_aware.kgin", "knowledge_aware.mcclk"):
        kind, model = name.split(".")
        module = importlib.import_module(f"recbole.model.{kind}_recommender.{model}")
        adjacency = module.sp.dok_matrix((2, 3), dtype=np.float32)
        adjacency._update({(0, 2): 1, (1, 0): 4})
        assert adjacency.toarray().tolist() == [[0, 0, 1], [4, 0, 0]]
        module.sp.dok_matrix((2, 2))._update({})


def train(config, trainer_class=None):
    from recbole.utils import get_trainer, init_seed

    init_seed(1, True)
    model, (train_data, valid_data, test_data) = build(config)
    trainer_class = trainer_class or get_trainer(config["MODEL_TYPE"], config["model"])
    trainer = trainer_class(config, model)
    trainer.fit(train_data, valid_data, show_progress=False)
    return trainer, test_data


@pytest.fixture
def no_unpickling(monkeypatch):
    """From here on, torch.load must be told to read plain values only."""
    load = torch.load

    def plain_only(*args, **kwargs):
        assert kwargs.get("weights_only") is True
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", plain_only)


SEQUENTIAL = {
    "train_neg_sample_args": None,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
}


@pytest.mark.parametrize("name", ["BPR", "ItemKNN", "EASE", "Pop", "LightGCN", "SASRecF"])
def test_5_trainer_saves_loads_and_resumes(config, no_unpickling, name):
    sequential = with_items(selected_features=["genres"], hidden_size=8, **SEQUENTIAL)
    settings = config(name, **(sequential if name == "SASRecF" else {}))
    trainer, test_data = train(settings)
    before = trainer.evaluate(test_data, load_best_model=False)
    again = type(trainer)(settings, build(settings)[0])
    assert again.evaluate(test_data, model_file=trainer.saved_model_file) == before
    again.resume_checkpoint(trainer.saved_model_file)
    assert again.start_epoch == 1
    stored = storage.load_plain(trainer.saved_model_file)
    assert stored["config"]["model"] == name
    assert stored["config"]["MODEL_TYPE"] == settings["MODEL_TYPE"].name
    assert "feature_embed_layer" not in stored["other_parameter"]


def test_5_neumf_saves_itself_as_the_weights_that_it_loads(config, tmp_path, no_unpickling):
    paths = {f"{part}_pretrain_path": str(tmp_path / f"{part}.pth") for part in ("mf", "mlp")}
    models = []
    for part in ("mf", "mlp"):
        trained = {"mf_train": part == "mf", "mlp_train": part == "mlp"}
        models.append(build(config("NeuMF", **trained, **paths))[0])
        models[-1].dump_parameters()
    both = build(config("NeuMF", use_pretrain=True, **paths))[0]
    assert torch.equal(both.user_mf_embedding.weight, models[0].user_mf_embedding.weight)
    assert torch.equal(both.item_mlp_embedding.weight, models[1].item_mlp_embedding.weight)


@needs["torch"]
def test_5_without_the_patch_the_config_is_pickled_and_refused(config):
    trainer, test_data = train(config(), without(5, "recbole.trainer.trainer").Trainer)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        trainer.evaluate(test_data)


def test_5_load_data_and_model_rebuilds_the_config(config, no_unpickling, monkeypatch):
    from recbole.quick_start import load_data_and_model, quick_start

    monkeypatch.setattr(quick_start, "init_logger", lambda config: None)
    settings = config(embedding_size=12, metrics=["Recall"], topk=[3], valid_metric="Recall@3")
    trainer, _ = train(settings)
    loaded, model, dataset, *loaders = load_data_and_model(trainer.saved_model_file)
    assert (loaded["embedding_size"], loaded["MODEL_TYPE"]) == (12, settings["MODEL_TYPE"])
    assert (loaded["device"], loaded["data_path"]) == (settings["device"], settings["data_path"])
    assert dataset.user_num == 9 and len(loaders) == 3
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_5_a_string_of_the_checkpoint_is_not_evaluated(config, monkeypatch):
    from recbole.quick_start import load_data_and_model, quick_start

    monkeypatch.setattr(quick_start, "init_logger", lambda config: None)
    trainer, _ = train(config())
    checkpoint = storage.load_plain(trainer.saved_model_file)
    checkpoint["config"]["note"] = "[].append(1) or 'evaluated'"
    storage.save_plain(checkpoint, trainer.saved_model_file)
    assert load_data_and_model(trainer.saved_model_file)[0]["note"].startswith("[]")


def features_of(module, settings):
    """The columns of the items that are built from the tiny data set, by the item's token."""
    dataset = module.Dataset(settings)
    dataset.build()
    tokens = dataset.id2token("item_id", range(dataset.item_num))
    features = dataset.get_item_feature()
    return {
        field: dict(zip(tokens, features[field].tolist(), strict=True))
        for field in features.columns
    }


DATASET = "recbole.data.dataset.dataset"


@needs["pandas"]
def test_6_sequences_are_normalised(config):
    settings = config(**with_items(normalize_field=["vector"], normalize_all=None))
    vectors = features_of(importlib.import_module(DATASET), settings)["vector"]
    # The file holds 1 2 | 3 5 | 2 | nothing: the smallest becomes 0, the largest 1.
    assert [vectors[f"i{i}"] for i in range(4)] == [[0, 0.25], [0.5, 1], [0.25, 0], [0, 0]]
    with pytest.raises(Exception, match="does not match length"):
        features_of(without(6, DATASET), settings)


@needs["pandas"]
def test_6_benchmark_files_of_sequential_models(config, tmp_path):
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    for part in ("train", "valid", "test"):
        rows = "u0\ti0 i1\ti2\nu1\ti3\ti1\nu2\ti2 i1 i0\ti3\n"
        (tmp_path / "tiny" / f"tiny.{part}.inter").write_text(header + rows)
    settings = config(
        "GRU4Rec",
        benchmark_filename=["train", "valid", "test"],
        alias_of_item_id=["item_id_list"],
        load_col={"inter": ["user_id", "item_id_list", "item_id"]},
        **SEQUENTIAL,
    )
    _, loaders = build(settings)
    lengths = loaders[0]._dataset.inter_feat["item_length"]
    assert sorted(lengths.tolist()) == [1, 2, 3]
    assert len(loaders[0]) == 1
    dataset = without(6, "recbole.data.dataset.sequential_dataset").SequentialDataset(settings)
    assert sorted(dataset.build()[0].inter_feat["item_length"].tolist()) != [1, 2, 3]


def test_6_knowledge_dataset_is_mended_too():
    for name in ("dataset", "kg_dataset", "sequential_dataset"):
        module = importlib.import_module(f"recbole.data.dataset.{name}")
        if compat.release("pandas") >= (3,):
            assert module.len(pd.Series([[1, 2], [3]])).tolist() == [2, 1]
            assert module.len([1, 2, 3]) == 3


@needs["pandas"]
def test_7_a_missing_sequence_is_empty(config):
    settings = config(**with_items())
    genres = features_of(importlib.import_module(DATASET), settings)["genres"]
    assert [sum(map(bool, genres[f"i{i}"])) for i in range(5)] == [2, 1, 0, 1, 0]
    with pytest.raises(AttributeError, match="split"):
        features_of(without(7, DATASET), settings)


@needs["pandas"]
def test_8_missing_tokens_are_padding_and_floats_the_mean(config):
    settings = config(**with_items())
    features = features_of(importlib.import_module(DATASET), settings)
    assert features["brand"]["i0"] == features["brand"]["i2"] > 0
    assert [features["brand"][token] for token in ("i1", "i4", "i9")] == [0, 0, 0]
    assert [features["price"][token] for token in ("i1", "i4", "i9")] == [3.0, 3.0, 3.0]

    broken = features_of(without(8, DATASET), settings)
    assert min(broken["brand"].values()) < 0
    assert any(np.isnan(value) for value in broken["price"].values())


def search(module):
    """Scores of an exhaustive search over two keys."""
    tuning = module.HyperTuning(
        lambda values, files: {
            "model": "BPR",
            "best_valid_score": values["a"] + values["b"],
            "valid_score_bigger": True,
            "best_valid_result": {},
            "test_result": {},
        },
        params_dict={"choice": {"a": [1, 2], "b": [10, 20]}},
        algo="exhaustive",
        early_stop=10,
    )
    tuning.run()
    return sorted(tuning.score_list), tuning.best_params


def test_9_exhaustive_search():
    pytest.importorskip("hyperopt", reason="hyperopt, RecBole's optional tuner, is not installed")
    module = "recbole.trainer.hyper_tuning"
    assert search(importlib.import_module(module)) == ([11, 12, 21, 22], {"a": 2, "b": 20})
    if compat.release("hyperopt") >= (0, 2, 7):
        with pytest.raises(AttributeError, match="integers"):
            search(without(9, module))


def test_10_tensorboard_goes_to_the_run_folder(config, tmp_path):
    settings = config()
    handler = logging.NullHandler()
    handler.run_folder, handler.tensorboard = str(tmp_path / "run"), True
    logging.getLogger().addHandler(handler)
    try:
        train(settings)
    finally:
        logging.getLogger().removeHandler(handler)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert not (tmp_path / "log_tensorboard").exists()


def test_10_tensorboard_without_a_run_is_as_before(config, tmp_path):
    train(config())
    assert (tmp_path / "log_tensorboard").exists()


def test_11_kmeans_stand_in_can_be_imported_but_says_what_it_needs():
    with compat.patches._without_kmeans(ModuleType("any")):
        from kmeans_pytorch import kmeans
    with pytest.raises(ImportError, match="pip install kmeans-pytorch"):
        kmeans(None, num_clusters=2)


def test_a_spawned_worker_that_receives_our_objects_is_mended():
    code = "__import__('recbole.evaluator.metrics', fromlist=['np']).np.__class__.__name__"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        plain = "__import__('sys').modules.get('recbole_mmdiff') is None"
        assert pool.apply(eval, (plain,))
        sent = {"ours": storage.CheckpointError("sent to the worker")}
        assert pool.apply(eval, (code, sent)) == "Namespace"


def test_modules_loaded_before_are_mended_and_installing_again_changes_nothing():
    done = run_python(
        "import recbole.evaluator.metrics as m, recbole.data.interaction as i, sys\n"
        "before = type(m.np).__name__\n"
        "import recbole_mmdiff as r\n"
        "first, finders = m.np, len(sys.meta_path)\n"
        "r.compat.install()\n"
        "print(before, type(first).__name__, m.np is first, len(sys.meta_path) == finders)"
    )
    assert done.stdout.strip() == "module Namespace True True", done.stderr


def test_reloading_mends_again():
    done = run_python(
        "import recbole_mmdiff, importlib, recbole.evaluator.metrics as m\n"
        "importlib.reload(m)\n"
        "print(type(m.np).__name__, type(m.np._original).__name__)"
    )
    assert done.stdout.strip() == "Namespace module", done.stderr


def test_active_patches_have_reasons_and_come_in_order():
    patches = compat.active_patches()
    assert [p.number for p in patches] == sorted(p.number for p in patches)
    assert all(p.reason.endswith(".") and p.modules.startswith("recbole.") for p in patches)
    assert {5, 10} <= {p.number for p in patches}


def test_every_pattern_names_existing_modules():
    root = find_spec("recbole").submodule_search_locations[0]
    files = Path(root).rglob("*.py")
    names = [".".join(("recbole", *f.relative_to(root).with_suffix("").parts)) for f in files]
    for patch in compat.PATCHES:
        assert any(re.fullmatch(patch.modules, name) for name in names), patch.name


def test_no_use_in_recbole_is_forgotten():
    """RecBole's sources are searched for the old calls; all of them sit in mended modules."""
    root = Path(find_spec("recbole").submodule_search_locations[0])
    calls = {3: r"np\.(float|int|str|object|unicode)\b", 4: r"\._update\(", 6: r"\.agg\(len\)"}
    calls[5] = r"torch\.(load|save)\("
    for file in root.rglob("*.py"):
        name = ".".join(("recbole", *file.relative_to(root).with_suffix("").parts))
        for number, call in calls.items():
            if re.search(call, file.read_text(encoding="utf-8")):
                patches = [p for p in compat.PATCHES if re.fullmatch(p.modules, name)]
                assert number in {p.number for p in patches}, (name, call)


def test_12_sequential_models_do_not_turn_anomaly_detection_on():
    importlib.import_module("recbole.model.sequential_recommender")
    assert not torch.is_anomaly_enabled()


def test_13_training_does_not_warn_of_the_old_grad_scaler(config, recwarn):
    train(config())
    assert not [warning for warning in recwarn if "GradScaler" in str(warning.message)]
