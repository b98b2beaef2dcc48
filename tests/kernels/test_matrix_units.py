"""Products on the CPU's bf16 matrix units: emulated they are as exact as promised, and units that fail are not used."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from xlstm_scaling.kernels import registry
from xlstm_scaling.kernels.certification.run import OPERATIONS, certify_kernels
from xlstm_scaling.kernels.cpp import build, tiles

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def multiply(library, a, b):
    (m, k), n = a.shape, b.shape[1]
    found = np.full((m, n), np.nan, np.float32)
    assert library.tiles_multiply(m, n, k, *(ctypes.c_void_p(x.ctypes.data) for x in (a, b, found))) == 0
    return found


@pytest.fixture(scope="module")
def emulated():
    return build.library(tiles.CHECK, tiles.EMULATED)


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 32, 16), (17, 33, 15), (64, 64, 128), (48, 7, 80), (5, 160, 96)])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_products_have_the_accuracy_of_two_parts(emulated, shape, scale):
    m, k, n = shape
    random = np.random.default_rng(m)
    a, b = (random.standard_normal(x).astype(np.float32) for x in ((m, k), (k, n)))
    a *= np.float32(scale)
    size = np.abs(a).astype(float) @ np.abs(b)
    error = np.abs(multiply(emulated, a, b) - a.astype(float) @ b) / size
    assert error.max() <= tiles.ACCURACY
    # a product of numbers rounded to bf16 would be off by 2^-9 of single products
    assert error.mean() < 2**-16


def test_numbers_of_bf16_are_multiplied_exactly(emulated):
    random = np.random.default_rng(0)
    a, b = (random.integers(-128, 129, x).astype(np.float32) for x in ((40, 70), (70, 33)))
    np.testing.assert_array_equal(multiply(emulated, a, b), a @ b)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(emulated, odd):
    a, b = np.ones((20, 40), np.float32), np.ones((40, 20), np.float32)
    a[18, 33] = odd
    found = multiply(emulated, a, b)
    assert not np.isfinite(found[18]).any()
    np.testing.assert_array_equal(np.delete(found, 18, 0), np.full((19, 20), 40))


def test_the_mlstm_on_emulated_units_passes_its_certification(monkeypatch):
    """In bf16, every output and gradient: odd lengths, extreme gates, states handed over."""
    monkeypatch.setenv(tiles.SETTING_VARIABLE, "emulated")
    assert tiles.in_use("mlstm") == "emulated"
    kernel = next(kernel for kernel in registry.kernels("mlstm", "cpp") if kernel.form == "chunkwise")
    (found,) = certify_kernels([kernel], level="quick", dtypes=["bfloat16"])
    assert not found.failures()
    assert not found.untested(OPERATIONS["mlstm"])
    # what is judged by its own size alone: as exact as the rounding of bf16 outputs lets it be
    errors = [check.error for checks in found.checks.values() for check in checks.values() if not check.ill_conditioned]
    assert max(errors) < 4e-3


def test_the_instructions_of_the_units_are_emitted(tmp_path):
    """Compiled for a CPU that has them; this one may not."""
    command = [*build.compiler(), "-O3", "-std=c++17", "-march=sapphirerapids", "-S", "-o", str(tmp_path / "tiles.s")]
    source = str(build.FOLDER / "tiles.cpp")
    if subprocess.run([*command, "-E", source], capture_output=True, check=False).returncode:
        pytest.skip("this compiler does not know CPUs with matrix units")
    subprocess.run([*command, "-DTILES=1", source], check=True)
    text = (tmp_path / "tiles.s").read_text()
    for instruction in ("tdpbf16ps", "tileloadd", "tilestored", "ldtilecfg", "sttilecfg"):
        assert instruction in text, instruction


@pytest.fixture
def _a_cpu_with_units(monkeypatch, tmp_path):
    """One whose units are the emulated ones, with a cache of its own, of sources that a test may change."""
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(tiles.SETTING_VARIABLE, raising=False)
    shutil.copytree(build.FOLDER, tmp_path / "sources", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    # of the kernels, what says whether they have units
    (tmp_path / "sources" / "kernel.cpp").write_text('#include "tiles.hpp"\nextern "C" int units() { return TILES; }\n')
    monkeypatch.setattr(build, "FOLDER", tmp_path / "sources")
    monkeypatch.setattr(tiles, "UNITS", tiles.EMULATED)
    monkeypatch.setattr(tiles, "cpu_flags", lambda: tiles.FLAGS | {"avx2"})
    for function in (build.library, tiles._library):
        function.cache_clear()
    yield tmp_path / "sources"
    for function in (build.library, tiles._library):
        function.cache_clear()


def test_units_that_multiply_rightly_are_used_and_asked_once(_a_cpu_with_units, monkeypatch):
    assert tiles.library_with_tiles("kernel").units() == 2
    tiles._library.cache_clear()
    monkeypatch.setattr(tiles, "_CHECK", "raise SystemExit('asked again')")
    assert tiles.library_with_tiles("kernel").units() == 2
    monkeypatch.setenv(tiles.SETTING_VARIABLE, "off")
    assert tiles.library_with_tiles("kernel").units() == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("x * widened(", "1.001f * x * widened("), r"a product of \(1, 1\) by \(1, 1\) is wrong"),
        (("tiles_permitted() { return true; }", "tiles_permitted() { return false; }"), "does not let"),
        (("for (int m = 0; m < TILE_SIZE", "__builtin_trap();\n  for (int m = 0; m < TILE_SIZE"), "ended with -4"),
        (("#define TILE_ZERO", "#error no such thing\n#define TILE_ZERO"), "could not compile"),
    ],
)  # fmt: skip
def test_units_that_fail_are_not_used_and_a_warning_says_why(_a_cpu_with_units, change, reason):
    header = _a_cpu_with_units / "tiles.hpp"
    text, old = header.read_text(), change[0]
    at = text.rindex(old) if "ZERO" in old else text.index(old)
    header.write_text(text[:at] + change[1] + text[at + len(old) :])
    if "ZERO" in old:  # for kernels without units it compiles
        (_a_cpu_with_units / "kernel.cpp").write_text('extern "C" int units() { return 0; }\n')
    with pytest.warns(UserWarning, match=f"multiplies in fp32: .*{reason}"):
        assert tiles.library_with_tiles("kernel").units() == 0


def test_an_unknown_setting_is_named(monkeypatch):
    monkeypatch.setenv(tiles.SETTING_VARIABLE, "on")
    with pytest.raises(ValueError, match=f"{tiles.SETTING_VARIABLE}='on' is not one of auto, off, emulated"):
        tiles.library_with_tiles("mlstm")


def test_kernels_ask_for_the_units_in_their_own_process(tmp_path):
    """A process that has not asked Linux for them is ended by its first instruction: the machine code asks."""
    command = [*build.compiler(), "-O1", "-std=c++17", "-march=sapphirerapids", "-DTILES=1", "-S"]
    source, out = build.FOLDER / "mlstm.cpp", tmp_path / "mlstm.s"
    if subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, check=False).returncode:
        pytest.skip("this compiler does not know CPUs with matrix units")
    text = out.read_text()
    assert "tdpbf16ps" in text
    assert text.count("syscall") >= 2  # forward and backward
