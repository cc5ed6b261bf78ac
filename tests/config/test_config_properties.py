"""Configurations for any keys and values: what is saved is the same again, what is wrong is refused."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_mmdiff.config import Config
from recbole_mmdiff.config.defaults import read_defaults
from recbole_mmdiff.config.sources import merge
from recbole_mmdiff.errors import ConfigError

DEFAULTS = {**read_defaults("overall.yaml"), **read_defaults("model/MF.yaml")}
#: keys whose every value of the right type is accepted
FREE = {"learning_rate": st.floats(1e-9, 1e9), "embedding_size": st.integers(1, 2**40),
        "biases": st.booleans(), "epochs": st.integers(0, 10**6), "seed": st.integers(0, 2**32 - 1),
        "test_user_ratio": st.floats(0, 1),
        "topk": st.lists(st.integers(1, 99), min_size=1, max_size=3), "reg_weight": st.floats(0, 1e6),
        "split_seed": st.none() | st.integers(0, 2**40), "clip_grad_norm": st.none(),
        "wandb_project": st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)}
WRONG = {bool: st.sampled_from([0, 1, "yes it is", [], {}]), int: st.sampled_from(["x", True, [1], {"a": 1}]),
         float: st.sampled_from(["x", False, [0.5], {}]), str: st.sampled_from([3, 0.5, True, [], ["x"], {}])}
PLAIN = {key: value for key, value in DEFAULTS.items() if type(value) in WRONG}


@settings(max_examples=12)
@given(st.fixed_dictionaries({}, optional=FREE))
def test_what_is_saved_is_the_same_configuration(tmp_path_factory, keys):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    # Strings among them are read as YAML.
    texts = {key: yaml.safe_dump(value) for key, value in keys.items() if isinstance(value, str)}
    config = Config("MF", "ml100k-pair", config_dict={**keys, **texts})
    config.save(path)
    again = Config(config_file_list=[path])
    assert again.run_dict == config.run_dict
    changed = {key for key in config.final_config_dict if again[key] != config[key]}
    assert changed <= {"data_path"}, "which is absolute in the file"
    for key, value in keys.items():
        assert again.run_dict[key] == value


def test_the_keys_that_are_tried_are_many():
    assert len(PLAIN) > 30


@settings(max_examples=25)
@given(st.sampled_from(sorted(PLAIN)), st.data())
def test_a_value_of_another_type_is_refused(key, data):
    value = data.draw(WRONG[type(PLAIN[key])])
    with pytest.raises(ConfigError, match=rf"^config_dict: {key}: .* expected .*default"):
        Config("MF", "ml100k-pair", config_dict={key: value})


@settings(max_examples=12)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), st.sampled_from([None, "eval_args"]))
def test_an_unknown_key_is_refused(key, inside):
    key = f"{key}?"     # No key holds one.
    with pytest.raises(ConfigError, match="is unknown to MF") as refused:
        Config("MF", "ml100k-pair", config_dict={inside: {key: 1}} if inside else {key: 1})
    assert repr(key) in str(refused.value)


def trees(keys=3):
    """Nested mappings of one form: a name is either always a mapping or never."""
    leaves = st.integers() | st.lists(st.integers(), max_size=2) | st.none()
    level = st.dictionaries(st.sampled_from("abc"), leaves, max_size=keys)
    for _ in range(2):
        level = st.tuples(level, st.dictionaries(st.sampled_from("xyz"), level, max_size=2)).map(
            lambda pair: {**pair[0], **pair[1]})
    return level


@settings(max_examples=150)
@given(trees(), trees(), trees())
def test_merging_may_begin_at_either_end(first, second, third):
    """Where a name means a mapping in all of them or in none."""
    assert merge(merge(first, second), third) == merge(first, merge(second, third))
    assert merge(first, first) == merge(first, {}) == merge({}, first) == first
