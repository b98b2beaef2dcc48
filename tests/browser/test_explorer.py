"""The explorer in a browser: it answers as the planner does, whatever is moved, typed, or in its address."""

import json
import math
import shlex
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "explorer"))
from explorer_study import ALL_SURFACES, BASE, write_study

from xlstm_scaling.cli import _parser
from xlstm_scaling.explorer.data import study_data
from xlstm_scaling.explorer.page import write_page
from xlstm_scaling.planning.laws import load_laws
from xlstm_scaling.planning.question import Question
from xlstm_scaling.planning.recommend import recommend
from xlstm_scaling.planning.runtime import load_runtime

pytestmark = pytest.mark.browser
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LOCAL = ("file:", "data:", "blob:")
#: relative; both compute in float64, and differ in rounding
TOLERANCE = 1e-9
PATIENCE_MS = 300_000
#: settings of the page, and what `xlstm-scaling recommend` is asked for the same
VIEWS = [
    ({}, {"flops": 1e20, "context_length": BASE}, None),
    (
        {"budget": "3e21", "context": "11000", "batch": "4"},
        {"flops": 3e21, "context_length": 11000, "batch_size": 4},
        None,
    ),
    (
        {"budget": "2e21", "context": "16k", "ttft": "300 ms", "batch": "8", "generate": "100", "step": "20 ms"},
        {"flops": 2e21, "context_length": 16000, "batch_size": 8, "generate_length": 100}
        | {"max_ttft_s": 0.3, "max_step_time_s": 0.02},
        None,
    ),
    (
        {"budget": "1e21", "context": "8192", "prompt": "3001", "served": "2T", "memory": "3 GB", "generate": "17"},
        {"flops": 1e21, "context_length": 8192, "prefill_length": 3001, "tokens_served": 2e12, "generate_length": 17}
        | {"max_serving_bytes": 3e9},
        None,
    ),
    (
        {"budget": "1e21", "context": "100000", "ttft": "1e-7", "step": "1 ms"},
        {"flops": 1e21, "context_length": 100000, "max_ttft_s": 1e-7, "max_step_time_s": 1e-3},
        None,
    ),
    (
        {"budget": "5e20", "context": "4096", "times": "A100", "ttft": "0.1"},
        {"flops": 5e20, "context_length": 4096, "max_ttft_s": 0.1},
        "A100",
    ),
]
ANSWER = """() => JSON.stringify(Explorer.app.answer, (key, value) =>
  ["drawn", "pools"].includes(key) ? undefined : typeof value === "number" && !Number.isFinite(value) ? null : value)"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("results") / "planted")


@pytest.fixture(scope="module")
def html(study):
    write_page(study_data(study, "Planted laws"), study / "explorer.html")
    return study / "explorer.html"


def ready(page):
    page.set_default_timeout(PATIENCE_MS)
    page.wait_for_selector("html[data-ready]", state="attached")
    return page


@pytest.fixture(scope="module")
def desk(browser, html):
    """The page on a desktop, opened once, and what it complained of or asked a network for."""
    context = browser.new_context(viewport=DESKTOP, offline=True, color_scheme="light")
    page, complaints = context.new_page(), []
    page.set_default_timeout(PATIENCE_MS)
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith(LOCAL) else complaints.append(one.url))
    page.goto(html.resolve().as_uri())
    yield ready(page), complaints
    context.close()


@pytest.fixture
def page(desk):
    """That page, with all settings as at first; afterwards nothing was complained of, and nothing is too wide."""
    page, complaints = desk
    page.evaluate("document.getElementById('reset').click()")
    settle(page)
    yield page
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def settle(page):
    """Until everything that was asked for is drawn."""
    page.wait_for_function("() => Explorer.app.pending.size === 0 && Explorer.app.timer === null")


def answer(page):
    settle(page)
    return json.loads(page.evaluate(ANSWER))


def fill(page, settings):
    for key, text in settings.items():
        if key == "times":
            page.select_option("#set-times", text)
            continue
        page.fill(f"#set-{key}", text)
        page.press(f"#set-{key}", "Tab")


def same(found, expected, where):
    if isinstance(expected, dict):
        for name, part in expected.items():
            same(found[name], part, f"{where}.{name}")
    elif isinstance(expected, (int, float)) and found is not None:
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=1e-12), where
    else:
        assert found == expected, where


def pixel(page, figure, x, y):
    """Where a point of a figure is on the screen."""
    page.evaluate(f"document.getElementById('{figure}').scrollIntoView({{block: 'center'}})")
    return page.evaluate(
        """([figure, x, y]) => {
          const view = Explorer.app.plots[figure], box = view.canvas_view.el.getBoundingClientRect();
          return [box.left + view.frame.x_scale.compute(x), box.top + view.frame.y_scale.compute(y)];
        }""",
        [figure, x, y],
    )


def test_it_answers_as_the_planner_does(page, study):
    laws = load_laws(study / "fits")
    for settings, asked, device in VIEWS:
        page.click("#reset")
        fill(page, settings)
        found = answer(page)
        runtime = load_runtime(None, device, study / "inference")
        expected = recommend(Question(**asked), laws, runtime)
        assert [part["arch"] for part in found["parts"]] == sorted(
            ALL_SURFACES, key=lambda arch: ["xlstm", "transformer", "hybrid"].index(arch)
        )
        for part in found["parts"]:
            wanted, where = expected["architectures"][part["arch"]], f"{settings} {part['arch']}"
            assert part["status"] == wanted["status"], where
            same(part["optimum"], wanted["optimum"], where)
            for name in ("num_params", "num_tokens", "loss"):
                same(part["isoflop_optimum"][name], wanted["isoflop_optimum"][name], where)
            model = wanted["choice"]
            assert (part["choice"] is None) == (model is None), where
            if model:
                names = ("num_params", "num_tokens", "tokens_per_param", "loss", "training_flops", "serving_flops")
                for name in (*names, "total_flops", "ttft_s", "step_time_s"):
                    same(part["choice"][name], model[name], f"{where} {name}")
                same(part["choice"]["serving_bytes"], model["serving_memory_bytes"]["total"], where)
                seen = [(entry["quantity"], entry["side"]) for entry in model["extrapolation"]]
                assert [(one["quantity"], one["side"]) for one in part["choice"]["extrapolation"]] == seen, where
            if wanted["cost_of_limits"]:
                for name in ("loss", "flops_ratio", "binding"):
                    same(part["cost_of_limits"][name], wanted["cost_of_limits"][name], where)
            if wanted["status"] == "infeasible":
                assert part["infeasible"]["binding"] == wanted["infeasible"]["binding"], where
                for name, entry in wanted["infeasible"]["nearest"].items():
                    same(part["infeasible"]["nearest"][name]["needed"], entry["needed"], where)
                same(part["infeasible"]["jointly"]["factor"], wanted["infeasible"]["jointly"]["factor"], where)
        if expected["comparison"]:
            assert found["comparison"]["best"] == expected["best"]
            for name, value in expected["comparison"].items():
                same(found["comparison"][name], value, f"{settings} {name}")


def test_the_table_shows_the_answer(page):
    page.evaluate("location.hash = '#budget=2e21&context=2048&ttft=0.08'")
    page.wait_for_function("() => Explorer.app.settings.ttft === 0.08")
    found = answer(page)
    assert page.input_value("#set-ttft") == "80 ms" and page.input_value("#set-budget") == "2e21"
    for part in found["parts"]:
        cell = page.inner_text(f"tr[data-row=loss] td[data-arch={part['arch']}]")
        loss = part["choice"]["loss"]
        assert cell.split("\n")[0].split()[0] == f"{loss['value']:.3f}"
        assert f"[{loss['lo']:.3f}, {loss['hi']:.3f}]" in cell
        assert part["choice"]["ttft_s"] <= 0.08
        shown = page.inner_text(f"tr[data-row=ttft_s] td[data-arch={part['arch']}]")
        assert float(shown.split()[0]) == pytest.approx(1e3 * part["choice"]["ttft_s"], rel=5e-3)
    assert found["comparison"]["best"] in {"xlstm", "transformer", "hybrid"}


def test_sliders_move_the_optimum(page):
    before = answer(page)
    page.focus("#set-budget-slider")
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    after = answer(page)
    assert after["asked"]["flops"] > 1.5 * before["asked"]["flops"]
    for old, new in zip(before["parts"], after["parts"]):
        assert new["optimum"]["num_params"]["value"] > old["optimum"]["num_params"]["value"]
        assert new["choice"]["loss"]["value"] < old["choice"]["loss"]["value"]
    drawn = page.evaluate("Explorer.app.views.source('surface', 'best xlstm').data.x[0]")
    assert drawn == pytest.approx(after["parts"][0]["optimum"]["num_params"]["value"], rel=1e-12)
    page.focus("#set-ttft-slider")
    page.keyboard.press("Home")
    limited = answer(page)
    assert {part["status"] for part in limited["parts"]} == {"infeasible"}
    page.locator("#answer button[data-limit=ttft]").first.click()
    assert "ok" in {part["status"] for part in answer(page)["parts"]}


def test_a_mistyped_value_is_refused_beside_its_field(page):
    before = answer(page)
    page.fill("#set-budget", "a lot")
    page.press("#set-budget", "Tab")
    assert "not a positive number" in page.inner_text(".problem:not(:empty)")
    assert answer(page)["asked"] == before["asked"]


def test_hovering_over_a_run_shows_its_configuration(page):
    data = page.evaluate(
        "(({run_id, num_params, num_tokens}) => [run_id[0], num_params[0], num_tokens[0]])(Explorer.app.data.runs)"
    )
    run, size, tokens = data
    x, y = pixel(page, "surface", size, tokens)
    page.mouse.move(x - 30, y - 30)
    page.mouse.move(x, y, steps=4)
    page.wait_for_selector(".bk-Tooltip .run", state="attached")
    shown = "".join(page.locator(".bk-Tooltip .run").all_inner_texts())
    assert run in shown and "learning rate 0.001" in shown and "batch 512" in shown and "nat/token" in shown
    assert "tokens per parameter" in page.inner_text("#probe")


def test_a_click_on_the_surface_takes_its_budget(page):
    x, y = pixel(page, "surface", 1e9, 1e11)
    page.mouse.click(x, y)
    page.wait_for_function("() => location.hash.includes('budget=')")
    assert answer(page)["asked"]["flops"] == pytest.approx(6e20, rel=0.5)


def test_the_address_restores_the_view(page):
    fill(page, {"budget": "7e20", "context": "5000", "batch": "3", "served": "1e12", "ttft": "0.2"})
    page.select_option("#set-surface", "transformer")
    page.uncheck("#show-xlstm")
    x, y = pixel(page, "surface", 1e9, 1e11)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 80, y + 40, steps=5)
    page.mouse.up()
    page.wait_for_function("() => location.hash.includes('view=')")
    left = (
        answer(page),
        page.evaluate("[Explorer.app.settings, Explorer.app.views.range()]"),
        page.evaluate("location.hash"),
    )
    page.reload()
    ready(page)
    assert page.evaluate("location.hash") == left[2]
    settings, ranges = page.evaluate("[Explorer.app.settings, Explorer.app.views.range()]")
    assert answer(page) == left[0]
    assert {name: value for name, value in settings.items() if name != "view"} == {
        name: value for name, value in left[1][0].items() if name != "view"
    }
    assert ranges == pytest.approx(left[1][1], rel=1e-4)
    assert not page.evaluate("Explorer.app.views.renderer('surface', 'best:xlstm').visible")
    page.evaluate("location.hash = '#budget=9e19&context=2048&batch=-3&view=a,b&times=nothing'")
    page.wait_for_function("() => Explorer.app.settings.budget === 9e19")
    assert answer(page)["asked"]["load"] == {"prompt": 2048, "generate": 1, "batch": 1}


def test_the_copied_command_asks_the_same(page):
    for settings, asked, device in VIEWS:
        page.click("#reset")
        fill(page, settings)
        settle(page)
        words = shlex.split(page.evaluate("Explorer.command(Explorer.app.settings, Explorer.app.data)"))
        options = vars(_parser().parse_args(words[1:]))
        given = {
            name: options[name] for name in ("flops", "context_length", "batch_size", "prefill_length", "max_ttft_s")
        }
        wanted = {"batch_size": 1, "prefill_length": None, "max_ttft_s": None} | asked
        assert given == {name: wanted[name] for name in given}
        for name in ("tokens_served", "generate_length", "max_step_time_s", "max_serving_bytes"):
            assert options[name] == asked.get(name, {"tokens_served": 0, "generate_length": 1}.get(name))
        assert options["device"] == device and options["laws"].parts[-2:] == ("planted", "fits")
    page.click("#copy-command")
    page.wait_for_function("() => document.getElementById('copied').textContent.includes('xlstm-scaling recommend')")


def test_figures_are_saved(page):
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<svg")):
        with page.expect_download() as waiting:
            page.click(f".export[data-plot=surface] button[data-kind={kind}]")
        content = Path(waiting.value.path()).read_bytes()
        assert content.lstrip()[: len(start)] == start and len(content) > 10_000
        assert waiting.value.suggested_filename == f"explorer-planted-surface.{kind}"


def test_a_phone_and_both_themes(open_page, html):
    opened = open_page(html, viewport=PHONE, color_scheme="dark", has_touch=True)
    page = ready(opened.page)

    def brightness():
        colour = page.evaluate("Explorer.app.views.figures.surface.background_fill_color")
        return sum(int(colour[at : at + 2], 16) for at in (1, 3, 5)) / 3

    assert brightness() < 60
    assert page.evaluate("getComputedStyle(document.querySelector('main')).gridTemplateColumns.split(' ').length") == 1
    page.emulate_media(color_scheme="light")
    settle(page)
    assert brightness() > 200
    for kind in ("light", "dark"):
        page.evaluate("document.getElementById('theme').click()")
        assert page.evaluate("document.documentElement.dataset.theme") == kind
    assert opened.overflow() <= 0 and opened.errors == [] and opened.requests == []


def test_a_curve_is_the_best_loss_of_every_budget(page, study):
    laws = load_laws(study / "fits")
    fill(page, {"ttft": "50 ms"})
    settle(page)
    read = "(({x, y, lo, hi}) => ({x: [...x], y: [...y], lo: lo && [...lo], hi: hi && [...hi]}))"
    curve = page.evaluate(f"{read}(Explorer.app.views.source('curve', 'curve transformer').data)")
    runtime = load_runtime(None, None, study / "inference")
    for i in (0, len(curve["x"]) // 2, len(curve["x"]) - 1):
        asked = Question(BASE, flops=curve["x"][i], max_ttft_s=0.05)
        loss = recommend(asked, laws, runtime)["architectures"]["transformer"]["choice"]["loss"]
        found = {"value": curve["y"][i], "lo": curve["lo"][i], "hi": curve["hi"][i]}
        same(found, loss, f"budget {curve['x'][i]}")
    times = page.evaluate(f"{read}(Explorer.app.views.source('ttft', 'ttft transformer').data)")["y"]
    assert times == sorted(times) and all(math.isfinite(value) for value in times)


def test_without_a_law_there_is_a_message_and_the_runs(open_page, tmp_path):
    write_page(study_data(write_study(tmp_path / "flat", converged=False), "No law"), tmp_path / "flat.html")
    opened = open_page(tmp_path / "flat.html")
    page = ready(opened.page)
    assert "There is no law to explore" in page.inner_text("#missing")
    assert page.evaluate("Explorer.app.views.source('surface', 'runs xlstm').data.N_params.length") > 10
    assert opened.overflow() <= 0 and opened.errors == [] and opened.requests == []
