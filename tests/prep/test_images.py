"""Images on disk: found by token, decoded as they look, refused with a reason."""

import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from dataset_prep import images
from dataset_prep.check_images import check
from dataset_prep.folders import item_path
from dataset_prep.images import ImageError, decode_image, image_files, image_name, open_image
from dataset_prep.skips import Skips
from recbole_mmdiff.cli import main
from recbole_mmdiff.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
POSTERS = ROOT.parent / "shared" / "data" / "ml1m-posters"


def encoded(image, kind, **options):
    """The bytes of an image in a format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content):
    return np.asarray(decode_image(content, "test")[0])


def bomb(side=60_000):
    """A tiny PNG whose header says ``side`` x ``side``."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) \
        + chunk(b"IEND", b"")


NOISE = np.random.default_rng(3).integers(0, 256, (40, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", "png"), ("WEBP", "webp")])
def test_lossless_formats_give_the_pixels(kind, suffix):
    image, found = decode_image(encoded(Image.fromarray(NOISE), kind, lossless=True), "test")
    assert (image.mode, image.size, found) == ("RGB", (30, 40), suffix)
    np.testing.assert_array_equal(np.asarray(image), NOISE)


def test_jpeg_and_what_cameras_make_of_it():
    flat = Image.new("RGB", (16, 8), (200, 30, 60))
    for kind, options in (("JPEG", {}), ("MPO", {"save_all": True, "append_images": [flat]})):
        image, suffix = decode_image(encoded(flat, kind, **options), "test")
        assert suffix == "jpg"
        assert np.abs(np.asarray(image).astype(int) - [200, 30, 60]).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert (pixels(content) == [255, 0, 0]).all()


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6    # the camera was turned: show it rotated by 90 degrees clockwise
    content = encoded(Image.fromarray(NOISE), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(content), np.rot90(NOISE, -1))


def test_damaged_exif_does_not_lose_the_picture():
    content = encoded(Image.fromarray(NOISE), "PNG", exif=b"Exif\x00\x00nonsense")
    np.testing.assert_array_equal(pixels(content), NOISE)


def test_transparency_is_laid_on_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    # 128/255 of red over white
    np.testing.assert_allclose(pixels(encoded(half, "PNG"))[0, 0], [255, 127, 127], atol=1)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 1)
    found = pixels(encoded(palette, "GIF", transparency=0))
    assert found[0, 0].tolist() == [40, 50, 60] and (found[1:] == 255).all()
    grey = Image.new("LA", (2, 2), (0, 0))
    assert (pixels(encoded(grey, "PNG")) == 255).all()


def test_other_modes():
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    np.testing.assert_allclose(pixels(encoded(Image.fromarray(ramp), "PNG"))[..., 0], ramp / 256, atol=1)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(NOISE[..., 0]), "PNG"))[..., 2],
                                  NOISE[..., 0])
    assert (pixels(encoded(Image.new("1", (3, 3), 1), "PNG")) == 255).all()
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert np.abs(pixels(cmyk).astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "is empty"),
    (b"<!DOCTYPE html><html>not found</html>", "is not a jpeg, png, webp or gif image"),
    (encoded(Image.fromarray(NOISE), "BMP"), "is not a jpeg, png, webp or gif image"),
    (encoded(Image.fromarray(NOISE), "TIFF"), "is not a jpeg, png, webp or gif image"),
    (encoded(Image.fromarray(NOISE), "JPEG")[:-200], "is truncated or corrupt"),
    (encoded(Image.fromarray(NOISE), "PNG")[:300], "is truncated or corrupt"),
    (bomb(), "has too many pixels"),
], ids=["empty", "html", "bmp", "tiff", "cut jpeg", "cut png", "bomb"])
def test_refused_content(tmp_path, content, reason):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(path)
    assert caught.value.reason == reason and str(path) in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.parametrize("side", [8_000, 11_000, 60_000])
def test_size_is_checked_before_decoding(side, action):
    """Below, inside and above what Pillow itself warns of; decoding it would find it truncated."""
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match="has too many pixels"):
            decode_image(bomb(side), "test")
    with pytest.raises(ImageError, match="truncated or corrupt"):
        decode_image(bomb(100), "test")


def test_limits_are_of_bytes_and_pixels(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(encoded(Image.fromarray(NOISE), "PNG"))
    size = path.stat().st_size
    assert open_image(path, max_bytes=size, max_pixels=1200).size == (30, 40)
    with pytest.raises(ImageError, match=f"too many bytes.*{size:,}"):
        open_image(path, max_bytes=size - 1)
    with pytest.raises(ImageError, match=r"too many pixels.*30 x 40.*1,199"):
        open_image(path, max_pixels=1199)


def test_images_decoded_at_the_same_time_share_the_room(monkeypatch):
    """Images of 1,200 pixels, room for 2,500: two at a time; one of more than the room, alone."""
    held, most, lock = set(), [], threading.Lock()
    true = images._rgb

    def watched(image):
        with lock:
            held.add(id(image))
            most.append((image.width * image.height, len(held)))
        time.sleep(0.02)
        with lock:
            held.remove(id(image))
        return true(image)

    monkeypatch.setattr(images, "_ROOM", images._Room(2500))
    monkeypatch.setattr(images, "_rgb", watched)
    small = encoded(Image.fromarray(NOISE), "PNG")
    large = encoded(Image.new("RGB", (60, 50)), "PNG")
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(pixels, [small] * 8 + [large] * 2 + [small] * 8))) == 18
    assert max(count for size, count in most if size == 1200) == 2
    assert [count for size, count in most if size == 3000] == [1, 1]


def test_room_is_given_back_by_what_does_not_decode(monkeypatch):
    monkeypatch.setattr(images, "_ROOM", images._Room(1200))
    for _ in range(3):
        with pytest.raises(ImageError, match="truncated"):
            pixels(encoded(Image.fromarray(NOISE), "PNG")[:300])
    assert pixels(encoded(Image.fromarray(NOISE), "PNG")).shape == (40, 30, 3)


PEAK = """
import resource, sys
from dataset_prep.check_images import check
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(check(sys.argv[1])[0])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak has other units")
def test_small_files_of_many_pixels_do_not_fill_the_memory(tmp_path):
    """95 KB, 49 million pixels, a plain and a transparent channel: four of them, one after another."""
    content = encoded(Image.new("LA", (7000, 7000)), "PNG")
    for k in range(4):
        (tmp_path / f"{k}.png").write_bytes(content)
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path], cwd=ROOT, capture_output=True, text=True,
                         check=True)
    report, kilobytes = run.stdout.splitlines()
    assert report.endswith("4 images, 4 decode")
    assert int(kilobytes) < 600 * 1024    # twice 4 bytes for each of 49 million, and some


def test_every_damaged_byte_is_an_image_or_an_image_error():
    draw = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = bytearray(encoded(Image.fromarray(NOISE), kind))
        for _ in range(100):
            content = bytearray(whole)
            for place in draw.integers(len(content), size=3):
                content[place] = draw.integers(256)
            try:
                assert decode_image(bytes(content), "x")[0].mode == "RGB"
            except ImageError as error:
                assert error.reason.startswith(("is ", "has "))


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("pipe.jpg", "absent.jpg", "."):
        with pytest.raises(ImageError, match="missing or not a plain file"):
            open_image(tmp_path / name)


TOKENS = ["B001", "a/b", "..", ".hidden", "ü ?", "50%", "%41", "x.y", "_", "\\"]


def test_names_are_found_back(tmp_path):
    for token in TOKENS:
        (tmp_path / image_name(token, "png")).write_bytes(b"x")
    assert list(image_files(tmp_path)) == sorted(TOKENS)
    assert image_name("a/b c", "jpg") == quote("a/b c", safe="") + ".jpg"


def test_other_files_are_counted(tmp_path):
    for name in ("b.JPG", "a.webp", "notes.txt", "failed.jsonl", ".lock", ".a.0123.tmp.png"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("folder.jpg", "folder", ".hidden.jpg"):
        (tmp_path / name).mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    skips = Skips()
    found = image_files(tmp_path, skips)
    assert {token: path.name for token, path in found.items()} == {"a": "a.webp", "b": "b.JPG"}
    assert skips.as_dict() == {
        "files that are not .jpg, .jpeg, .png, .webp, .gif": {"count": 2, "first": "failed.jsonl"},
        "named as images, but folders or links to what is gone": {"count": 2, "first": "folder.jpg"}}


def test_two_images_of_one_item_are_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "%61.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"'%61\.png' and 'a\.jpg'.*'a'"):
        image_files(tmp_path)


def test_bad_folder_and_bad_name(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        image_files(tmp_path / "absent")
    (tmp_path / "%ff.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"%ff\.jpg.*percent-encoded"):
        image_files(tmp_path)


def test_report_of_a_folder(tmp_path, capsys):
    data = tmp_path / "toy"
    data.mkdir()
    (data / "toy.item").write_text("item_id:token\na\nb\nc/d\n", encoding="utf-8")
    folder = tmp_path / "images"
    folder.mkdir()
    good = encoded(Image.fromarray(NOISE), "PNG")
    for name, content in (("a.png", good), ("c%2Fd.jpg", good[:300]), ("z.png", bomb()),
                          ("readme.txt", b"")):
        (folder / name).write_bytes(content)
    (folder / "b.png").symlink_to(folder / "gone.png")
    words = ["prepare", "images", f"--check={folder}", f"--data={data}"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "3 images, 1 decode" in out
    assert "1: an image is truncated or corrupt" in out and "c%2Fd.jpg" in out
    assert "1: an image has too many pixels" in out
    assert "ignored: 1: files that are not" in out
    assert "ignored: 1: named as images" in out and "(first: b.png)" in out
    assert "items with an image that decodes: 1 of 3; first without: b, c/d" in out
    assert "images without an item: 1; first: z" in out
    assert main([*words, "--max-pixels=1199"]) == 0
    out = capsys.readouterr().out
    assert "3: an image has too many pixels" in out and "decodes: 0 of 3; first without: a, b, c/d" in out
    for number in (0, 89_478_486):
        assert main([*words, f"--max-pixels={number}"]) == 2
        assert f"--max-pixels: {number}" in capsys.readouterr().err


def test_the_items_have_the_name_that_was_given(tmp_path, monkeypatch):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real, target_is_directory=True)
    assert item_path(link) == link / "link.item"
    monkeypatch.chdir(real)
    assert item_path(".") == real / "real.item"


def test_real_posters_open():
    if not POSTERS.is_dir():
        pytest.skip("the real posters are not beside the checkout")
    assert check(POSTERS) == [f"{POSTERS}: 3,256 images, 3,256 decode"]
