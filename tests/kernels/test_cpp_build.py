"""Compiling the C++ kernels: from a cache, by any compiler, and without one."""

import ctypes
import shutil

import pytest

from xlstm_scaling.kernels import registry
from xlstm_scaling.kernels.cpp import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing remembered from other tests, nor left for them."""
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    functions = build.library, build.usable, registry.select
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def compiler_that(tmp_path, script):
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_compiled_once_and_kept(tmp_path, monkeypatch):
    assert build.library("tiles").tiles_multiply(1, 1, 1, None, None, None) == 2  # there are no tiles in it
    kept = list((tmp_path / "cache").iterdir())
    assert [path.suffix for path in kept] == [".so"]
    build.library.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert isinstance(build.library("tiles"), ctypes.CDLL)


def test_other_sources_another_library(tmp_path, monkeypatch):
    build.library("attention")
    folder = tmp_path / "sources"
    shutil.copytree(build.FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    with (folder / "products.hpp").open("a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(build, "FOLDER", folder)
    build.library.cache_clear()
    build.library("attention")
    assert len(list((tmp_path / "cache").glob("*.so"))) == 2


def test_without_a_compiler_the_next_backend_is_taken(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler was found"):
        assert registry.select("mlstm", "cpu", "chunkwise").backend == "cpu"


def test_switched_off_without_a_word(monkeypatch, recwarn):
    monkeypatch.setenv(build.SWITCH_VARIABLE, "0")
    assert registry.select("mlstm", "cpu", "chunkwise").backend == "cpu"
    assert not recwarn.list


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv(
        "CXX", compiler_that(tmp_path, '[ "$1" = --version ] && exit 0; echo "no such header" >&2; exit 1')
    )
    with pytest.raises(build.BuildError, match="no such header"):
        build.library("mlstm")
    assert not list((tmp_path / "cache").iterdir())


def test_a_compiler_without_threads_or_instruction_sets_is_enough(monkeypatch, tmp_path):
    real = build.compiler()[0]
    refuse = 'for word in "$@"; do case $word in -fopenmp|-m*=native) echo "unknown $word" >&2; exit 1;; esac; done'
    monkeypatch.setenv("CXX", compiler_that(tmp_path, f'{refuse}; exec {real} "$@"'))
    assert build.library("mlstm").vector_bytes() == 16


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="could not be kept in"):
        build.library("mlstm")


def test_a_damaged_library_is_compiled_again():
    path = build.library_path("attention")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    assert build.library("attention").attention_forward
    assert path.read_bytes() != b"not a library"
