"""Latent semantic analysis: TF-IDF of the words and a truncated SVD. Needs no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dataset_prep.encoders.base import Encoder, Sample
from recbole_mmdiff.errors import ConfigError, DataError

DECIMALS = 5


class Lsa:
    """TF-IDF of words, and of character n-grams if asked, projected to ``dim`` dimensions.

    ``ngrams``: the shortest and the longest of the n-grams. Deterministic: the SVD is arpack's,
    exact up to its tolerance, from a fixed start.
    """

    def __init__(self, dim: int, ngrams: tuple[int, int] | None = None) -> None:
        # Imported here because the default data are ensured at every start, mostly with nothing to do.
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_union

        kinds = [TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")]
        if ngrams:
            kinds.append(TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=ngrams))
        self._terms = make_union(*kinds)
        self._svd = TruncatedSVD(dim, algorithm="arpack", random_state=0)

    def fit(self, texts: Iterable[str]) -> np.ndarray:
        """Learn terms and projection; returns the texts' own vectors, see `transform`.

        Raises:
            DataError: there are not more texts and terms than dimensions.
        """
        try:
            weights = self._terms.fit_transform(list(texts))
        except ValueError as error:    # What sklearn says of texts without a single word.
            raise DataError(f"lsa: the texts hold no words ({error})") from error
        if self._svd.n_components >= min(weights.shape):
            raise DataError(f"--dim {self._svd.n_components}: must be less than the number of texts "
                            f"({weights.shape[0]:,}) and of terms ({weights.shape[1]:,})")
        return _finished(self._svd.fit_transform(weights))

    def transform(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (texts, dim); rows of unit length, or zero where the space holds nothing of them."""
        return _finished(self._svd.transform(self._terms.transform(texts)))


def _finished(vectors: np.ndarray) -> np.ndarray:
    from sklearn.preprocessing import normalize

    # The last bits depend on the number of BLAS threads. Rounding hides them, also before they
    # are blown up to unit length where a text has nothing else; + 0 hides the sign of zero.
    return normalize(np.round(vectors, DECIMALS) + 0.0).astype(np.float32)


class LsaEncoder(Encoder):
    """TF-IDF of words and a truncated SVD to ``dim`` dimensions, rows of unit length.

    Fitted on the very texts that are encoded, and on those of other data sets that are to share
    their space. A text outside of the space (no known word, or none that the ``dim`` dimensions
    hold) has no vector.
    """

    fitted = True
    libraries = ("scikit-learn", "scipy", "numpy")
    batch_size = 4096

    def __init__(self, dim: int = 64) -> None:
        if dim < 1:
            raise ConfigError(f"--dim: {dim} must be at least 1")
        self.dim = dim
        self._lsa = Lsa(dim)

    def describe(self) -> dict[str, Any]:
        return {"components": self.dim, "terms": "words", "decimals": DECIMALS}

    def fit(self, texts: Iterable[str]) -> None:
        """Learn the space; texts that say nothing are passed over."""
        self._lsa.fit(text for text in texts if text.strip())

    def encode(self, samples: Sequence[Sample]) -> np.ndarray:
        return self._lsa.transform([sample.text for sample in samples])
