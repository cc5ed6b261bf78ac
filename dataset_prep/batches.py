"""Encoding samples in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset_prep.encoders.base import Encoder, Sample
from dataset_prep.images import ImageError, open_image
from recbole_mmdiff.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

BATCH_TOKENS = 16_384
MAX_SIDE = 2048    # pixels: far above what models take, and a batch of large photographs stays in memory
_READERS = 4    # threads that open images
_NO_MEMORY = ("out of memory", "can't allocate memory")    # what torch says on a GPU and on a CPU


@dataclass(frozen=True)
class Encoded:
    """The vectors of some samples.

    ``rows``: positions among the samples (k,), ascending. ``matrix``: float32 (k, dim); (0, 0) if no
    sample has a vector. ``left_out``: position -> why it has none, or why its image has no part in
    it. ``cut``: how many lost their end to the encoder's ``max_length``.
    """

    rows: np.ndarray
    matrix: np.ndarray
    left_out: dict[int, str]
    cut: int


def batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> Iterator[np.ndarray]:
    """Positions in batches, the longest first, so that the peak of memory comes first.

    A batch has at most ``max_rows`` rows, and ``max_tokens`` tokens once all are padded to its
    longest; a single row may have more.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        stop = start + max(1, min(max_rows, max_tokens // longest))
        yield order[start:stop]
        start = stop


def encode_samples(encoder: Encoder, samples: Sequence[Sample], batch_size: int | None = None,
                   batch_tokens: int = BATCH_TOKENS, normalize: bool = False,
                   advance: Callable[[int], object] = lambda done: None) -> Encoded:
    """The vectors of the samples, in their order; ``advance`` is told how many more are done.

    A sample without text or image, with an image that cannot be used, without a token, or whose
    vector is all zeros has no row. Where the encoder can do without an image, one that cannot be
    used is noted and the sample is encoded without it. Images are shrunk to `MAX_SIDE` pixels a side
    before the encoder gets them; while it computes, those of the next batch are opened.

    Raises:
        DataError: the encoder fails, a vector holds NaN or Inf, or a batch does not fit into memory.
    """
    left_out = {place: reason for place, sample in enumerate(samples)
                if (reason := encoder.lacks(sample))}
    places = np.array([place for place in range(len(samples)) if place not in left_out], dtype=np.int64)
    if not len(places):
        advance(len(samples))
        return _in_order([], left_out, cut=0)
    with _explained(encoder, [samples[place] for place in places]) as usable:
        lengths = np.array(encoder.lengths(usable), dtype=np.int64)
        limit = encoder.max_length or lengths.max()
    left_out |= dict.fromkeys(places[lengths == 0].tolist(), "no known word")
    advance(len(left_out))
    places, lengths = places[lengths > 0], lengths[lengths > 0]
    groups = [places[batch].tolist() for batch in
              batches(lengths.clip(max=limit).tolist(), batch_size or encoder.batch_size, batch_tokens)]
    found: list[tuple[np.ndarray, np.ndarray]] = []
    with ThreadPoolExecutor(_READERS) as readers:
        ahead: dict[int, Future] = {}
        for group, following in zip_longest([[], *groups], groups, fillvalue=[]):
            opened = _opened(encoder, {place: samples[place] for place in group}, ahead, left_out)
            ahead = {place: readers.submit(_image, samples[place].image) for place in following
                     if samples[place].image is not None}
            if opened:
                vectors = _vectors(encoder, list(opened.values()), normalize)
                found.append(_without_zeros(list(opened), vectors, left_out))
            advance(len(group))
    return _in_order(found, left_out, cut=int((lengths > limit).sum()))


def _image(path: Path) -> Image.Image:
    image = open_image(path)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _opened(encoder: Encoder, samples: Mapping[int, Sample], images: Mapping[int, Future],
            left_out: dict[int, str]) -> dict[int, Sample]:
    """Those of the samples that can be encoded, with their images open; broken images are noted."""
    result = {}
    for place, sample in samples.items():
        try:
            result[place] = replace(sample, image=images[place].result()) if place in images else sample
        except ImageError as error:
            without = replace(sample, image=None)
            if encoder.lacks(without):
                left_out[place] = f"the image {error.reason}"
            else:
                left_out[place] = f"only the image, which {error.reason}"
                result[place] = without
    return result


def _vectors(encoder: Encoder, samples: Sequence[Sample], normalize: bool) -> np.ndarray:
    """float32 (samples, dim), of unit length if asked; all zeros stay zeros."""
    with _explained(encoder, samples):
        encoder.probe(samples[-1])
        vectors = np.asarray(encoder.encode(samples), dtype=np.float32)
    if normalize:
        # In float64, where the square of no float32 overflows or vanishes.
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        vectors = (vectors / np.where(lengths, lengths, 1)).astype(np.float32)
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise DataError(f"the vector of {samples[int(bad.argmax())].token!r} holds NaN or Inf; compute in "
                        f"--dtype float32 (or bfloat16)")
    return vectors


@contextmanager
def _explained(encoder: Encoder, samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    """Say in a DataError what a library raises while the encoder works on the samples."""
    try:
        yield samples
    except (ConfigError, DataError):
        raise
    except Exception as error:    # A model of another kind can make libraries raise anything.
        if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
            raise DataError(
                f"a batch of {len(samples)} does not fit into memory; lower --batch-tokens or --batch-size, "
                f"and start again: what is done is kept ({error})") from error
        if encoder.called is None:
            raise
        others = f" and {len(samples) - 1:,} more" if len(samples) > 1 else ""
        raise DataError(f"{encoder.called}: cannot encode {samples[0].token!r}{others}; is it a model for "
                        f"this encoder? ({type(error).__name__}: {error})") from error


def _without_zeros(places: Sequence[int], vectors: np.ndarray,
                   left_out: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
    zero = ~vectors.any(axis=1)
    left_out |= dict.fromkeys(np.array(places)[zero].tolist(), "its vector is zero")
    return np.array(places)[~zero], vectors[~zero]


def _in_order(found: Sequence[tuple[np.ndarray, np.ndarray]], left_out: dict[int, str], cut: int) -> Encoded:
    left_out = dict(sorted(left_out.items()))
    if not found:
        return Encoded(np.empty(0, dtype=np.int64), np.empty((0, 0), dtype=np.float32), left_out, cut)
    rows = np.concatenate([places for places, _ in found])
    order = np.argsort(rows)
    return Encoded(rows[order], np.concatenate([vectors for _, vectors in found])[order], left_out, cut)
