"""RecBole's Config with our defaults, values parsed as YAML, and keys that are checked."""

import copy
import os
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import yaml
from recbole.config import Config as RecBoleConfig
from recbole.utils import ModelType

from recbole_mmdiff import distributed
from recbole_mmdiff.config.defaults import domain_pairs, paper_form, read_defaults
from recbole_mmdiff.config.evaluation import check_topk, separate_metrics, settle_evaluation
from recbole_mmdiff.config.keys import check_columns, check_known, check_types, model_keys, recbole_keys
from recbole_mmdiff.config.processes import own_gpu, settle_processes, show_all_gpus
from recbole_mmdiff.config.sources import Loader, merge, parse_value, read_yaml
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.files import is_plain_name, write_atomically
from recbole_mmdiff.model.registry import get_model

DOMAINS = ("source_domain", "target_domain")


class Config(RecBoleConfig):
    """The configuration of one run.

    Lowest first: RecBole's defaults, ``properties/overall.yaml``, ``properties/cross_domain.yaml``
    (two domains only), ``properties/model/<Model>.yaml``, ``properties/plain/<Model>.yaml`` (with
    ``paper: True`` only), ``properties/dataset/<dataset>.yaml``, the configuration files in their
    order, ``config_dict``, ``overrides``. Mappings are merged key by key, everything else is
    replaced. Unlike RecBole's, it reads no ``sys.argv`` and evaluates no strings.

    Args:
        model: name or class of the model; None takes the key ``model``.
        dataset: name of the data set, or of a pair of domains in ``properties/dataset``; None
            takes the key ``dataset``, else the two domain blocks, else the embedded default pair.
        config_file_list: YAML files, lowest first.
        config_dict: values set from Python; strings among them are parsed as YAML.
        overrides: values of the command line, as ``parse_overrides`` gives them.

    Attributes:
        origin: for every key set by hand, the file or "command line" that it came from.
        valid_pass, valid_key: where the validation score stands among the metrics, for instance
            ``ranking_full`` and ``ndcg@10``.
        run_dict: the merged values before RecBole derives others from them: what a run folder's
            ``config.yaml`` holds, and what builds the same configuration again.

    Raises:
        ConfigError: unknown key, wrong type, unreadable file, or a value that is not accepted.
    """

    def __init__(self, model=None, dataset=None, config_file_list=None, config_dict=None,
                 overrides=None):
        self._overrides = overrides or {}
        self.origin: dict[str, str] = {}
        super().__init__(model, dataset, config_file_list, config_dict)
        self.valid_pass, self.valid_key = settle_evaluation(self.final_config_dict, self.model_class)

    # ---- reading -----------------------------------------------------------------------------

    def _build_yaml_loader(self):
        return Loader

    def _load_config_files(self, file_list):
        merged: dict = {}
        for path in file_list or ():
            content = read_yaml(path)
            self.origin.update(dict.fromkeys(content, str(path)))
            merged = merge(merged, content)
        return merged

    def _convert_config_dict(self, config_dict):
        return {key: parse_value(value) if isinstance(value, str) else value
                for key, value in config_dict.items()}

    def _load_variable_config_dict(self, config_dict):
        self.origin.update(dict.fromkeys(config_dict or (), "config_dict"))
        return super()._load_variable_config_dict(config_dict)

    def _load_cmd_line(self):
        self.origin.update(dict.fromkeys(self._overrides, "command line"))
        return self._overrides

    def _merge_external_config_dict(self):
        self.external_config_dict = merge(
            merge(self.file_config_dict, self.variable_config_dict), self.cmd_config_dict)

    # ---- model, data set, defaults ------------------------------------------------------------

    def _get_model_and_dataset(self, model, dataset):
        model = model or self.external_config_dict.get("model")
        if model is None:
            raise ConfigError("model: none is given, write --model=NAME (for instance DiffCDR)")
        model_class = model if isinstance(model, type) else get_model(str(model))
        dataset = dataset or self.external_config_dict.get("dataset")
        if dataset is None:
            blocks = [self.external_config_dict.get(domain) for domain in DOMAINS]
            named = [str(block["dataset"]) for block in blocks
                     if isinstance(block, dict) and "dataset" in block]
            dataset = "-".join(named) or "ml100k-pair"
        self._check_name("dataset", dataset)
        return model_class.__name__, model_class, str(dataset)

    def _load_internal_config_dict(self, model, model_class, dataset):
        super()._load_internal_config_dict(model, model_class, dataset)
        dataset_defaults = read_defaults(f"dataset/{dataset}.yaml")
        given = merge(dataset_defaults, self.external_config_dict)
        files = ["overall.yaml", f"model/{model}.yaml"]
        self.backbone_keys: set[str] = set()
        if hasattr(model_class, "backbone_class"):     # A plug-in has its backbone's keys, below its own.
            backbone = model_class.backbone_class(merge(read_defaults(files[1]), given).get("backbone"))
            self.backbone_keys = model_keys(backbone)
            files[1:1] = [f"model/{base.__name__}.yaml" for base in reversed(backbone.__mro__)]
        if given.get("target_domain"):
            files.insert(1, "cross_domain.yaml")
        layers = [read_defaults(name) for name in files]
        if given.get("paper") is True:  # What is no truth value is refused with the other types.
            layers.append(paper_form(model))
        ours = reduce(merge, layers, {})
        self.our_keys = set(ours)
        self.internal_config_dict = merge(merge(self.internal_config_dict, ours), dataset_defaults)

    def _get_final_config_dict(self):
        given, defaults = self.external_config_dict, self.internal_config_dict
        known = set(defaults) | recbole_keys() | model_keys(self.model_class) | self.backbone_keys
        check_known(given, known, self.origin, self.model)
        check_types(given, defaults, self.origin, self.our_keys)
        final = merge(defaults, given)
        check_columns(final, self.origin)
        for domain in DOMAINS:
            self._check_domain(domain, final.get(domain), known)
            self._refuse_other_fields(domain, final)
        # RecBole replaces a whole mapping; merging would mix two ways to split.
        if "split" in (given.get("eval_args") or {}):
            final["eval_args"]["split"] = given["eval_args"]["split"]
        return final

    def _check_domain(self, domain: str, block, known: set[str]) -> None:
        if block is None:
            return
        origin = self.origin.get(domain, domain)
        if not isinstance(block, dict) or "dataset" not in block:
            raise ConfigError(f"{origin}: {domain}: needs a mapping with the key 'dataset', "
                              f"not {block!r}")
        self._check_name(f"{origin}: {domain}: dataset", block["dataset"])
        origins = dict.fromkeys(block, f"{origin}: {domain}")
        check_known(block, known, origins, self.model)
        check_columns(block, origins)

    @staticmethod
    def _check_name(where: str, dataset) -> None:
        """Files and run folders are named after data sets, and must not lie elsewhere for it."""
        if not is_plain_name(str(dataset)):
            raise ConfigError(f"{where}: {dataset!r} is no name of a folder; write the name alone, and the "
                              f"folder that holds it as data_path")

    def _refuse_other_fields(self, domain: str, final: dict) -> None:
        """Models and metrics read both domains by the same names of columns."""
        for key, value in (final.get(domain) or {}).items():
            if key.endswith("_FIELD") and value != final.get(key):
                raise ConfigError(
                    f"{self.origin.get(domain, domain)}: {domain}: {key}: {value!r} is not the other "
                    f"domain's {final.get(key)!r}; name the columns alike in both files, and set {key} "
                    f"outside of the blocks")

    # ---- what follows from the values ----------------------------------------------------------

    def _set_default_parameters(self):
        final = self.final_config_dict
        self.data_root = final["data_path"]
        self._settle_domains()
        final["model"], final["dataset"] = self.model, self.dataset
        # A GPU that nobody chose is no choice for who resumes the run, perhaps on several.
        left_out = {"MODEL_TYPE"} | {"gpu_id"} - self.origin.keys()
        self.run_dict = {key: value for key, value in final.items() if key not in left_out}
        self.run_dict = _with_absolute_paths(self.run_dict)
        if final["split_seed"] is None:
            final["split_seed"] = final["seed"]
        check_topk(final["topk"])
        separate_metrics(final)
        if final["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            final["repeatable"] = True
            if final.get("loss_type") == "CE" \
                    and "train_neg_sample_args" not in self.external_config_dict:
                final["train_neg_sample_args"] = None
        with self._told_as_ours():
            super()._set_default_parameters()

    def _init_device(self):
        """RecBole's choice among ``gpu_id``, of which each process of a machine takes its own.

        RecBole would join the processes here, over nccl whatever the device is.
        """
        final = self.final_config_dict
        settle_processes(final)
        if final["gpu_id"] is None or final.get("use_gpu") is False:    # RecBole takes a GPU all the same.
            final["gpu_id"] = ""
        elif distributed.launched() > 1:
            final["gpu_id"] = own_gpu(final["gpu_id"], "gpu_id" in self.origin)
        super()._init_device()
        if final["world_size"] > 1 == distributed.launched():
            show_all_gpus()     # Each of the processes takes its own.

    def _set_train_neg_sample_args(self):
        with self._told_as_ours():
            super()._set_train_neg_sample_args()

    def _set_eval_neg_sample_args(self, phase):
        with self._told_as_ours():
            super()._set_eval_neg_sample_args(phase)

    def _settle_domains(self):
        final = self.final_config_dict
        both = [bool(final.get(domain)) for domain in DOMAINS]
        if any(both) and not all(both):
            missing = DOMAINS[both.index(False)]
            raise ConfigError(f"{missing}: is missing; two domains need source_domain.dataset and "
                              f"target_domain.dataset")
        self.cross_domain = all(both)
        if final["split_file"] and not self.cross_domain:
            raise ConfigError("split_file: needs a source and a target domain; in one domain use "
                              "benchmark_filename")
        if not self.cross_domain and getattr(self.model_class, "needs_source", False):
            raise ConfigError(
                f"{self.model} transfers between two domains: set source_domain.dataset and "
                f"target_domain.dataset, or --dataset to one of the pairs {domain_pairs()}")
        if self.cross_domain and final["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            raise ConfigError(f"{self.model}: sequential models run on one domain, "
                              f"write --dataset=NAME")
        labelled = final["MODEL_TYPE"] in (ModelType.CONTEXT, ModelType.DECISIONTREE)
        if self.cross_domain and labelled and not final.get("threshold"):
            final["threshold"] = {final["RATING_FIELD"]: final["positive_rating"]}

    @contextmanager
    def _told_as_ours(self):
        """RecBole's own complaints about values, with where values were set."""
        try:
            yield
        except ConfigError:
            raise
        except (LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            places = ", ".join(sorted(set(self.origin.values()))) or "the defaults"
            raise ConfigError(f"RecBole refuses the configuration: {error} (set in: {places})") from error

    # ---- one domain's view ---------------------------------------------------------------------

    def for_domain(self, domain: str) -> "Config":
        """The configuration as the data set of one domain reads it."""
        block = self.final_config_dict[domain]
        child = copy.copy(self)
        child.final_config_dict = {**self.final_config_dict, **block}
        root = block.get("data_path", self.data_root)
        child.final_config_dict["data_path"] = os.path.join(root, str(block["dataset"]))
        child.final_config_dict["dataset"] = str(block["dataset"])
        return child

    def plain_run_dict(self) -> dict:
        """``run_dict`` in what YAML can hold."""
        return _plain(self.run_dict)

    def save(self, path: str | Path) -> None:
        """Write ``run_dict`` as YAML: ``Config(config_file_list=[path])`` is this run again."""
        text = yaml.safe_dump(self.plain_run_dict(), sort_keys=True, allow_unicode=True)
        with write_atomically(path) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")

    def without_effect(self) -> list[str]:
        """One line for every key that was set by hand, is RecBole's, and does nothing here."""
        instead = {"eval_batch_size": "eval_chunk_elements bounds the memory of an evaluation"}
        instead |= dict.fromkeys(
            ("save_dataset", "dataset_save_path", "save_dataloaders", "dataloaders_save_path"),
            "data are read anew at each run, which takes less than RecBole's pickles save")
        if not self.cross_domain:
            instead["positive_rating"] = "in one domain set threshold"
        return [f"{key} has no effect: {reason}" for key, reason in instead.items()
                if key in self.origin]

    def changes(self) -> str:
        """One line for every value set by hand: key, value, where it came from."""
        return "\n".join(f"  {key} = {self.external_config_dict[key]!r}   ({origin})"
                         for key, origin in sorted(self.origin.items())
                         if key in self.external_config_dict)


def _with_absolute_paths(values: dict) -> dict:
    """Paths that stay right when the run is resumed from another folder."""
    values = dict(values)
    for key in ("data_path", "user_link_file_path", "split_file"):
        if isinstance(values.get(key), str):
            values[key] = os.path.abspath(values[key])
    for domain in DOMAINS:
        if values.get(domain):
            values[domain] = _with_absolute_paths(values[domain])
    return values


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
