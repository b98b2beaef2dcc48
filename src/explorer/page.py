"""The page as one file: Bokeh's JavaScript, our scripts, the study's data; nothing is fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from bokeh.embed import json_item
from bokeh.resources import Resources
from jinja2 import Environment

from xlstm_scaling.explorer.plots import build_plots
from xlstm_scaling.study.files import write_text_atomic

#: in the order in which they need each other
SCRIPTS = ("numbers", "laws", "costs", "planner", "settings", "controls", "readout", "theme", "views", "main")
#: the surface shows this factor beyond the runs at first
MARGIN = 4.0
#: what is shown where no run has a size or tokens
NO_RUNS = (1e6, 1e9)


def render_page(data: Mapping[str, Any]) -> str:
    """The page of `data.page_data`; the same data, the same bytes."""
    files = resources.files("xlstm_scaling.explorer")
    plots = build_plots(data["styles"], {name: _ends(data["runs"][name]) for name in ("num_params", "num_tokens")})
    items = {name: stable_ids(json_item(plot, name)) for name, plot in plots.items()}
    template = Environment(autoescape=False).from_string((files / "page.html").read_text(encoding="utf-8"))
    return template.render(
        study=data["study"],
        reason=data["reason"],
        css=(files / "explorer.css").read_text(encoding="utf-8"),
        bokeh="\n".join(Resources(mode="inline", components=["bokeh"]).js_raw).replace("</script", "<\\/script"),
        scripts="\n".join((files / "js" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS),
        data=_json(data),
        plots=_json(items),
    )


def write_page(data: Mapping[str, Any], path: Path) -> None:
    """Write the page of `data.page_data`, whole or not at all."""
    write_text_atomic(path, render_page(data))


def stable_ids(item: Any) -> dict[str, Any]:
    """An item of Bokeh with ids counted from 1, whatever was made before it in this process."""
    text = json.dumps(item)
    names: dict[str, str] = {}
    for found in re.findall(r'"id": ?"(p\d+)"', text):
        names.setdefault(found, f"m{len(names) + 1}")
    return json.loads(re.sub(r'"(p\d+)"', lambda match: f'"{names.get(match[1], match[1])}"', text))


def _ends(values: list[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None and value > 0]
    return (min(known) / MARGIN, max(known) * MARGIN) if known else NO_RUNS


def _json(value: Any) -> str:
    """JSON that may stand within a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("</", "<\\/").replace("<!--", "<\\u0021--")
