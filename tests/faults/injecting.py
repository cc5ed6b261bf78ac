"""Faults that the system itself reports, for the tests of this folder."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def file_limit(size):
    """No file of this process can grow beyond ``size`` bytes: the kernel refuses as on a full disk."""
    resource = pytest.importorskip("resource", reason="limits of files are a matter of POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def closed_folder():
    """A folder that this process may look into but not write, whoever runs the tests."""
    if os.name != "posix":
        pytest.skip("modes and users are POSIX")
    with tempfile.TemporaryDirectory() as folder:   # Below pytest's own, others than root see nothing.
        os.chmod(folder, 0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o755)


def leftovers(folder):
    """Temporary files below a folder."""
    return [path.name for path in Path(folder).rglob(".*") if ".tmp" in path.name]


def flipped(content, place):
    """The bytes with all bits of one of them turned."""
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1:]
