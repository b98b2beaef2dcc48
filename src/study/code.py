"""Which code this is: package version, commit, whether the checkout was changed, digest of the source files."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from pathlib import Path

from xlstm_scaling import __version__

PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def code_version() -> dict[str, str | bool | None]:
    """``version``, ``commit`` (None outside a git checkout), ``changed`` (files of the package differ from the commit),
    ``digest`` (of all Python and C++ files of the package, headers too, whatever git says)."""
    commit = _git("rev-parse", "HEAD")
    changed = None if commit is None else bool(_git("status", "--porcelain", "--", "."))
    return {"version": __version__, "commit": commit, "changed": changed, "digest": source_digest()}


def source_digest() -> str:
    """16 hexadecimal digits of sha256 over names and contents of the package's sources."""
    whole = hashlib.sha256()
    for path in sorted(path for kind in ("*.py", "*.cpp", "*.hpp") for path in PACKAGE.rglob(kind)):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(PACKAGE).as_posix()}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()[:16]


def _git(*words: str) -> str | None:
    """What git says in the package's folder; None where it is no checkout, or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe_code(code: dict | None) -> str:
    """For people."""
    if not code:
        return "not recorded"
    commit = code["commit"]
    where = "no git checkout" if commit is None else commit[:12] + (" with changes" if code["changed"] else "")
    return f"{code['version']}, {where}, sources {code['digest']}"
