"""The report on the installation."""

from importlib import metadata

import pytest

from recbole_mmdiff import __version__, compat, doctor


@pytest.fixture
def installed(monkeypatch):
    """A function that makes a package look installed in a version, or absent (None)."""
    versions = {}
    real = metadata.version

    def version(package):
        found = versions.get(package, real if package not in versions else None)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found(package) if callable(found) else found

    def pretend(package, shown):
        versions[package] = shown
        compat.release.cache_clear()

    monkeypatch.setattr(metadata, "version", version)
    compat.release.cache_clear()
    yield pretend
    compat.release.cache_clear()


def test_report_of_this_machine(capsys):
    assert doctor.main() == 0
    text = capsys.readouterr().out
    for package in ("torch", "numpy", "pandas", "scipy", "scikit-learn", "recbole"):
        assert f"{package} {metadata.version(package)}" in text
    assert f"recbole-mmdiff {__version__}" in text
    assert "cpu:" in text
    for patch in compat.active_patches():
        assert f"{patch.number}. {patch.reason}" in text


@pytest.mark.parametrize("version", ["1.3.0", "1.1.1", "2.0", None])
def test_unsupported_recbole_is_an_error_that_says_what_to_do(installed, capsys, version):
    installed("recbole", version)
    assert doctor.main() == 1
    assert 'pip install "recbole>=1.2,<1.3"' in capsys.readouterr().out


@pytest.mark.parametrize("version", ["1.2.0", "1.2.1", "1.2"])
def test_supported_recbole(installed, version):
    installed("recbole", version)
    assert doctor.problems() == []


def test_missing_extra_is_named_with_the_command(installed):
    installed("polars", None)
    assert 'polars: pip install "recbole-mmdiff[prep]"' in doctor.report()
    installed("polars", "1.0")
    assert "polars:" not in doctor.report()


def test_old_stack_needs_few_patches(installed):
    for package, version in {
        "numpy": "1.23.5",
        "pandas": "2.2.3",
        "scipy": "1.10.1",
        "hyperopt": "0.2.5",
    }.items():
        installed(package, version)
    # 1 and 11 depend on other packages; 5 and 10 are wanted on every stack.
    assert {p.number for p in compat.active_patches()} - {1, 11} == {5, 10, 12, 13}
