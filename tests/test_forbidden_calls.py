"""No code of ours runs what it reads, and no name that it reads becomes a path elsewhere."""

import argparse
import ast
import builtins
import zipfile
from pathlib import Path, PureWindowsPath

import pytest
import yaml

from dataset_prep import encode_command
from dataset_prep.images import image_files, image_name
from dataset_prep.output import checked_name
from recbole_mmdiff.config import Config
from recbole_mmdiff.config.sources import Loader
from recbole_mmdiff.data.feature_files import FeatureError
from recbole_mmdiff.data.feature_lookup import feature_path
from recbole_mmdiff.data.splits import SavedSplit
from recbole_mmdiff.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent
FILES = [*sorted(path for folder in ("recbole_mmdiff", "dataset_prep", "docs")
                 for path in (ROOT / folder).rglob("*.py")),
         ROOT / "setup.py", ROOT / "run_recbole_mmdiff.py"]

#: names that have no business here, called or handed on; a module stands for all that it has
NEVER = {
    "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "pickle.dump", "pickle.dumps", "pickle.Pickler",
    "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pandas.read_pickle",
    "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.load_all",
    "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.Loader", "yaml.CFullLoader", "yaml.CUnsafeLoader",
    "yaml.CLoader", "torch.hub", "torch.jit.load", "shutil.unpack_archive", "runpy"}
#: methods of any object that unpickle, or that unpack wherever an archive says
METHODS = {"extractall", "to_pickle", "read_pickle"}
#: the value that an argument of a call must have, as it is written
REQUIRED = {"torch.load": ("weights_only", {"True"}), "numpy.load": ("allow_pickle", {"False"}),
            "yaml.load": ("Loader", {"yaml.SafeLoader", "yaml.CSafeLoader",
                                     "recbole_mmdiff.config.sources.Loader"})}
SAFE_DEFAULTS = {"trust_remote_code": "False", "allow_pickle": "False", "shell": "False",
                 "weights_only": "True"}


def full_names(tree):
    """What the names of a file stand for: ``np`` -> numpy, ``load`` -> yaml.load, own classes too."""
    names = {name: f"builtins.{name}" for name in dir(builtins)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]:
                      alias.name if alias.asname else alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node, names):
    """``np.load`` as numpy.load; "" for what begins with no import, builtin or name of the file's own."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, names)
        return before and f"{before}.{node.attr}"
    return ""


def forbidden(text, own=""):
    """``line: what`` for everything in the source ``text`` that is forbidden; ``own`` is its module."""
    tree = ast.parse(text)
    names = full_names(tree)
    names |= {node.name: f"{own}.{node.name}" for node in tree.body
              if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    modules = {value.split(".")[0] for value in names.values()}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            what = [dotted(node, names)]
        elif isinstance(node, ast.Import):
            what = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            what = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            what = list(wrong_arguments(node, names, modules))
        elif isinstance(node, ast.arguments):
            what = list(wrong_defaults(node))
        else:
            continue
        found += [f"{getattr(node, 'lineno', '?')}: {one}" for one in what
                  if " " in one or one in NEVER or any(one.startswith(f"{name}.") for name in NEVER)]
    return found


def wrong_arguments(call, names, modules):
    """What a call is given, or not given, that it must not be."""
    called = dotted(call.func, names)
    given = {word.arg: word.value for word in call.keywords}
    if called in REQUIRED:
        key, accepted = REQUIRED[called]
        value = given.get(key)
        written = dotted(value, names) or ast.unparse(value) if value is not None else "nothing"
        if written not in accepted:
            yield f"{called} with {key} = {written}"
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method in METHODS or (method == "extract" and modules & {"tarfile", "zipfile"}):
        yield f"a call of {method}"
    if "shell" in given and ast.unparse(given["shell"]) != "False":
        yield "a call with shell"
    if "allow_pickle" in given and ast.unparse(given["allow_pickle"]) != "False":
        yield "a call with allow_pickle"
    trusted = given.get("trust_remote_code")
    # The user's own key is handed on; nobody else decides.
    if trusted is not None and ast.unparse(trusted).split(".")[-1] not in ("trust_remote_code", "False"):
        yield "a call with trust_remote_code"


def wrong_defaults(arguments):
    """Arguments of a function that are unsafe when they are left out."""
    positional = arguments.posonlyargs + arguments.args
    pairs = [*zip(positional[::-1], arguments.defaults[::-1], strict=False),
             *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    for argument, default in pairs:
        safe = SAFE_DEFAULTS.get(argument.arg)
        if safe and default is not None and ast.unparse(default) != safe:
            yield f"{argument.arg} is {ast.unparse(default)} by default"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert forbidden(path.read_text(encoding="utf-8"), own) == []


@pytest.mark.parametrize("text", [
    "eval(text)", "exec(text)", "compile(text, 'x', 'exec')", "__import__(name)", "run = eval",
    "import builtins\nbuiltins.eval(text)",
    "import os\nos.system(text)", "from os import system as s\ns(text)", "import os\nos.popen(text)",
    "import subprocess\nsubprocess.run(text, shell=True)", "import subprocess as s\ns.Popen(x, shell=y)",
    "import pickle\npickle.load(file)", "from pickle import loads", "import pickle as p\np.Unpickler(f)",
    "import dill\ndill.loads(b)", "import joblib\njoblib.load(f)", "from joblib import load",
    "import shelve\nshelve.open(p)", "import marshal\nmarshal.loads(b)", "import cloudpickle",
    "import pandas as pd\npd.read_pickle(p)", "frame.to_pickle(p)",
    "import torch\ntorch.load(p)", "import torch\ntorch.load(p, weights_only=False)",
    "import torch\ntorch.load(p, weights_only=flag)", "from torch import load\nload(p)",
    "import torch\ntorch.hub.load(a, b)", "import torch\ntorch.jit.load(p)",
    "import numpy as np\nnp.load(p)", "import numpy as np\nnp.load(p, allow_pickle=True)",
    "from numpy import load\nload(p, allow_pickle=flag)",
    "np.lib.format.read_array(file, allow_pickle=True)",
    "import yaml\nyaml.load(text)", "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
    "import yaml\nyaml.load(text, Loader=self.yaml_loader)",      # RecBole's way,
    "import yaml\nloader = yaml.FullLoader\nloader.add_implicit_resolver()",    # and where it has it from
    "from yaml import load, Loader\nload(text, Loader=Loader)", "import yaml\nyaml.full_load(text)",
    "import yaml\nyaml.unsafe_load(text)", "import yaml\nyaml.load_all(text)",
    "AutoModel.from_pretrained(p, trust_remote_code=True)",
    "AutoModel.from_pretrained(p, trust_remote_code=not careful)",
    "def load(path, trust_remote_code=True): pass", "def load(path, *, weights_only=False): pass",
    "import tarfile\ntarfile.open(p).extractall(d)", "import zipfile\nzipfile.ZipFile(p).extract(m)",
    "with ZipFile(p) as archive:\n    archive.extractall()", "import shutil\nshutil.unpack_archive(p)",
    "import tempfile\ntempfile.mktemp()", "from tempfile import mktemp", "import runpy\nrunpy.run_path(p)",
])
def test_the_scan_finds(text):
    assert forbidden(text)


@pytest.mark.parametrize("text", [
    "model.eval()", "import re\nre.compile(text)", "network.compile(dynamic=True)",
    "import ast\nast.literal_eval(text)", "import pickle\nbyte = pickle.PROTO", "frame.str.extract(p)",
    "import torch\ntorch.load(p, weights_only=True)", "import json\njson.load(file)",
    "import numpy as np\nnp.load(p, allow_pickle=False)", "import yaml\nyaml.safe_load(text)",
    "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)", "import subprocess\nsubprocess.run(words)",
    "from recbole_mmdiff.config.sources import Loader\nimport yaml\nyaml.load(text, Loader=Loader)",
    "from_pretrained(p, trust_remote_code=self.source.trust_remote_code)",
    "def load(path, trust_remote_code=False): pass", "import tempfile\ntempfile.mkdtemp()",
])
def test_the_scan_lets_pass(text):
    assert forbidden(text) == []


def test_our_yaml_loader_is_a_safe_one():
    assert issubclass(Loader, yaml.SafeLoader)
    plain = {tag for tag in Loader.yaml_constructors if tag}
    assert all(tag.startswith("tag:yaml.org,2002:") and "python" not in tag for tag in plain)


def test_recbole_reads_yaml_by_our_loader():
    assert Config("Bias").yaml_loader is Loader


def test_code_of_a_model_is_trusted_only_when_asked_by_name():
    parser = argparse.ArgumentParser()
    encode_command.add_arguments(parser)
    required = ["--data=x", "--encoder=text"]
    # Left out, it is what the functions have by default: False, as the scan sees to.
    assert not getattr(parser.parse_args(required), "trust_remote_code", False)
    assert parser.parse_args([*required, "--trust-remote-code"]).trust_remote_code is True


# ---- names that become paths ---------------------------------------------------------------------

PATHS = ["..", "../x", "a/../../x", "/etc/x", "a/b", "..\\x", "C:\\x", "C:x", "\\\\host\\x", "a\0b"]


@pytest.mark.parametrize("name", PATHS)
def test_names_of_data_sets_that_lead_elsewhere_are_refused(name, tmp_path):
    """They name folders, feature files and run folders."""
    message = "is no name of a folder; write the name alone"
    with pytest.raises(ConfigError, match=f"^dataset: .* {message}"):
        Config("Bias", dataset=name)
    pair = {"source_domain": {"dataset": "src"}, "target_domain": {"dataset": name}}
    with pytest.raises(ConfigError, match="dataset: "):
        Config("Bias", config_dict=pair)
    with pytest.raises(ConfigError, match=f"config_dict: target_domain: dataset: .* {message}"):
        Config("Bias", dataset="pair", config_dict=pair)
    with pytest.raises(FeatureError, match="not a usable name"):
        feature_path(tmp_path, name, "text", "npy")
    with pytest.raises(FeatureError, match="not a usable name"):
        feature_path(tmp_path, "toy", name, "npy")
    with pytest.raises(ConfigError, match="is no name of a data set"):
        checked_name(name, "--name")


@pytest.mark.parametrize("name", ["ml-100k", "amazon2018.movies", "a b", "...", ".hidden", "ü"])
def test_other_names_of_data_sets_are_taken(name, tmp_path):
    assert Config("Bias", dataset=name)["dataset"] == name
    assert feature_path(tmp_path, name, "text", "npy").parent == tmp_path


@pytest.mark.parametrize("token", [*PATHS, ".", ".hidden", "%2e%2e%2fx", "a" * 50 + "/" + "b"])
def test_images_of_items_stay_in_their_folder(token, tmp_path):
    name = image_name(token, "png")
    assert PureWindowsPath(name).parts == Path(name).parts == (name,) and not set(name) & set(':\0\\/')
    (tmp_path / name).write_bytes(b"x")
    assert image_files(tmp_path) == {token: tmp_path / name}


@pytest.mark.parametrize("member", ["../x.npy", "/tmp/x.npy", "C:\\x.npy", "protocol.npy"])
def test_an_archive_as_a_split_unpacks_nothing(member, tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "split.npz", "w") as archive:
        archive.writestr(member, b"text")
    with pytest.raises(DataError, match=r"split\.npz is not a saved split"):
        SavedSplit.load(folder / "split.npz")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "b", "split.npz"]
