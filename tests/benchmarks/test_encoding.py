"""Encoding texts in batches of like length, against batches of one size in the order of arrival.

Both sides call the same encoder, a small transformer, on the same texts; the lengths are spread as
those of reviews are. Ours counts its tokens too. The vectors must be equal.
"""

import statistics
import time

import numpy as np
import torch

from dataset_prep.batches import encode_samples
from dataset_prep.encoders.base import Encoder, Sample

TEXTS, LONGEST, DIM, BATCH = 1024, 256, 96, 64
REQUIRED_RATIO = 1.8


class Transformer(Encoder):
    """Words are numbers; the mean of the last states over the words."""

    batch_size = 256

    def __init__(self):
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, dropout=0.0, batch_first=True)
        self.words = torch.nn.Embedding(1000, DIM)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        self.padded = 0

    def lengths(self, samples):
        return [len(sample.text.split()) for sample in samples]

    @torch.inference_mode()
    def encode(self, samples):
        texts = [[int(word) for word in sample.text.split()] for sample in samples]
        width = max(map(len, texts))
        self.padded += width * len(texts)
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        there = torch.tensor([[place < len(text) for place in range(width)] for text in texts])
        states = self.layers(self.words(ids), src_key_padding_mask=~there) * there.unsqueeze(-1)
        return (states.sum(1) / there.sum(1, keepdim=True)).numpy()


def ours(encoder, samples):
    return encode_samples(encoder, samples, batch_tokens=BATCH * LONGEST).matrix


def in_order_of_arrival(encoder, samples):
    return np.concatenate([encoder.encode(samples[start:start + BATCH])
                           for start in range(0, len(samples), BATCH)])


def test_batches_of_like_length_are_faster():
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(3.5, 0.9, size=TEXTS).astype(int).clip(1, LONGEST)
    samples = [Sample(str(n), " ".join(map(str, draw.integers(1000, size=length))))
               for n, length in enumerate(lengths)]
    times, vectors, padded = {ours: [], in_order_of_arrival: []}, {}, {}
    for _ in range(3):
        for way, taken in times.items():
            encoder = Transformer()
            start = time.perf_counter()
            vectors[way] = way(encoder, samples)
            taken.append(time.perf_counter() - start)
            padded[way] = encoder.padded
    np.testing.assert_allclose(vectors[ours], vectors[in_order_of_arrival], atol=2e-5)
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    ratio = medians[in_order_of_arrival] / medians[ours]
    print(f"\nours {medians[ours]:.2f} s, {padded[ours]:,} tokens; in order of arrival "
          f"{medians[in_order_of_arrival]:.2f} s, {padded[in_order_of_arrival]:,} tokens; of "
          f"{lengths.sum():,} without padding; ratio {ratio:.1f}")
    assert ratio >= REQUIRED_RATIO
