"""Configuration: RecBole's, with our defaults, safe parsing and checked keys."""

from recbole_mmdiff.config.configurator import DOMAINS, Config
from recbole_mmdiff.config.evaluation import PASSES, SAMPLED_MODE
from recbole_mmdiff.config.sources import find_config_file, parse_overrides, properties_path

__all__ = ["DOMAINS", "PASSES", "SAMPLED_MODE", "Config", "find_config_file", "parse_overrides",
           "properties_path"]
