"""What is done around encoders: images opened ahead, faults explained, numbers checked."""

import threading
import time

import numpy as np
import pytest
from PIL import Image
from slow_encoder import SlowEncoder
from tiny_models import tiny_bert, tiny_clip, tiny_llama, tiny_llava

from dataset_prep import batches
from dataset_prep.batches import MAX_SIDE, encode_samples
from dataset_prep.encoders import Sample, make_encoder
from recbole_mmdiff.errors import DataError


@pytest.mark.parametrize("name, make", [("text", tiny_bert), ("llm", tiny_llama), ("clip-text", tiny_clip),
                                        ("mllm", tiny_llava)])
def test_a_part_in_which_every_text_is_blank(name, make, tmp_path):
    done = []
    found = encode_samples(make_encoder(name, model=make(tmp_path / "model")),
                           [Sample("a", " ", blank=True), Sample("b", "", blank=True)], advance=done.append)
    assert len(found.rows) == 0 and list(found.left_out) == [0, 1] and sum(done) == 2


class Given(SlowEncoder):
    """The vector stands in the text."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def encode(self, samples):
        return np.array([[float(word) for word in sample.text.split()] for sample in samples], self.dtype)


@pytest.mark.parametrize("dtype, texts", [(np.float16, ["60000 60000 0 -60000", "6e-8 0 0 0"]),
                                          (np.float32, ["3e38 3e38 -1e38 0", "1e-44 1e-44 0 0"])])
def test_unit_length_of_the_largest_and_the_smallest_numbers(dtype, texts):
    found = encode_samples(Given(dtype), [Sample(str(n), text) for n, text in enumerate([*texts, "0 0 0 0"])],
                           normalize=True)
    exact = Given(dtype).encode([Sample("", text) for text in texts]).astype(np.longdouble)
    assert found.matrix.dtype == np.float32 and found.rows.tolist() == [0, 1]
    np.testing.assert_allclose(found.matrix, exact / np.sqrt((exact ** 2).sum(1, keepdims=True)), rtol=1e-6)
    assert found.left_out == {2: "its vector is zero"}


class Failing(SlowEncoder):
    called = "--model x"

    def __init__(self, error):
        super().__init__()
        self.error = error

    def encode(self, samples):
        raise self.error


TOO_LARGE = "a batch of 2 does not fit into memory; lower --batch-tokens"


@pytest.mark.parametrize("error, message", [
    (RuntimeError("CUDA out of memory. Tried"), TOO_LARGE),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), TOO_LARGE),
    (MemoryError(), TOO_LARGE),
    (IndexError("index out of range in self"), r"--model x: cannot encode 'a' and 1 more; is it a model for "
                                               r"this encoder\? \(IndexError: index out of range in self\)"),
    (DataError("told already"), "^told already$"),
])
def test_faults_are_explained(error, message):
    with pytest.raises(DataError, match=message):
        encode_samples(Failing(error), [Sample("a", "long"), Sample("b", "x")])


class Pictures(SlowEncoder):
    """Width and height; told of in `sizes`."""

    uses = ("image",)
    batch_size = 2

    def lengths(self, samples):
        return [1] * len(samples)

    def encode(self, samples):
        return np.array([sample.image.size for sample in samples], dtype=np.float32)


def test_large_images_are_shrunk(tmp_path):
    sizes = [(6000, 1500), (30, 4096), (2048, 2048), (20, 10)]
    samples = []
    for n, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{n}.png")
        samples.append(Sample(str(n), image=tmp_path / f"{n}.png"))
    found = encode_samples(Pictures(), samples).matrix
    np.testing.assert_array_equal(found, [(MAX_SIDE, 512), (15, MAX_SIDE), (2048, 2048), (20, 10)])


def test_images_are_opened_one_batch_ahead_and_no_further(monkeypatch, tmp_path):
    opened, now_open = set(), threading.Condition()

    def open_image(path):
        with now_open:
            opened.add(path.name)
            now_open.notify_all()
        return Image.new("RGB", (4, 4))

    class Waiting(Pictures):
        batch = 0

        def encode(self, samples):
            self.batch += 1
            expected = {str(n) for n in range(min(8, 2 * self.batch + 2))}
            with now_open:    # Would never happen if images were opened only when their turn comes.
                assert now_open.wait_for(lambda: opened >= expected, timeout=10)
            time.sleep(0.02)
            assert opened == expected
            return super().encode(samples)

    monkeypatch.setattr(batches, "open_image", open_image)
    samples = [Sample(str(n), image=tmp_path / str(n)) for n in range(8)]
    assert encode_samples(Waiting(), samples).rows.tolist() == list(range(8))
