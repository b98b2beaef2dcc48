"""Size and speed of the explorer's page of a study, in a headless Chromium; the last line is JSON.

    python benchmarks/explorer.py results/laptop [--chromium PATH] [--loads 5]

First paint, the answer and the figures are milliseconds from the start of navigation to a local file (median, worst);
`answer_ms` is the time to compute an answer after the budget, or the context, has moved.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

MARKS = """() => {
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  const at = (name) => performance.getEntriesByName(name)[0].startTime;
  return {first_paint_ms: paint ? paint.startTime : null, answer_ms: at("answer"), figures_ms: at("figures")};
}"""
MOVES = """() => {
  const { app } = Explorer, times = { budget: [], context: [] };
  if (!app.archs.length) return times;
  for (let i = 0; i < 20; i++) {
    for (const key of Object.keys(times)) {
      app.settings[key] = key === "budget" ? app.settings[key] * 1.01 : app.settings[key] + 1;
      const start = performance.now();
      app.compute();
      times[key].push(performance.now() - start);
    }
  }
  return times;
}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("--chromium", help="the browser (default: $CHROMIUM, or the one on PATH)")
    parser.add_argument("--loads", type=int, default=5, help="how often the page is opened (default: 5)")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    from xlstm_scaling.explorer.data import study_data
    from xlstm_scaling.explorer.page import write_page

    chromium = args.chromium or os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        print("no Chromium: name it by --chromium", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "explorer.html"
        write_page(study_data(args.study, args.study.name), path)
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        loads = []
        for _ in range(args.loads):
            context = browser.new_context(offline=True)
            page = context.new_page()
            page.set_default_timeout(120_000)
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            loads.append(page.evaluate(MARKS))
            moves = page.evaluate(MOVES)
            context.close()
        browser.close()
        result = {"benchmark": "explorer", "study": args.study.name, "bytes": path.stat().st_size, "loads": args.loads}
    for name in loads[0]:
        values = [load[name] for load in loads if load[name] is not None]
        result |= {name: round(statistics.median(values), 1), f"{name}_worst": round(max(values), 1)} if values else {}
    for name, values in moves.items():
        result[f"answer_after_{name}_ms"] = round(statistics.median(values), 1) if values else None
    result |= {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    for name, value in result.items():
        print(f"{name:28s} {value}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
