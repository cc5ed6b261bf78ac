import pytest

from recbole_mmdiff.config import Config
from recbole_mmdiff.data.preparation import prepare_parts


@pytest.fixture(scope="module")
def config(tiny_config):
    """MF on the small pair of domains."""
    return Config(config_dict=tiny_config("MF"))


@pytest.fixture(scope="module")
def train(config):
    """Its training part."""
    return prepare_parts(config).train
