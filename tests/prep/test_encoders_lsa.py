"""LSA: equal to scikit-learn called directly; one space for several data sets."""

import numpy as np
import pytest
from tiny_models import WORDS, write_items

from dataset_prep.encode import encode
from dataset_prep.encoders.lsa import Lsa
from recbole_mmdiff.errors import ConfigError, DataError

MARKS = "?! ..."    # a text without a word; it still counts as one of the texts


def titles(seed, count=40):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(2, 9))) for _ in range(count)]


@pytest.fixture
def folder(tmp_path):
    rows = [(f"i{n}", text, "") for n, text in enumerate(titles(0))]
    return write_items(tmp_path / "toy", [*rows[:5], ("empty", "", ""), ("marks", MARKS, ""), *rows[5:]])


def directly(texts, dim, fitted_on):
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    terms = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b").fit(fitted_on)
    svd = TruncatedSVD(dim, algorithm="arpack", random_state=0).fit(terms.transform(fitted_on))
    vectors = svd.transform(terms.transform(texts))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_command_equals_scikit_learn(folder):
    feature = encode(folder, "lsa", dim=6, shard_size=7).feature
    np.testing.assert_allclose(feature.matrix, directly(titles(0), 6, [*titles(0), MARKS]), atol=3e-5)
    assert feature.tokens == tuple(f"i{n}" for n in range(40))
    assert feature.manifest["left_out"] == {"no text": {"count": 1, "first": ["empty"]},
                                            "its vector is zero": {"count": 1, "first": ["marks"]}}
    assert feature.manifest["components"] == 6 and "scikit-learn" in feature.manifest


def test_two_data_sets_share_a_space(folder, tmp_path):
    other = write_items(tmp_path / "another", [(f"j{n}", text, "") for n, text in enumerate(titles(1, 30))])
    mine = encode(folder, "lsa", dim=5, fit_on=[other]).feature
    theirs = encode(other, "lsa", dim=5, fit_on=[folder]).feature
    both = [*titles(1, 30), *titles(0), MARKS]
    np.testing.assert_allclose(mine.matrix, directly(titles(0), 5, both), atol=3e-5)
    np.testing.assert_allclose(theirs.matrix, directly(titles(1, 30), 5, both), atol=3e-5)
    assert mine.manifest["fitted_on"] == theirs.manifest["fitted_on"]
    assert list(mine.manifest["fitted_on"]) == ["another", "toy"]
    with pytest.raises(ConfigError, match="toy stands twice"):
        encode(folder, "lsa", dim=5, fit_on=[folder])


def test_fitting_and_transforming_agree():
    lsa = Lsa(4, ngrams=(2, 3))
    fitted = lsa.fit(titles(2))
    assert fitted.shape == (40, 4) and fitted.dtype == np.float32
    np.testing.assert_allclose(lsa.transform(titles(2)), fitted, atol=3e-5)
    assert not lsa.transform(["", "?"]).any()


def test_bad_dimensions_and_texts(folder, tmp_path):
    with pytest.raises(DataError, match=r"--dim 64: must be less than the number of texts \(41\)"):
        encode(folder, "lsa")
    with pytest.raises(ConfigError, match="--dim: 0 must be at least 1"):
        encode(folder, "lsa", dim=0)
    wordless = write_items(tmp_path / "wordless", [("a", "?", ""), ("b", "!", "")])
    with pytest.raises(DataError, match="the texts hold no words"):
        encode(wordless, "lsa", dim=2)
