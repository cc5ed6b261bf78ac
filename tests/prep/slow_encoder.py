"""An encoder for tests of what is around encoders; ``python slow_encoder.py OPTIONS`` runs the command.

Its vectors are drawn from a generator seeded by the text; ``$SLOW_SECONDS`` pass for every batch.
"""

import os
import sys
import time
import zlib

import numpy as np

from dataset_prep.encoders.base import Encoder


class SlowEncoder(Encoder):
    libraries = ("numpy",)

    def __init__(self, dim: int = 4, scale: float = 1.0):
        self.dim, self.scale, self.seen = dim, scale, []

    def describe(self):
        return {"components": self.dim, "scale": self.scale}

    def lengths(self, samples):
        return [len(sample.text) for sample in samples]

    def encode(self, samples):
        time.sleep(float(os.environ.get("SLOW_SECONDS", 0)))
        self.seen += [sample.token for sample in samples]
        return np.stack([vector(sample.text, self.dim) * np.float32(self.scale) for sample in samples])


def vector(text, dim=4):
    return np.random.default_rng(zlib.crc32(text.encode())).normal(size=dim).astype(np.float32)


ENTRY = ("slow_encoder:SlowEncoder", "for tests")

if __name__ == "__main__":
    from dataset_prep.cli import main
    from dataset_prep.encoders import ENCODERS
    from recbole_mmdiff.errors import DataError

    ENCODERS["slow"] = ENTRY
    try:
        main(["encode", *sys.argv[1:]])
    except DataError as error:
        sys.exit(f"refused: {error}")
