"""Our own defaults: the files of ``properties`` that lie above RecBole's."""

from functools import reduce

from recbole_mmdiff.config.sources import merge, properties_path, read_yaml
from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.model.registry import MODELS


def read_defaults(name: str) -> dict:
    """The keys of a file below ``properties``; none if there is no such file."""
    path = properties_path() / name
    return read_yaml(path) if path.is_file() else {}


def paper_form(model: str) -> dict:
    """The keys of ``properties/plain/<model>.yaml``: the form in which papers train a model.

    A list ``extends`` in a file of that folder names others of it, which lie beneath its own keys,
    the first one lowest.

    Raises:
        ConfigError: the model has no such file, or a file extends one that is not there.
    """
    folder = properties_path() / "plain"
    known = [name for name in MODELS if (folder / f"{name}.yaml").is_file()]
    if model not in known:
        raise ConfigError(f"paper: True: there is no paper's form of {model}, only of {known}; leave "
                          f"the key out, or use one of these")
    return _extended(model)


def _extended(name: str) -> dict:
    content = read_yaml(properties_path() / "plain" / f"{name}.yaml")
    beneath = [_extended(other) for other in content.pop("extends", ())]
    return reduce(merge, [*beneath, content], {})


def domain_pairs() -> list[str]:
    """Names of the pairs of domains in ``properties/dataset``."""
    return sorted(path.stem for path in (properties_path() / "dataset").glob("*.yaml")
                  if "target_domain" in read_yaml(path))
