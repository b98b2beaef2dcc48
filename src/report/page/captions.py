"""The captions of ``workflow/report`` (Jinja2 in reStructuredText, as Snakemake's report reads them) as HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
from docutils.core import publish_parts
from markupsafe import Markup

#: nothing is read from files, and no markup passes through
_SAFE = {
    "file_insertion_enabled": False,
    "raw_enabled": False,
    "report_level": 5,
    "halt_level": 5,
    "smart_quotes": False,
    "syntax_highlight": "none",
    "_disable_config": True,
}
_LEAD = re.compile(r"^\*\*(.+?)\*\*\.?\s*", re.DOTALL)


@dataclass(frozen=True)
class Caption:
    """lead: the words in bold at its start; first: the rest of that paragraph; more: the paragraphs after it."""

    lead: str
    first: Markup
    more: Markup


def caption_texts(path: Path, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(bold words that a paragraph begins with, the rest of it as reStructuredText), filled in with ``config``."""
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(Path(path).read_text())
    text = template.render(snakemake=SimpleNamespace(config=dict(config)))
    found = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lead = _LEAD.match(paragraph)
        plain = lead.group(1).replace("\\", "").replace("\n", " ") if lead else ""
        found.append((plain.rstrip("."), paragraph[lead.end() :] if lead else paragraph))
    return found


def to_html(text: str) -> Markup:
    """reStructuredText as an HTML fragment."""
    return Markup(publish_parts(text, writer="html5", settings_overrides=_SAFE)["body"])


def caption(path: Path, config: Mapping[str, Any]) -> Caption:
    """The caption of a figure or table."""
    paragraphs = caption_texts(path, config)
    (lead, first), rest = paragraphs[0], paragraphs[1:]
    later = "\n\n".join(f"**{lead}.** {text}" if lead else text for lead, text in rest)
    return Caption(lead, to_html(_capital(first)), to_html(later) if later else Markup(""))


def _capital(text: str) -> str:
    """A sentence that began with bold words, without them."""
    text = text.lstrip(" :,.\n")
    return text[:1].upper() + text[1:]
