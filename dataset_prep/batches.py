"""Encoding samples in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from dataset_prep.encoders.base import Encoder, Sample
from dataset_prep.images import ImageError, open_image
from recbole_mmdiff.errors import DataError

BATCH_TOKENS = 16_384
_READERS = 8    # threads that open the images of a batch


@dataclass(frozen=True)
class Encoded:
    """The vectors of some samples.

    ``rows``: positions among the samples (k,), ascending. ``matrix``: float32 (k, dim); (0, 0) if no
    sample has a vector. ``left_out``: position -> why it has none. ``cut``: how many lost their end
    to the encoder's ``max_length``.
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
    vector is all zeros has no row.

    Raises:
        DataError: a vector holds NaN or Inf, or a batch does not fit into memory.
    """
    left_out = {place: reason for place, sample in enumerate(samples)
                if (reason := encoder.lacks(sample))}
    advance(len(left_out))
    places = np.array([place for place in range(len(samples)) if place not in left_out], dtype=np.int64)
    lengths = np.array(encoder.lengths([samples[place] for place in places]), dtype=np.int64)
    cut = 0
    if encoder.max_length is not None:
        cut = int((lengths > encoder.max_length).sum())
        lengths = lengths.clip(max=encoder.max_length)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    with ThreadPoolExecutor(_READERS) as readers:
        for batch in batches(lengths.tolist(), batch_size or encoder.batch_size, batch_tokens):
            chosen = places[batch]
            left_out |= {int(place): "no known word" for place in places[batch[lengths[batch] == 0]]}
            opened = _open([samples[place] for place in chosen], chosen, left_out, readers)
            kept = np.array([place for place in chosen if place not in left_out], dtype=np.int64)
            if len(kept):
                vectors = _finite(encoder, [opened[place] for place in kept])
                found.append(_without_zeros(kept, vectors, left_out))
            advance(len(batch))
    return _in_order(found, dict(sorted(left_out.items())), cut, normalize)


def _open(samples: Sequence[Sample], places: Sequence[int], left_out: dict[int, str],
          readers: ThreadPoolExecutor) -> dict[int, Sample]:
    """The samples by place with their images open; those that do not open are noted as left out."""
    def opened(sample: Sample) -> Sample | ImageError:
        try:
            return replace(sample, image=open_image(sample.image))
        except ImageError as error:
            return error

    result = dict(zip(places, samples, strict=True))
    pictured = [place for place in places if result[place].image is not None]
    for place, sample in zip(pictured, readers.map(opened, [result[p] for p in pictured]), strict=True):
        if isinstance(sample, ImageError):
            left_out[int(place)] = f"the image {sample.reason}"
        else:
            result[place] = sample
    return result


def _finite(encoder: Encoder, samples: Sequence[Sample]) -> np.ndarray:
    try:
        vectors = encoder.encode(samples)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise DataError(f"a batch of {len(samples)} does not fit into memory; lower --batch-tokens or "
                        f"--batch-size, and start again: what is done is kept ({error})") from error
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise DataError(f"the vector of {samples[int(bad.argmax())].token!r} holds NaN or Inf; compute in "
                        f"--dtype float32 (or bfloat16)")
    return vectors


def _without_zeros(places: np.ndarray, vectors: np.ndarray,
                   left_out: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
    zero = ~vectors.any(axis=1)
    left_out |= {int(place): "its vector is zero" for place in places[zero]}
    return places[~zero], vectors[~zero]


def _in_order(found: Sequence[tuple[np.ndarray, np.ndarray]], left_out: dict[int, str], cut: int,
              normalize: bool) -> Encoded:
    if not found:
        return Encoded(np.empty(0, dtype=np.int64), np.empty((0, 0), dtype=np.float32), left_out, cut)
    rows = np.concatenate([places for places, _ in found])
    order = np.argsort(rows)
    matrix = np.concatenate([vectors for _, vectors in found])[order]
    if normalize:
        matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return Encoded(rows[order], matrix, left_out, cut)
