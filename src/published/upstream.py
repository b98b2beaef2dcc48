"""Where the paper's logs come from: their names, git blob ids and address, and the download that checks them."""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from xlstm_scaling.published.logs import LogSettings
from xlstm_scaling.published.pickle_objects import MAX_BYTES
from xlstm_scaling.published.reader import read_regular_file
from xlstm_scaling.study.config import ConfigError, conf_dir
from xlstm_scaling.study.files import atomic_write

TIMEOUT_S = 60.0
_SCHEMES = ("https://", "http://", "file://")


class DownloadError(OSError):
    """A file could not be fetched, or is not the one that was published; the message names both ids."""


def blob_id(content: bytes) -> str:
    """Git's id of a file's content, as ``git hash-object FILE`` prints it (SHA-1 over a header and the content)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Upstream:
    """``conf/published/paper.yaml``."""

    content: dict[str, Any]

    @classmethod
    def load(cls, path: Path | None = None) -> Upstream:
        """Read the settings; ConfigError says what is wrong with them."""
        path = Path(path) if path is not None else conf_dir() / "published" / "paper.yaml"
        if not path.is_file():
            raise ConfigError(f"no settings of the published logs at {path}")
        content = yaml.safe_load(path.read_text())
        needed = ("repository", "commit", "url", "folder", "corpus", "logs", "other")
        lacking = [key for key in needed if not isinstance(content, dict) or key not in content]
        if lacking:
            raise ConfigError(f"{path} lacks {', '.join(lacking)}")
        for name, entry in {**content["logs"], **content["other"]}.items():
            if not re.fullmatch(r"[0-9a-f]{40}", str(entry.get("blob"))):
                raise ConfigError(f"{path}: blob of {name} is no git id (40 hexadecimal digits)")
        return cls(content)

    @cached_property
    def logs(self) -> tuple[str, ...]:
        """File names of all run logs."""
        return tuple(self.content["logs"])

    @property
    def diverged_above(self) -> float:
        """Validation loss [nat/token] above which a run of the paper has run away."""
        return float(self.content.get("diverged_above", "inf"))

    def blob(self, name: str) -> str | None:
        """The published blob id of a file name; None for an unknown one."""
        return {**self.content["logs"], **self.content["other"]}.get(name, {}).get("blob")

    def holds(self, name: str) -> str | None:
        """What a file that is no run log holds; None for another."""
        return self.content["other"].get(name, {}).get("holds")

    def settings(self, name: str, experiment_set: str | None = None) -> LogSettings | None:
        """How a log file is read; None for an unknown name, unless its set is given."""
        entry = self.content["logs"].get(name)
        if entry is None and experiment_set is None:
            return None
        entry = entry or {}
        chosen = experiment_set or entry["experiment_set"]
        return LogSettings(
            experiment_set=chosen,
            merge_restarts=bool(entry.get("merge_restarts", chosen == "tokenparam")),
            diverged_above=self.diverged_above,
            unfinished_below=float(self.content.get("unfinished_below", 0.0)),
        )

    def url(self, name: str, template: str | None = None) -> str:
        """Address of a file; ConfigError where the template has an unknown field or no scheme that is allowed."""
        fields = {"repository": self.content["repository"], "commit": self.content["commit"]}
        fields |= {"path": f"{self.content['folder']}/{name}", "name": name}
        template = template or self.content["url"]
        try:
            url = template.format(**fields)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"URL template {template!r}: {error}; known fields: {', '.join(fields)}") from None
        if not url.startswith(_SCHEMES):
            raise ConfigError(f"URL {url!r} must begin with one of {', '.join(_SCHEMES)}")
        return url

    def fetch(self, name: str, folder: Path, template: str | None = None) -> Path:
        """The file ``name`` in ``folder``: found there with the published blob id, or downloaded and checked.

        Raises:
            DownloadError: unreachable, too large, or another content than the published one; nothing is kept then.
        """
        expected = self.blob(name)
        if expected is None:
            raise ConfigError(f"{name!r} is none of the published files: {', '.join(self.logs)}")
        path = Path(folder) / name
        if path.is_file() and blob_id(read_regular_file(path)) == expected:
            return path
        url = self.url(name, template)
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                content = response.read(MAX_BYTES + 1)
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise DownloadError(f"{url}: {reason}; fetch it by hand into {folder}, or give another --url") from None
        if (found := blob_id(content)) != expected:
            raise DownloadError(f"{url} has the blob id {found}, published is {expected}: not kept")
        with atomic_write(path) as stream:
            stream.write(content)
        return path
