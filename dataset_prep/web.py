"""Fetching from addresses that a data set names: nothing in them is trusted.

Only http and https, only addresses of the public Internet, within limits of bytes and time. Every
connection, those of redirects too, goes to the very address that was checked, so that a name whose
answer changes between check and connection leads nowhere else. Proxies are not used.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from email.utils import parsedate_to_datetime
from urllib.parse import quote, urljoin, urlsplit

import httpcore

from dataset_prep.images import MAX_BYTES, ImageError
from recbole_mmdiff import __version__

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_REDIRECTS = 5
MAX_WAIT = 120.0    # seconds that a server may ask us to wait
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429)
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class FetchError(ImageError):
    """An address that gives no content, and will not when it is asked again."""


class TryAgain(FetchError):
    """An address that gave no content this time. ``wait``: seconds that its server asked for."""

    def __init__(self, where: str, reason: str, detail: str = "", wait: float = 0.0) -> None:
        super().__init__(where, reason, detail)
        self.wait = wait


def is_public(address: Address) -> bool:
    """Whether an IP address is of the public Internet: not of this machine, of a local network, of
    a group, nor reserved; also not by way of an IPv4 address inside an IPv6 one."""
    if address.version == 6:
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_IPV6:
            return False
    return address.is_global and not address.is_multicast


class Pace:
    """Lets callers of all threads through at most ``rate`` times a second, evenly."""

    def __init__(self, rate: float, stop: threading.Event) -> None:
        self._gap, self._stop = 1 / rate, stop
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self) -> None:
        """Return at the next free moment, or at once when stopped."""
        with self._lock:
            moment = max(time.monotonic(), self._next)
            self._next = moment + self._gap
        self._stop.wait(moment - time.monotonic())


class Web:
    """Gets the content of addresses; for use by many threads.

    Args:
        rate: requests a second, of all threads together, redirects included.
        max_bytes: the largest content accepted.
        timeout: seconds that a server may be silent.
        time_limit: seconds that one request may take in all.
        allowed: tells whether an IP address may be connected to.
        ports: the ports that may be connected to, None for any.
        stop: when it is set, requests under way end with TryAgain.
    """

    def __init__(self, rate: float = 20.0, max_bytes: int = MAX_BYTES, timeout: float = 15.0,
                 time_limit: float = 60.0, allowed: Callable[[Address], bool] = is_public,
                 ports: Collection[int] | None = (80, 443),
                 stop: threading.Event | None = None) -> None:
        self._stop = stop or threading.Event()
        self._pace = Pace(rate, self._stop)
        self._max_bytes, self._ports = max_bytes, ports
        self._timeouts = dict.fromkeys(("connect", "read", "write"), timeout)
        self._time_limit = time_limit
        self._backend = _GuardedBackend(allowed, self._stop)
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpcore.default_ssl_context(), network_backend=self._backend,
            max_connections=None, max_keepalive_connections=32, keepalive_expiry=30.0)

    def get(self, address: str) -> bytes:
        """The content of ``address``.

        Raises:
            FetchError: refused, absent, or too large; TryAgain if it may be there later.
        """
        here = address
        for _ in range(MAX_REDIRECTS + 1):
            url = self._checked(here)
            self._pace.wait()
            content, location = self._ask(here, url)
            if location is None:
                return content
            try:
                here = urljoin(here, location)
            except ValueError as error:
                raise FetchError(address, "redirects to what is no address", location[:200]) from error
        raise FetchError(address, "redirects too often", f"more than {MAX_REDIRECTS} times")

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()

    def _checked(self, address: str) -> httpcore.URL:
        try:
            parts = urlsplit(address)
            host = (parts.hostname or "").encode("idna")
            port = parts.port or _PORTS.get(parts.scheme)
        except ValueError as error:
            raise FetchError(address, "is not a valid address", str(error)) from error
        if parts.scheme not in _PORTS or not host:
            raise FetchError(address, "is not an http or https address", "")
        if parts.username is not None or parts.password is not None:
            raise FetchError(address, "is refused because it holds a user name", "")
        if self._ports is not None and port not in self._ports:
            raise FetchError(address, "is refused because of its port", f"port {port}")
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        if parts.query:
            target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?")
        return httpcore.URL(scheme=parts.scheme, host=host, port=port, target=target)

    def _ask(self, address: str, url: httpcore.URL) -> tuple[bytes, str | None]:
        """One request: the content, or where it is instead."""
        self._backend.start_clock(self._time_limit)
        try:
            with self._pool.stream("GET", url, headers=_headers(url),
                                   extensions={"timeout": self._timeouts}) as response:
                return self._read(address, response)
        except _NotPublic as error:
            raise FetchError(address, "is refused because its host is not public", str(error)) from error
        except httpcore.TimeoutException as error:
            raise TryAgain(address, "took too long", str(error)) from error
        except (httpcore.NetworkError, httpcore.RemoteProtocolError) as error:
            # The cause is httpcore's argument; a wrong certificate will not become right.
            wrong = any(isinstance(cause, ssl.SSLCertVerificationError) for cause in error.args)
            kind = FetchError if wrong else TryAgain
            raise kind(address, "could not be reached or read", str(error)) from error
        except httpcore.LocalProtocolError as error:
            raise FetchError(address, "is not a valid address", str(error)) from error

    def _read(self, address: str, response: httpcore.Response) -> tuple[bytes, str | None]:
        headers = {name.lower(): value.decode("utf-8", "replace") for name, value in response.headers}
        status = response.status
        if status in _REDIRECTS and b"location" in headers:
            return b"", headers[b"location"]
        if status in _BUSY or status >= 500:
            raise TryAgain(address, f"was answered with status {status}",
                           wait=_seconds(headers.get(b"retry-after", "")))
        if status != 200:
            raise FetchError(address, f"was answered with status {status}", "")
        self._limit(address, int(headers.get(b"content-length", 0)))    # h11 checked that it is one.
        content = bytearray()
        for part in response.iter_stream():
            content += part
            self._limit(address, len(content))
        return bytes(content), None

    def _limit(self, address: str, size: int) -> None:
        if size > self._max_bytes:
            raise FetchError(address, "has too many bytes",
                             f"at least {size:,}, {self._max_bytes:,} are accepted")


def _headers(url: httpcore.URL) -> dict[str, str]:
    host = f"[{url.host.decode()}]" if b":" in url.host else url.host.decode()
    if url.port != _PORTS[url.scheme.decode()]:
        host += f":{url.port}"
    return {"Host": host, "User-Agent": f"recbole-mmdiff/{__version__}", "Accept": "image/*",
            "Accept-Encoding": "identity"}    # A compressed answer would hide its size.


class _NotPublic(Exception):
    """A host with an address that may not be connected to."""


class _GuardedBackend(httpcore.NetworkBackend):
    """Connects to addresses that were checked, and waits no longer than the clock of the thread."""

    def __init__(self, allowed: Callable[[Address], bool], stop: threading.Event) -> None:
        self._allowed, self._stop = allowed, stop
        self._plain, self._clock = httpcore.SyncBackend(), threading.local()

    def start_clock(self, seconds: float) -> None:
        """From now on, this thread's requests may take so long in all."""
        self._clock.end = time.monotonic() + seconds

    def left(self, timeout: float | None) -> float:
        """Seconds that this thread may wait."""
        rest = self._clock.end - time.monotonic()
        if rest <= 0 or self._stop.is_set():
            raise httpcore.ReadTimeout("stopped" if self._stop.is_set() else "the time limit is over")
        return rest if timeout is None else min(rest, timeout)

    def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        failure = None
        for address in self._addresses(host, port):
            try:
                stream = self._plain.connect_tcp(address, port, self.left(timeout), local_address,
                                                 socket_options)
                return _TimedStream(stream, self.left)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore.ConnectError(f"{host} has no address")

    def _addresses(self, host: str, port: int) -> list[str]:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            raise httpcore.ConnectError(f"{host}: {error}") from error
        found = list(dict.fromkeys(answer[4][0] for answer in answers))
        for address in found:
            if not self._allowed(ipaddress.ip_address(address)):
                raise _NotPublic(f"{host} is {address}")
        return found


class _TimedStream(httpcore.NetworkStream):
    """A connection whose every wait ends when ``left`` says so."""

    def __init__(self, stream: httpcore.NetworkStream, left: Callable[[float | None], float]) -> None:
        self._stream, self._left = stream, left

    def read(self, max_bytes, timeout=None):
        return self._stream.read(max_bytes, self._left(timeout))

    def write(self, buffer, timeout=None):
        self._stream.write(buffer, self._left(timeout))

    def start_tls(self, ssl_context, server_hostname=None, timeout=None):
        return _TimedStream(
            self._stream.start_tls(ssl_context, server_hostname, self._left(timeout)), self._left)

    def close(self):
        self._stream.close()

    def get_extra_info(self, info):
        return self._stream.get_extra_info(info)


def _seconds(retry_after: str) -> float:
    """A Retry-After header (seconds or a date) in seconds from now, within bounds; 0 if unreadable."""
    try:
        if retry_after.strip().isdigit():
            wait = float(retry_after)
        else:
            wait = parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(wait, 0.0), MAX_WAIT)
