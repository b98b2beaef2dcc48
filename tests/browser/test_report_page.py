"""The report page in a real browser: nothing comes from a network, nothing is too wide, what can be used works."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "report"))
from conftest import PHONE
from page_study import CAPTIONS, CONFIG, make_ledger, make_study

from xlstm_scaling.report.page.write import write_page
from xlstm_scaling.study.files import write_table

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The page of a synthetic study of published runs, so that it has claims."""
    paths = make_study(tmp_path_factory.mktemp("browser") / "results", "planted-published")
    write_table(make_ledger(), paths.claims / "claims")
    (paths.study / "runs.provenance.json").write_text('{"sources": []}')
    return write_page(paths, CONFIG, CAPTIONS, published=True, inference=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_errors_network_or_sideways_scrolling(report, open_page, scheme):
    opened = open_page(report, viewport=PHONE, color_scheme=scheme)
    assert opened.overflow() <= 0
    opened.page.evaluate("document.querySelectorAll('details').forEach(box => { box.open = true })")
    assert opened.overflow() <= 0
    assert opened.errors == [] and opened.requests == []
    # the answer is on the first screen
    place = opened.page.locator(".headline .verdict").bounding_box()
    assert place["y"] + place["height"] < PHONE["height"] / 2
    broken = "[...document.images].filter(image => !image.complete || image.naturalWidth === 0).length"
    assert opened.page.evaluate(broken) == 0


def brightness(page) -> float:
    """Of the paper, 0 to 255."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]) / 3


def test_light_and_dark_follow_the_system_until_the_switch_is_used(report, open_page):
    light, dark = (open_page(report, color_scheme=scheme).page for scheme in ("light", "dark"))
    assert brightness(light) > 200 > 60 > brightness(dark)
    # figures are drawn for white paper
    card = "getComputedStyle(document.querySelector('.canvas')).backgroundColor"
    assert dark.evaluate(card) == light.evaluate(card) == "rgb(255, 255, 255)"
    dark.locator("#theme").focus()
    dark.keyboard.press("Enter")
    assert brightness(dark) > 200
    dark.reload()
    assert brightness(dark) > 200
    assert dark.locator("#theme").get_attribute("aria-pressed") == "false"


def test_claims_can_be_filtered(report, open_page):
    page = open_page(report).page
    page.locator("#ledger > summary").click()
    rows = page.locator("table.claims tbody tr:visible")
    assert rows.count() == 10
    page.locator("#claim-verdict").select_option("not reproduced")
    assert rows.count() == 1 and page.locator("#claim-count").text_content() == "1 of 10 claims"
    page.locator("#claim-verdict").select_option("")
    page.locator("#claim-words").fill("PLANTED 3")  # rows with all of the words
    left = [text.lower() for text in rows.all_text_contents()]
    assert 0 < len(left) < 10 and all("planted" in text and "3" in text for text in left)
    assert any("number 3 of" in text for text in left)
    page.locator("#claim-words").fill("no such words")
    assert rows.count() == 0


def test_a_number_leads_to_its_file_and_a_claim_opens_the_ledger(report, open_page):
    page = open_page(report).page
    page.locator(".headline .number").first.click()
    entry = page.locator("#from-fits-pareto_ratio")
    assert "fits/pareto_ratio.csv" in entry.text_content()
    assert entry.is_visible()
    page.locator(".reasons a").first.click()
    assert page.locator("#ledger").get_attribute("open") is not None
    assert page.locator("tr:target").is_visible()


def test_the_citation_can_be_copied(report, open_page):
    page = open_page(report, permissions=["clipboard-read", "clipboard-write"]).page
    page.locator("button.copy").click()
    page.wait_for_function("document.querySelector('button.copy').textContent !== 'Copy'")
    assert "2510.02228" in page.locator("#bibtex").text_content()


def test_without_scripts_everything_can_be_read(report, open_page):
    opened = open_page(report, javascript=False)
    assert opened.page.locator("h2").count() >= 10
    assert not opened.page.locator("form.filter").is_visible() and not opened.page.locator("#theme").is_visible()
    opened.page.locator("#ledger > summary").click()
    assert opened.page.locator("table.claims tbody tr:visible").count() == 10


def test_it_prints_opened_without_configurations_or_wide_tables(report, open_page, tmp_path):
    page = open_page(report).page
    page.pdf(path=tmp_path / "report.pdf", format="A4", prefer_css_page_size=True)
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF") and content.count(b"/Type /Page\n") + content.count(b"/Type/Page") >= 4
    page.emulate_media(media="print")
    assert not page.locator(".contents").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    opened = page.locator("details[open]").count()
    assert opened == page.locator("details:not(.settings)").count() > 0
    for table in page.locator("details.table").all():
        wide = "wide" in table.get_attribute("class").split()
        assert table.locator("table").is_visible() != wide
        assert table.locator(".paper").is_visible() == wide
        # nothing is cut off at the edge of the paper
        assert wide or table.locator("table").evaluate("x => x.scrollWidth <= document.documentElement.clientWidth")
    assert brightness(page) > 250
