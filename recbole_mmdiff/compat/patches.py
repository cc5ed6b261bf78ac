"""The breakages of RecBole 1.2, by number."""

import builtins
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from recbole_mmdiff.compat.mending import Namespace, patch, release


@contextmanager
def _stand_in(name: str, **attributes: Any) -> Iterator[None]:
    """A bare module of this name that can be imported for a while."""
    before = sys.modules.get(name)
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(attributes)
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def _ray_is_old() -> bool:
    return release("ray") < (2, 7)


def _ray_cannot_start() -> bool:
    return not release("ray") or (_ray_is_old() and find_spec("pkg_resources") is None)


@patch(1, r"quick_start\.quick_start", _ray_cannot_start, around=True)
@patch(2, r"quick_start\.quick_start", _ray_is_old, around=True, numpy=(2,))
def _without_ray(module: ModuleType) -> Any:
    """quick_start imports ray: absent, or wants setuptools < 82 (1) or numpy 1's bool8 (2).

    It uses ``tune.report`` only, which does nothing outside a ray session: so does this stand-in.
    """
    return _stand_in("ray", tune=Namespace(ModuleType("ray.tune"), report=lambda **metrics: None))


@patch(3, r"config\.configurator", numpy=(2,))
def _config_without_aliases(module: ModuleType) -> None:
    """Config() makes global aliases out of np.float_ and others, which numpy 2 removed."""
    module.Config.compatibility_settings = lambda self: None


@patch(3, r"(evaluator\.metrics|data\.(interaction|dataset\.dataset)|trainer\.\w+)", numpy=(2,))
def _old_numpy_names(module: ModuleType) -> None:
    """np.float, np.bool and np.str are used, which numpy 2 lacks and Config cannot bring back."""
    np = module.np
    module.np = Namespace(np, float=np.float64, int=np.int_, bool=np.bool_, str=np.str_)


@patch(4, r"model\.\w+\.(spectralcf|gcmc|lightgcn|ngcf|ncl|kgin|mcclk)", scipy=(1, 13))
def _dok_update(module: ModuleType) -> None:
    """Graph models fill their adjacency with dok_matrix._update, which scipy 1.13 removed.

    They fill it once and then only read it, which a CSR matrix does as well, and faster.
    """
    from scipy import sparse

    class FilledOnce(sparse.csr_matrix):
        def _update(self, cells: dict[tuple[int, int], float]) -> None:
            rows, columns = zip(*cells, strict=True) if cells else ((), ())
            values = (list(cells.values()), (rows, columns))
            self.__init__(values, shape=self.shape, dtype=self.dtype)

    module.sp = Namespace(module.sp, dok_matrix=FilledOnce)


@patch(5, r"(trainer\.trainer|model\.\w+\.(convncf|nais|ract|neumf|kd_dagfm|s3rec))")
def _plain_checkpoints(module: ModuleType) -> None:
    """Checkpoints pickle the Config, which torch >= 2.6 does not load, and which can run code."""
    from recbole_mmdiff import storage

    def load(f: Any, map_location: Any = "cpu", **ignored: Any) -> Any:
        return storage.load_plain(f, map_location)

    def save(obj: Any, f: Any, **ignored: Any) -> None:
        storage.save_plain(_without_modules(obj), f)

    module.torch = Namespace(module.torch, load=load, save=save)


def _without_modules(obj: Any) -> Any:
    """Leave out of a checkpoint the modules, which "state_dict" holds already.

    NeuMF saves itself where its loader wants a state dictionary. DIN, SASRecF and others list their
    embedding layers in "other_parameter".
    """
    from torch import nn

    if isinstance(obj, nn.Module):
        return obj.state_dict()
    if not (isinstance(obj, dict) and isinstance(obj.get("other_parameter"), dict)):
        return obj
    stored = {name.split(".")[0] for name in obj["state_dict"]}
    others = obj["other_parameter"].items()
    kept = {k: v for k, v in others if not (isinstance(v, nn.Module) and k in stored)}
    return {**obj, "other_parameter": kept}


@patch(5, r"quick_start\.quick_start")
def _load_from_plain(module: ModuleType) -> None:
    """load_data_and_model builds the dataset out of the pickled Config of a checkpoint."""

    def load_data_and_model(model_file: str) -> tuple:
        """Config, model, dataset and its three loaders, out of the checkpoint of a RecBole model.

        What depends on the machine, such as the device, is settled anew rather than restored.
        """
        from recbole_mmdiff.storage import load_plain

        checkpoint = load_plain(model_file)
        config = _restore_config(module.Config, checkpoint["config"])
        module.init_seed(config["seed"], config["reproducibility"])
        module.init_logger(config)
        dataset = module.create_dataset(config)
        loaders = module.data_preparation(config, dataset)
        module.init_seed(config["seed"], config["reproducibility"])
        model = module.get_model(config["model"])(config, loaders[0]._dataset)
        model = model.to(config["device"])
        model.load_state_dict(checkpoint["state_dict"])
        model.load_other_parameter(checkpoint.get("other_parameter"))
        return config, model, dataset, *loaders

    module.load_data_and_model = load_data_and_model


def _restore_config(config_class: Callable, entries: dict[str, Any]) -> Any:
    """A Config with these entries, set afterwards: it runs the strings that it is given as code."""
    config = config_class(model=entries["model"], dataset=entries["dataset"])
    settings = config.final_config_dict
    for key in entries.keys() - {"device", "gpu_id", "local_rank", "single_spec"}:
        kind = type(settings.get(key))
        settings[key] = kind[entries[key]] if issubclass(kind, Enum) else entries[key]
    return config


@patch(6, r"data\.dataset\.(dataset|kg_dataset|sequential_dataset)", pandas=(3,))
def _len_of_cells(module: ModuleType) -> None:
    """column.agg(len) means the length of every cell, and in pandas 3 that of the column.

    These modules give a column to ``len`` in no other place, so theirs can map over it.
    """
    from pandas import Series

    def length(obj: Any) -> Any:
        return obj.map(builtins.len) if isinstance(obj, Series) else builtins.len(obj)

    module.len = length


@patch(7, r"data\.dataset\.dataset", pandas=(3,))
def _missing_sequences(module: ModuleType) -> None:
    """A missing cell of a _seq column crashes: it is filled in a copy of the column in pandas 3."""
    pd = module.pd
    # pandas warns that RecBole's own attempt to fill the column does nothing: no longer needed.
    warning = pd.errors.ChainedAssignmentError
    warnings.filterwarnings("ignore", category=warning, module=re.escape(module.__name__))

    def read_csv(*args: Any, **kwargs: Any) -> Any:
        frame = pd.read_csv(*args, **kwargs)
        return frame.fillna({name: "" for name in frame if str(name).endswith("_seq")})

    module.pd = Namespace(pd, read_csv=read_csv)


@patch(8, r"data\.dataset\.dataset", pandas=(3,))
def _missing_values(module: ModuleType) -> None:
    """Missing tokens become huge ids, floats stay NaN: they are filled in a copy in pandas 3."""
    import numpy as np

    types = module.FeatureType

    def _fill_nan(self: Any) -> None:
        """Missing tokens become [PAD], which is 0, floats the mean, sequences empty."""
        for feat in (getattr(self, name) for name in self.feat_name_list):
            for field in feat:
                ftype, column = self.field2type[field], feat[field]
                if ftype == types.TOKEN:
                    feat[field] = column.fillna(0).astype(np.int64)
                elif ftype == types.FLOAT:
                    feat[field] = column.fillna(column.mean())
                else:
                    empty = np.array([], np.int64 if ftype == types.TOKEN_SEQ else np.float64)
                    feat[field] = column.map(lambda x, e=empty: e if isinstance(x, float) else x)

    module.Dataset._fill_nan = _fill_nan


@patch(9, r"trainer\.hyper_tuning", hyperopt=(0, 2, 7))
def _generator_for_hyperopt(module: ModuleType) -> None:
    """Exhaustive search gives a RandomState where hyperopt >= 0.2.7 wants numpy's Generator."""
    np = module.np
    module.np = Namespace(np, random=Namespace(np.random, RandomState=np.random.default_rng))


class _NoTensorBoard:
    """Takes every call of a SummaryWriter and writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@patch(10, r"trainer\.trainer")
def _tensorboard_of_the_run(module: ModuleType) -> None:
    """TensorBoard files go to the working directory, not to the run_folder of a log handler."""
    elsewhere = module.get_tensorboard

    def get_tensorboard(logger: logging.Logger) -> Any:
        for handler in (*logger.handlers, *logging.getLogger().handlers):
            if folder := getattr(handler, "run_folder", None):
                if not handler.tensorboard:
                    return _NoTensorBoard()
                from torch.utils.tensorboard import SummaryWriter

                return SummaryWriter(os.path.join(folder, "tensorboard"))
        return elsewhere(logger)

    module.get_tensorboard = get_tensorboard


def _kmeans_is_undeclared() -> bool:
    return release("recbole") < (1, 2, 1) and find_spec("kmeans_pytorch") is None


@patch(11, r"model\.general_recommender\.ldiffrec", _kmeans_is_undeclared, around=True)
def _without_kmeans(module: ModuleType) -> Any:
    """RecBole 1.2.0 imports an undeclared kmeans_pytorch with its general models, for LDiffRec."""

    def kmeans(*args: Any, **kwargs: Any) -> None:
        raise ImportError("LDiffRec needs kmeans_pytorch: pip install kmeans-pytorch")

    return _stand_in("kmeans_pytorch", kmeans=kmeans)


@patch(12, r"model\.sequential_recommender\.sine")
def _without_anomaly_detection(module: ModuleType) -> None:
    """Importing any sequential model turns autograd's slow anomaly detection on for all (SINE)."""
    module.torch.autograd.set_detect_anomaly(False)


@patch(13, r"trainer\.trainer", torch=(2, 4))
def _current_grad_scaler(module: ModuleType) -> None:
    """torch warns at every epoch that torch.cuda.amp.GradScaler has another name now."""
    module.amp = Namespace(module.amp, GradScaler=partial(module.torch.amp.GradScaler, "cuda"))
