"""A download that is cut off, at either end: nothing half stored, nothing given up for good."""

import io
import os
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from injecting import file_limit, leftovers

pytest.importorskip("httpcore")
Image = pytest.importorskip("PIL.Image")

from dataset_prep.download import download  # noqa: E402
from dataset_prep.images import image_files  # noqa: E402
from recbole_mmdiff.errors import DataError  # noqa: E402


def encoded(seed):
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


IMAGES = {f"i{number}": encoded(number) for number in range(6)}


def reset(handler, content):
    """The whole length is promised, half of it sent, and the connection reset."""
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:len(content) // 2])
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def too_few(handler, content):
    """The connection is closed in good order before all bytes came."""
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:-1])
    handler.close_connection = True


def chunk_missing(handler, content):
    """Pieces that say their own length, without the last one, which is empty."""
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
    handler.close_connection = True


def whole(handler, content):
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


@pytest.fixture
def site(tmp_path):
    """A server whose ``faults`` happen, one to a request of an image, before it is answered well."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        faults, asked = {}, Counter()

        def do_GET(self):
            token = self.path[1:]
            self.asked[token] += 1
            left = self.faults.get(token, [])
            self.send_response(200)
            (left.pop(0) if left else whole)(self, IMAGES[token])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *_: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    data = tmp_path / "toy"
    data.mkdir()
    lines = [f"{token}\thttp://127.0.0.1:{server.server_port}/{token}\n" for token in IMAGES]
    (data / "toy.item").write_text("item_id:token\timage_url:token\n" + "".join(lines))
    Handler.faults.clear()
    Handler.asked.clear()
    Handler.data = data
    yield Handler
    server.shutdown()
    server.server_close()


def fetch(site, **options):
    return download(site.data, rate=10_000, backoff=0.01, allowed=lambda address: True, ports=None, **options)


def stored(site):
    return {token: path.read_bytes() for token, path in image_files(site.data / "images").items()}


@pytest.mark.parametrize("fault", [reset, too_few, chunk_missing])
def test_what_is_cut_off_is_asked_again(site, fault):
    site.faults |= {"i1": [fault, fault], "i4": [fault]}
    assert fetch(site, retries=2).fetched == 6
    assert stored(site) == IMAGES and (site.asked["i1"], site.asked["i4"], site.asked["i2"]) == (3, 2, 1)


@pytest.mark.parametrize("fault", [reset, too_few, chunk_missing])
def test_the_next_run_asks_for_the_rest(site, fault):
    """After the last attempt it is left out, told, and not remembered as gone for good."""
    site.faults |= {"i1": [fault] * 2}
    report = fetch(site, retries=1)
    assert (report.fetched, report.failed.total) == (5, 1)
    assert "its image could not be reached or read" in str(report.lines())
    assert not leftovers(site.data) and "i1" not in stored(site)
    again = fetch(site, retries=1)
    assert (again.fetched, again.present, again.known) == (1, 5, 0)
    assert stored(site) == IMAGES and site.asked["i2"] == 1


def test_no_room_for_an_image(site):
    with file_limit(min(map(len, IMAGES.values())) // 2), \
            pytest.raises(DataError, match=r"images: an image cannot be written .*make room"):
        fetch(site)
    assert not leftovers(site.data) and not stored(site)
    assert fetch(site).fetched == 6


def test_a_folder_of_images_that_is_a_file(site, capsys):
    from recbole_mmdiff import cli

    (site.data / "images").write_text("")
    assert cli.main(["prepare", "images", f"--data={site.data}"]) == 2
    assert "images: cannot be written" in capsys.readouterr().err
    assert not site.asked and sorted(os.listdir(site.data)) == ["images", "toy.item"]
