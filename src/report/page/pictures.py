"""The figures of a study, each embedded in the page, with its caption and what it shows."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from xlstm_scaling.figures.registry import FIGURES
from xlstm_scaling.figures.tables import Tables
from xlstm_scaling.report.page.captions import Caption, caption
from xlstm_scaling.report.page.shown import shown

#: a wider picture is made smaller [pixels]
MAX_WIDTH = 2400
_SVG_SIZE = re.compile(r'<svg[^>]*?\sviewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"')


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it; ``files``: kind -> path relative to the study's folder."""

    name: str
    title: str
    category: str
    source: str
    width: int
    height: int
    alt: str
    caption: Caption
    shown: str
    files: dict[str, str]
    tables: tuple[str, ...]


def embedded(stem: Path) -> tuple[str, int, int]:
    """A picture as a data URI with its size in pixels: lossless WebP of ``stem``.png, else ``stem``.svg as it is.

    Raises FileNotFoundError where there is neither.
    """
    png, svg = stem.with_suffix(".png"), stem.with_suffix(".svg")
    if png.is_file():
        with Image.open(png) as opened:
            image = opened.convert("RGB")
        if image.width > MAX_WIDTH:
            image = image.resize((MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)), Image.Resampling.LANCZOS)
        packed = io.BytesIO()
        image.save(packed, "WEBP", lossless=True, quality=60, method=3)
        return _uri("image/webp", packed.getvalue()), image.width, image.height
    if svg.is_file():
        content = svg.read_bytes()
        size = _SVG_SIZE.search(content[:4000].decode(errors="replace"))
        width, height = (round(float(side)) for side in size.groups()) if size else (720, 450)
        return _uri("image/svg+xml", content), width, height
    raise FileNotFoundError(f"no figure {stem}.png or .svg: run the stage `figures` (figures.formats names svg or png)")


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(name: str, study: Path, captions: Path, config: Mapping[str, Any], tables: Tables) -> Picture:
    """One figure of ``study``/figures; ``config``: what its caption is filled in with, and the group ``figures``."""
    spec = FIGURES[name]
    source, width, height = embedded(study / "figures" / name)
    told = caption(captions / spec.caption, config)
    facts = shown(name, tables, config.get("figures") or {})
    files = {
        kind: f"figures/{name}.{kind}"
        for kind in ("svg", "png", "pdf", "csv")
        if (study / "figures" / f"{name}.{kind}").is_file()
    }
    alt = f"{spec.title}. {told.first.striptags()}" + (f" Shown: {facts}." if facts else "")
    return Picture(
        name, spec.title, spec.category, source, width, height, alt, told, facts, files, spec.tables
    )  # fmt: skip
