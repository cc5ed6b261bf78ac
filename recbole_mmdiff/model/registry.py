"""From a model's name to its class: ours, then plug-ins, then RecBole's own."""

import importlib
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from recbole_mmdiff.errors import ConfigError, suggest

#: name of the model -> module that holds the class of that name
MODELS = {
    "Bias": "recbole_mmdiff.model.bias",
    "MF": "recbole_mmdiff.model.mf",
    "CMF": "recbole_mmdiff.model.cmf",
    "EMCDR": "recbole_mmdiff.model.emcdr",
    "DiffCDR": "recbole_mmdiff.model.diffcdr",
    "SSCDR": "recbole_mmdiff.model.sscdr",
    "LACDR": "recbole_mmdiff.model.lacdr",
    "PTUPCDR": "recbole_mmdiff.model.ptupcdr",
    "CoNet": "recbole_mmdiff.model.conet",
    "BiTGCF": "recbole_mmdiff.model.bitgcf",
    "P2M2CDR": "recbole_mmdiff.model.p2m2cdr",
    "MMDCDR": "recbole_mmdiff.model.mmdcdr",
    "MuSiC": "recbole_mmdiff.model.music",
    "FREEDOM": "recbole_mmdiff.model.freedom",
    "VBPR": "recbole_mmdiff.model.vbpr",
    "BM3": "recbole_mmdiff.model.bm3",
    "MMGCN": "recbole_mmdiff.model.mmgcn",
    "SLMRec": "recbole_mmdiff.model.slmrec",
    "LATTICE": "recbole_mmdiff.model.lattice",
    "MCDRec": "recbole_mmdiff.model.mcdrec",
    "CCDRec": "recbole_mmdiff.model.ccdrec",
    "LGMRec": "recbole_mmdiff.model.lgmrec",
    "SIEOUG": "recbole_mmdiff.model.sieoug",
    "DisenCDR": "recbole_mmdiff.model.disencdr",
    "GOUM": "recbole_mmdiff.model.goum",
}
_registered: dict[str, type] = {}


def register_model(cls: type) -> type:
    """Class decorator: make ``cls`` known under its own name, in this process."""
    _registered[cls.__name__] = cls
    return cls


def recbole_models() -> dict[str, str]:
    """Lower-case names of RecBole's built-in models and the modules that hold them."""
    root = Path(find_spec("recbole").origin).parent / "model"
    return {path.stem: f"recbole.model.{path.parent.name}.{path.stem}"
            for path in sorted(root.glob("*_recommender/*.py")) if path.stem != "__init__"}


def get_model(name: str) -> type:
    """The class of a model: registered here, ours, of a plug-in (entry-point group
    ``recbole_mmdiff.models``), or RecBole's.

    Raises:
        ConfigError: no such model; names the nearest one.
    """
    if name in _registered:
        return _registered[name]
    if name in MODELS:
        return getattr(importlib.import_module(MODELS[name]), name)
    plugins = {point.name: point for point in entry_points(group="recbole_mmdiff.models")}
    if name in plugins:
        return plugins[name].load()
    builtin = recbole_models()
    if name.lower() in builtin:
        module = importlib.import_module(builtin[name.lower()])
        if isinstance(getattr(module, name, None), type):
            return getattr(module, name)
        found = [attr for attr, value in vars(module).items()
                 if attr.lower() == name.lower() and isinstance(value, type)]
    else:
        found = []
    hint = f"; did you mean {found[0]!r}?" if found else suggest(
        name, [*_registered, *MODELS, *plugins, *builtin])
    raise ConfigError(f"model: there is no model {name!r}{hint}")
