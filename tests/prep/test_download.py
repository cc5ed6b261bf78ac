"""Fetching images: from a server of our own, with every fault that the Web has."""

import io
import ipaddress
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpcore
import numpy as np
import pytest
from PIL import Image

from dataset_prep.download import download
from dataset_prep.images import image_files, open_image
from dataset_prep.web import FetchError, TryAgain, Web, _seconds, is_public
from recbole_mmdiff import __version__
from recbole_mmdiff.cli import main
from recbole_mmdiff.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
FREE = {"allowed": lambda address: True, "ports": None}    # the tests' own server is on this machine


def encoded(kind="JPEG", seed=0, size=32):
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


JPEG, PNG = encoded(), encoded("PNG")


class Site:
    """A server whose pages are functions of the request handler; it counts what it is asked."""

    def __init__(self):
        self.pages, self.asked, self.moments, self.headers = {}, Counter(), [], {}
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                site.asked[self.path] += 1
                site.moments.append(time.monotonic())
                site.headers = dict(self.headers)
                site.pages.get(self.path, lambda h: answer(h, 404))(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.port = self.server.server_port

    def url(self, path):
        return f"http://127.0.0.1:{self.port}{path}"

    def serve(self, path, *answers, **headers):
        """Answer with (status, body), each of ``answers`` once and the last one from then on."""
        left = list(answers)

        def page(handler):
            answer(handler, *(left.pop(0) if len(left) > 1 else left[0]), **headers)

        self.pages[path] = page
        return self.url(path)


def answer(handler, status, body=b"", **headers):
    handler.send_response(status)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in {"Content-Length": len(body), **headers}.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


def without_length(body, pause=0.0, step=1 << 16):
    """A page that says no length, in pieces with pauses; the end of the connection is its end."""
    def page(handler):
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        for start in range(0, len(body), step):
            try:
                handler.wfile.write(body[start:start + step])
            except OSError:    # The client has had enough.
                return
            time.sleep(pause)

    return page


@pytest.fixture
def site():
    found = Site()
    yield found
    found.server.shutdown()
    found.server.server_close()


def items(tmp_path, urls, header="item_id:token\timage_url:token"):
    """A data set whose items have these addresses."""
    data = tmp_path / "toy"
    data.mkdir(exist_ok=True)
    lines = [header, *(f"{token}\t{url}" for token, url in urls.items())]
    (data / "toy.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return data


def fetch(data, **options):
    return download(data, **{"rate": 10_000, "backoff": 0.01, **FREE, **options})


def get(url, **options):
    return Web(**{"rate": 10_000, **FREE, **options}).get(url)


def failed_file(data):
    lines = (data / "images" / "failed.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["url"]: entry["reason"] for entry in map(json.loads, lines)}


def test_images_are_stored_by_token_and_format(site, tmp_path, capsys):
    data = items(tmp_path, {"a/1": site.serve("/a.png", (200, JPEG)), "b": site.serve("/b", (200, PNG)),
                            "c": "", "d": site.url("/a.png")})
    report = fetch(data)
    assert (report.fetched, report.present, report.without, report.failed.total) == (3, 0, 1, 0)
    found = image_files(data / "images")
    assert {token: path.name for token, path in found.items()} \
        == {"a/1": "a%2F1.jpg", "b": "b.png", "d": "d.jpg"}
    assert found["a/1"].read_bytes() == found["d"].read_bytes() == JPEG
    assert site.asked == {"/a.png": 1, "/b": 1}    # an address that two items share is asked once
    assert site.headers["User-Agent"] == f"recbole-mmdiff/{__version__}"
    assert site.headers["Accept-Encoding"] == "identity"
    assert site.headers["Host"] == f"127.0.0.1:{site.port}"
    assert "items without an address: 1" in report.lines()


def test_what_is_there_is_not_asked_again(site, tmp_path):
    urls = {f"i{k}": site.serve(f"/{k}", (200, encoded(seed=k))) for k in range(6)}
    data = items(tmp_path, {**urls, "gone": site.url("/gone"), "busy": site.serve("/busy", (503,))})
    (first, second) = fetch(data, retries=1), fetch(data, retries=0)
    assert (first.fetched, first.failed.total) == (6, 2)
    assert (second.fetched, second.present, second.known, second.failed.total) == (0, 6, 1, 1)
    # Only the busy one may work later: it is not remembered.
    assert failed_file(data) == {site.url("/gone"): "was answered with status 404"}
    assert site.asked == {**{f"/{k}": 1 for k in range(6)}, "/gone": 1, "/busy": 3}
    site.serve("/gone", (200, JPEG))
    third = fetch(data, retry_failed=True, retries=0)
    assert (third.fetched, third.known) == (1, 0) and failed_file(data) == {}


def test_half_a_line_of_a_killed_run_is_forgotten(site, tmp_path):
    data = items(tmp_path, {"a": site.serve("/a", (200, JPEG)), "b": site.url("/b")})
    failed = data / "images" / "failed.jsonl"
    failed.parent.mkdir()
    failed.write_text(json.dumps({"url": site.url("/b"), "reason": "x"}) + '\n{"url": "htt', "utf-8")
    (failed.parent / ".a.012345678901.tmp.jpg").write_bytes(b"half")
    assert fetch(data).known == 1 and failed_file(data) == {site.url("/b"): "x"}
    assert not list(failed.parent.glob(".*.tmp.*"))
    failed.write_text("nonsense\n", "utf-8")
    with pytest.raises(DataError, match=r"failed\.jsonl: 'nonsense'.*remove the file"):
        fetch(data)


def test_redirects_are_followed_five_times(site):
    for k in range(7):
        site.serve(f"/r{k}", (302,), Location=f"/r{k + 1}")
    site.serve("/r7", (200, JPEG))
    assert get(site.url("/r2")) == JPEG
    with pytest.raises(FetchError, match="redirects too often"):
        get(site.url("/r1"))


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest", "http://127.0.0.1:{port}/a",
                                    "http://10.0.0.1/", "http://[::1]/"])
def test_redirects_to_private_addresses_are_refused(site, target):
    """The check as it is, except that it lets the first step to the tests' server through."""
    site.serve("/a", (302,), Location=target.format(port=site.port))
    steps = iter([True])
    with pytest.raises(FetchError, match="not public") as caught:
        get(site.url("/a"), allowed=lambda address: next(steps, False) or is_public(address))
    assert not isinstance(caught.value, TryAgain)
    assert site.asked == {"/a": 1}


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://example.org/x", "javascript:alert(1)"])
def test_redirects_to_other_schemes_are_refused(site, target):
    with pytest.raises(FetchError, match="not an http or https"):
        get(site.serve("/a", (301,), Location=target))


@pytest.mark.parametrize("target", ["http://[", "http://[x]/", "\x7f://\xff"])
def test_redirects_to_nonsense_are_refused(site, target):
    with pytest.raises(FetchError, match=r"no address|not a valid address|was answered with status 404"):
        get(site.serve("/a", (301,), Location=target))


@pytest.mark.parametrize(("url", "reason"), [
    ("file:///etc/passwd", "not an http or https"),
    ("ftp://example.org/a.jpg", "not an http or https"),
    ("data:image/png;base64,AAAA", "not an http or https"),
    ("javascript:alert(1)", "not an http or https"),
    ("gopher://example.org/", "not an http or https"),
    ("//example.org/a.jpg", "not an http or https"),
    ("a.jpg", "not an http or https"),
    ("http://", "not an http or https"),
    ("http://user:secret@example.org/a.jpg", "user name"),
    ("http://example.org:22/a.jpg", "its port"),
    ("http://example.org:99999/", "not a valid address"),
    ("http://[::1/", "not a valid address"),
    (f"http://{'a' * 64}.org/", "not a valid address"),
    ("http://localhost/a.jpg", "not public"),
    ("http://[::1]/a.jpg", "not public"),
    ("http://0x7f000001/", "not public"),
    ("http://2130706433/", "not public"),
    ("http://127.1/", "not public"),
    ("http://0/", "not public"),
    ("http://169.254.169.254/latest/meta-data", "not public"),
    ("http://10.0.0.1/", "not public"),
    ("http://[::ffff:10.0.0.1]/", "not public"),
    ("http://[fe80::1]/", "not public"),
    ("https://192.168.0.1/", "not public"),
])
def test_refused_addresses(url, reason, monkeypatch):
    def connect(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(FetchError, match=reason) as caught:
        Web(rate=10_000).get(url)
    assert not isinstance(caught.value, TryAgain)


@pytest.mark.parametrize(("address", "public"), [
    ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
    ("2002:808:808::1", True), ("127.0.0.1", False), ("0.0.0.0", False), ("10.1.2.3", False),
    ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
    ("198.18.0.1", False), ("224.0.0.1", False), ("240.0.0.1", False), ("255.255.255.255", False),
    ("::", False), ("::1", False), ("::10.0.0.1", False), ("::ffff:127.0.0.1", False),
    ("64:ff9b::a00:1", False), ("64:ff9b:1::1", False), ("2002:a00:1::", False), ("fc00::1", False),
    ("fe80::1", False), ("fe80::1%eth0", False), ("fec0::1", False), ("ff02::1", False),
    ("2001:db8::1", False), ("2001::1", False),
])
def test_public_addresses(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


def resolver(monkeypatch, *answers):
    """``example.test`` resolves to each of the answers in turn, the last one from then on."""
    true, left, asked = socket.getaddrinfo, list(answers), []

    def getaddrinfo(host, port, *arguments, **options):
        if host != "example.test":
            return true(host, port, *arguments, **options)
        asked.append(host)
        found = left.pop(0) if len(left) > 1 else left[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_that_changes_its_answer_leads_nowhere_else(monkeypatch):
    """The connection goes to the public address that was checked, not to a second answer."""
    asked, connected = resolver(monkeypatch, ["93.184.216.34"], ["127.0.0.1"]), []

    def connect(address, *_, **__):
        connected.append(address)
        raise ConnectionRefusedError("there is no network here")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(TryAgain, match="could not be reached"):
        Web(rate=10_000).get("http://example.test/a.jpg")
    assert connected == [("93.184.216.34", 80)] and asked == ["example.test"]
    with pytest.raises(FetchError, match=r"not public.*example\.test is 127\.0\.0\.1"):
        Web(rate=10_000).get("http://example.test/a.jpg")
    assert len(connected) == 1


def test_one_private_answer_of_several_is_enough_to_refuse(monkeypatch):
    resolver(monkeypatch, ["93.184.216.34", "10.0.0.1"])
    with pytest.raises(FetchError, match=r"not public.*10\.0\.0\.1"):
        Web(rate=10_000).get("http://example.test/a.jpg")


def test_the_next_address_is_tried(site, monkeypatch):
    resolver(monkeypatch, ["127.0.0.2", "127.0.0.1"])    # the server listens on the second one only
    site.serve("/a", (200, JPEG))
    assert get(f"http://example.test:{site.port}/a") == JPEG
    assert site.headers["Host"] == f"example.test:{site.port}"


def test_unknown_hosts_may_work_later(monkeypatch):
    def getaddrinfo(*_, **__):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(TryAgain, match="Temporary failure"):
        Web().get("http://example.test/a.jpg")


def test_certificates_are_checked_for_the_name(site, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                    "-keyout", key, "-out", certificate, "-subj", "/CN=other.test",
                    "-addext", "subjectAltName=DNS:other.test"], capture_output=True, check=True)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    site.server.socket = serving.wrap_socket(site.server.socket, server_side=True)
    site.serve("/a", (200, JPEG))
    trusting = ssl.create_default_context(cafile=certificate)
    url = f"https://example.test:{site.port}/a"
    resolver(monkeypatch, ["127.0.0.1"])
    for context, fault in ((ssl.create_default_context(), "self-signed"), (trusting, "not valid for")):
        monkeypatch.setattr(httpcore, "default_ssl_context", lambda context=context: context)
        with pytest.raises(FetchError, match=fault) as caught:
            get(url)
        assert not isinstance(caught.value, TryAgain)
    assert not site.asked
    true = socket.getaddrinfo    # the stub of the resolver, asked by the certificate's name
    monkeypatch.setattr(socket, "getaddrinfo",
                        lambda host, *rest, **options: true("example.test" if "test" in host else host,
                                                            *rest, **options))
    assert get(url.replace("example", "other")) == JPEG


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451, 204])
def test_lasting_refusals_are_not_asked_again(site, tmp_path, status):
    data = items(tmp_path, {"a": site.serve("/a", (200, JPEG)), "b": site.serve("/b", (status,))})
    report = fetch(data)
    assert report.fetched == 1
    assert report.failed.as_dict() == {f"its image was answered with status {status}": {
        "count": 1, "first": f"item 'b', {site.url('/b')}: was answered with status {status}"}}
    assert site.asked["/b"] == 1


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_passing_faults_are_asked_again(site, tmp_path, status):
    data = items(tmp_path, {"a": site.serve("/a", (status,), (status,), (200, JPEG))})
    assert fetch(data, retries=2).fetched == 1
    assert site.asked["/a"] == 3


def test_broken_connections_are_asked_again(site, tmp_path):
    left = [1, 1]

    def page(handler):
        if left:
            left.pop()
            answer(handler, 200, JPEG[:100], Content_Length=len(JPEG))    # and then nothing more
            handler.close_connection = True
        else:
            answer(handler, 200, JPEG)

    site.pages["/a"] = page
    data = items(tmp_path, {"a": site.url("/a")})
    assert fetch(data, retries=2).fetched == 1
    assert image_files(data / "images")["a"].read_bytes() == JPEG


def test_the_server_says_when(site, tmp_path):
    data = items(tmp_path, {"a": site.serve("/a", (429,), (200, JPEG), Retry_After="1")})
    fetch(data)
    assert site.moments[1] - site.moments[0] >= 1


@pytest.mark.parametrize(("header", "seconds"), [
    ("7", 7), ("0", 0), ("999999", 120), ("", 0), ("soon", 0), ("-5", 0),
    ("Mon, 01 Jan 2001 00:00:00 GMT", 0), ("Mon, 01 Jan 2999 00:00:00 GMT", 120)])
def test_retry_after(header, seconds):
    assert _seconds(header) == seconds


def test_silence_and_slowness_end(site):
    site.pages["/silent"] = lambda handler: time.sleep(2)
    site.pages["/slow"] = without_length(JPEG, pause=0.05, step=1)
    for path, options in (("/silent", {"timeout": 0.3}), ("/silent", {"time_limit": 0.3}),
                          ("/slow", {"time_limit": 0.5})):
        start = time.monotonic()
        with pytest.raises(TryAgain, match="took too long"):
            get(site.url(path), **options)
        assert 0.25 < time.monotonic() - start < 1.5


def test_files_that_are_too_large(site):
    limit = 10_000
    assert get(site.serve("/fits", (200, b"x" * limit)), max_bytes=limit) == b"x" * limit
    sent = Counter()

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while sent["bytes"] < 50_000_000:
                sent["bytes"] += handler.wfile.write(bytes(10_000))
        except OSError:
            sent["cut"] += 1

    site.pages["/endless"] = endless
    declared = site.serve("/declared", (200, b""), Content_Length=limit + 1)
    for url in (declared, site.url("/endless")):
        with pytest.raises(FetchError, match=r"too many bytes.*10,000") as caught:
            get(url, max_bytes=limit)
        assert not isinstance(caught.value, TryAgain)
    deadline = time.monotonic() + 5
    while not sent["cut"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sent["cut"] and sent["bytes"] < 50_000_000


def test_what_is_no_image_is_not_stored(site, tmp_path):
    from test_images import bomb

    data = items(tmp_path, {
        "good": site.serve("/good", (200, PNG)), "page": site.serve("/page", (200, b"<html>no</html>")),
        "cut": site.serve("/cut", (200, JPEG[:-300])), "bomb": site.serve("/bomb", (200, bomb())),
        "none": site.serve("/none", (200, b""))})
    report = fetch(data)
    assert list(image_files(data / "images")) == ["good"]
    assert {reason: entry["count"] for reason, entry in report.failed.as_dict().items()} == {
        "its image is not a jpeg, png, webp or gif image": 1, "its image is truncated or corrupt": 1,
        "its image has too many pixels": 1, "its image is empty": 1}
    assert len(failed_file(data)) == 4


def test_the_limit_of_pixels_can_be_changed(site, tmp_path):
    data = items(tmp_path, {"a": site.serve("/a", (200, encoded(size=32))),
                            "b": site.serve("/b", (200, encoded(size=31)))})
    report = fetch(data, max_pixels=32 * 32 - 1)
    assert report.fetched == 1 and list(report.failed.as_dict()) == ["its image has too many pixels"]
    assert fetch(data, max_pixels=32 * 32, retry_failed=True).fetched == 1


def test_rate_holds_for_all_workers_together(site, tmp_path):
    data = items(tmp_path, {f"i{k}": site.serve(f"/{k}", (200, JPEG)) for k in range(21)})
    start = time.monotonic()
    assert fetch(data, rate=20, workers=8).fetched == 21
    assert time.monotonic() - start >= 1.0
    gaps = np.diff(sorted(site.moments))
    assert np.mean(gaps) > 0.04


def test_workers_fetch_at_the_same_time(site, tmp_path):
    busy, most, lock = Counter(), [0], threading.Lock()

    def page(handler):
        with lock:
            busy["now"] += 1
            most[0] = max(most[0], busy["now"])
        time.sleep(0.2)
        with lock:
            busy["now"] -= 1
        answer(handler, 200, JPEG)

    for k in range(12):
        site.pages[f"/{k}"] = page
    data = items(tmp_path, {f"i{k}": site.url(f"/{k}") for k in range(12)})
    assert fetch(data, workers=4).fetched == 12
    assert most[0] == 4


def test_all_failed_is_an_error(site, tmp_path):
    data = items(tmp_path, {"a": site.url("/a"), "b": site.url("/b"), "c": "ftp://x/y"})
    with pytest.raises(DataError, match=r"no image could be fetched; of 3 items, 2: .*status 404"):
        fetch(data)


@pytest.mark.parametrize(("column", "content", "message"), [
    ("picture", "item_id:token\timage_url:token\na\tx\n", "no column 'picture', only item_id, image_url"),
    ("image_url", "item_id:token\timage_url:token\na\thttp://x/\na\thttp://y/\n", "'a' stands twice"),
    ("image_url", "item_id:token\timage_url:token\na\t\n", "empty in every line"),
    ("image_url", "item_id:token\timage_url:token\na\n", "line 2: has 1 fields"),
])
def test_items_that_cannot_be_used(tmp_path, column, content, message):
    data = items(tmp_path, {})
    (data / "toy.item").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        download(data, column=column)
    assert not (data / "images").exists()


def test_sequence_columns_hold_addresses_too(site, tmp_path):
    url = site.serve("/a%20b.jpg?x=%C3%BC", (200, JPEG))
    data = items(tmp_path, {"a": url.replace("%20", " ").replace("%C3%BC", "ü")},
                 header="item_id:token\turl:token_seq")
    assert fetch(data, column="url").fetched == 1


def test_a_token_too_long_for_a_file(site, tmp_path):
    data = items(tmp_path, {"a": site.serve("/a", (200, JPEG)), "é" * 100: site.url("/a")})
    report = fetch(data)
    assert report.fetched == 1 and "too long" in str(report.lines())


def test_command(site, tmp_path, capsys):
    data = items(tmp_path, {"a": site.serve("/a", (200, JPEG))})
    # The command keeps to the public Internet, and no option changes that.
    assert main(["prepare", "images", f"--data={data}"]) == 2
    assert "refused because of its port" in capsys.readouterr().err and not site.asked
    for words, message in ((["--workers=0"], "--workers: 0"), (["--rate=0"], "--rate: 0"),
                           (["--rate=nan"], "--rate: nan"), (["--max-bytes=0"], "--max-bytes"),
                           (["--retries=-1"], "--retries"), (["--max-pixels=0"], "--max-pixels: 0"),
                           (["--max-pixels=89478486"], "--max-pixels: 89478486")):
        assert main(["prepare", "images", f"--data={data}", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["prepare", "images"]) == 2
    assert "--data" in capsys.readouterr().err


CHILD = """
import sys
from dataset_prep.download import download
report = download(sys.argv[1], rate=1000, workers=2, backoff=0.01, allowed=lambda address: True, ports=None)
print(report.fetched, report.present)
"""


def start_child(data):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(data)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_images(data, count, child):
    deadline = time.monotonic() + 60
    while not (data / "images").is_dir() or len(image_files(data / "images")) < count:
        assert time.monotonic() < deadline and child.poll() is None, child.communicate()
        time.sleep(0.005)


def slow_items(site, tmp_path, count=40):
    """Images that come in pieces, so that a kill meets some on their way."""
    for k in range(count):
        site.pages[f"/{k}"] = without_length(encoded("PNG", seed=k, size=64), pause=0.01, step=2000)
    return items(tmp_path, {f"i{k}": site.url(f"/{k}") for k in range(count)})


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kill_and_go_on(site, tmp_path):
    data = slow_items(site, tmp_path)
    child = start_child(data)
    wait_for_images(data, 10, child)
    with pytest.raises(DataError, match="another run"):
        fetch(data)
    child.kill()
    child.wait()
    whole = image_files(data / "images")
    assert 10 <= len(whole) < 40
    for path in whole.values():
        open_image(path)
    child = start_child(data)
    out, err = child.communicate(timeout=60)
    fetched, present = map(int, out.split())
    assert fetched + present == 40 and present >= len(whole), err
    assert all(site.asked[f"/{token[1:]}"] == 1 for token in whole)
    for k, path in ((int(token[1:]), path) for token, path in image_files(data / "images").items()):
        assert path.read_bytes() == encoded("PNG", seed=k, size=64)


def test_interrupt_ends_soon_and_leaves_whole_images(site, tmp_path):
    data = slow_items(site, tmp_path)
    child = start_child(data)
    wait_for_images(data, 5, child)
    start = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert time.monotonic() - start < 5 and "KeyboardInterrupt" in err
    assert not list((data / "images").glob(".*.tmp.*"))
    assert 5 <= len(image_files(data / "images")) < 40
    report = fetch(data)
    assert report.fetched + report.present == 40
