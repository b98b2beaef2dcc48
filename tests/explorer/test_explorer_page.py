"""The page as a file: what is in it, what is not, and what it says where there is nothing to show."""

import json
import re
import sys
from html.parser import HTMLParser
from importlib import resources

import pytest
from explorer_study import ALL_SURFACES, DEVICE, runtime_table, write_study

from xlstm_scaling.cli import run_command
from xlstm_scaling.explorer.data import study_data, study_runtimes
from xlstm_scaling.explorer.page import SCRIPTS, render_page, stable_ids
from xlstm_scaling.figures.style import arch_styles

MOST_BYTES = 5_000_000


class Elements(HTMLParser):
    """What a page refers to, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.references, self.text, self.json, self.inside = [], "", {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = (tag, dict(attrs).get("id")) if tag in ("script", "style") else None
        self.references += [value for name, value in attrs if name in ("src", "href", "action", "data", "poster")]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, content):
        if self.inside is None:
            self.text += content
        elif self.inside[1]:
            self.json[self.inside[1]] = json.loads(content)


@pytest.fixture(scope="session")
def page(data):
    return render_page(data)


def test_one_small_file_that_asks_for_nothing(page):
    assert len(page.encode()) < MOST_BYTES
    assert [one for one in Elements(page).references if not one.startswith("data:")] == []
    files = resources.files("xlstm_scaling.explorer")
    own = [files / "page.html", files / "explorer.css", *(files / "js" / f"{name}.js" for name in SCRIPTS)]
    assert {path.name for path in (files / "js").iterdir()} == {f"{name}.js" for name in SCRIPTS}
    for path in own:
        assert not re.search(r"https?:|@import|\bfetch\(|XMLHttpRequest", path.read_text()), path.name


def test_ids_do_not_depend_on_what_was_made_before(page):
    items = Elements(page).json["plots"]
    assert set(items) == {"surface", "curve", "ttft", "step"}
    for item in items.values():
        text = json.dumps(item)
        defined = re.findall(r'"name": ?"[A-Z][^"]*", "id": ?"(m\d+)"', text)
        assert len(defined) == len(set(defined)) > 20
        assert not re.search(r'"id": ?"p\d+"', text)
    assert stable_ids({"id": "p7", "to": {"id": "p3"}, "text": "p9"}) == {"id": "m1", "to": {"id": "m2"}, "text": "p9"}


def test_every_architecture_is_there_as_the_figures_draw_it(data):
    styles = arch_styles(ALL_SURFACES)
    assert [arch["id"] for arch in data["archs"]] == list(styles)
    for arch in data["archs"]:
        assert (arch["name"], arch["colour"]) == (styles[arch["id"]].name, styles[arch["id"]].colour)
    assert "lost" in data["runs"]["run_id"] and None in data["runs"]["val_loss"]


def test_text_of_a_study_cannot_become_markup(page):
    assert "A study &lt;of&gt; planted laws" in page
    assert "A study <of> planted laws" in Elements(page).text


def test_without_a_law_the_page_says_so_and_shows_the_runs(tmp_path):
    found = study_data(write_study(tmp_path / "flat", converged=False), "No law")
    shown = Elements(render_page(found))
    assert "There is no law to explore: no loss surface converged, statuses: {'unidentified':" in shown.text
    assert shown.json["data"]["archs"] == [] and len(shown.json["data"]["runs"]["run_id"]) > 50


def test_data_sheets_stand_in_for_devices_that_were_not_measured():
    alone = study_runtimes(None, "nowhere")
    assert all(runtime.assumed for runtime in alone) and alone[0].device == "H100"
    measured = study_runtimes(runtime_table(), "here")
    assert measured[0].device == DEVICE and "H100" not in [runtime.device for runtime in measured]
    assert [runtime.assumed for runtime in measured] == [False] + [True] * (len(measured) - 1)


def test_the_command_writes_the_page_of_a_study(tmp_path, capsys):
    """The same bytes whenever it is called."""
    write_study(tmp_path / "laptop")
    assert run_command(["explore", "study=laptop", "--results", str(tmp_path)]) == 0
    target = tmp_path / "laptop" / "explorer.html"
    assert capsys.readouterr().out.strip() == str(target)
    text = target.read_text()
    assert Elements(text).json["data"]["study"]["laws"] == f"{tmp_path.name}/laptop/fits"
    assert run_command(["explore", "study=laptop", "--results", str(tmp_path), "--out", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").read_text() == text


def test_the_command_says_what_is_missing(tmp_path, capsys, monkeypatch):
    assert run_command(["explore", "study=smoke", "--results", str(tmp_path)]) == 1
    assert "run the stages `runs` and `fit` of this study first" in capsys.readouterr().err
    for name in ("bokeh", "bokeh.embed", "bokeh.models", "bokeh.plotting", "bokeh.resources"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("page", "plots"):
        monkeypatch.delitem(sys.modules, f"xlstm_scaling.explorer.{name}")
    assert run_command(["explore", "study=smoke", "--results", str(tmp_path)]) == 1
    assert "drawn by Bokeh" in capsys.readouterr().err
