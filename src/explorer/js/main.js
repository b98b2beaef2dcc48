// The page: settings in, answer out; one computation a frame, however fast a slider moves.
(function (X) {
  "use strict";
  const REST_MS = 200;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);

  X.App = class {
    constructor(data) {
      this.data = data;
      this.archs = data.archs.map((arch) => new X.Arch(arch, data.smoothing));
      this.runtimes = data.runtimes.map((runtime) => new X.Runtime(runtime, data.terms));
      this.defaults = X.defaults(data);
      this.settings = X.parseFragment(location.hash, this.defaults, data);
      this.pending = new Set();
      this.timer = null;
    }

    get runtime() {
      return this.runtimes.find((one) => one.device === this.settings.times) ?? null;
    }

    get link() {
      return `${location.href.split("#")[0]}#${X.fragment(this.settings, this.defaults)}`;
    }

    start() {
      this.theme = new X.Theme(document.getElementById("theme"), () => this.redraw("theme"));
      const form = document.getElementById("controls");
      const specs = this.archs.length ? X.controls(this.data, this.archs, this.runtimes[0] ?? null) : [];
      const actions = { "Copy link": ["copy-link", () => X.copy(this.link)], Reset: ["reset", () => this.take({ ...this.defaults, hide: [] })] };
      if (this.archs.length) actions["Copy command"] = ["copy-command", () => X.copy(X.command(this.settings, this.data))];
      this.form = new X.Form(form, this.data, specs, (key, value) => this.change(key, value), actions);
      this.form.show(this.settings);
      this.compute();
      addEventListener("hashchange", () => {
        if (location.hash.replace(/^#/, "") !== X.fragment(this.settings, this.defaults)) {
          this.take(X.parseFragment(location.hash, this.defaults, this.data));
        }
      });
    }

    async plot(items) {
      Bokeh.set_log_level("error"); // the sources are empty until there are figures
      const figures = {};
      this.plots = {};
      for (const [name, item] of Object.entries(items)) {
        const views = await Bokeh.embed.embed_item(item, name);
        const view = views.roots[0];
        figures[name] = view.model;
        this.plots[name] = view;
        this.exports(name, view);
      }
      this.views = new X.Views(figures, this.data, this.archs);
      const coarse = matchMedia("(pointer: coarse)").matches, narrow = matchMedia("(max-width: 860px)").matches;
      for (const [name, fig] of Object.entries(figures)) {
        if (coarse) fig.toolbar.active_drag = null; // a finger scrolls the page until a tool is taken
        if (narrow && name === "surface") fig.height = 400;
      }
      this.views.fit(this.answer, this.settings);
      this.listen(figures.surface);
      this.draw(new Set(["theme", "runs", "losses", "answer"]));
      performance.mark("figures");
      document.documentElement.dataset.ready = "true";
    }

    exports(name, view) {
      const save = async (kind) => {
        const blob = await view.export(kind).to_blob();
        const link = X.element("a", { href: URL.createObjectURL(blob), download: `explorer-${this.data.study.name}-${name}.${kind}` });
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      };
      const bar = document.querySelector(`.export[data-plot="${name}"]`);
      for (const kind of ["png", "svg"]) {
        bar.append(X.element("button", { type: "button", "data-kind": kind, on: { click: () => save(kind) } }, `Save ${kind.toUpperCase()}`));
      }
    }

    // the reader's hand on the surface
    listen(fig) {
      const moved = () => {
        if (this.fitting) return;
        const range = this.views.range();
        const same = (other) => other.every((value, i) => Math.abs(Math.log(value / range[i])) < 1e-6);
        this.settings.view = same(this.views.home) ? null : range;
        this.redraw("losses", "address");
      };
      for (const range of [fig.x_range, fig.y_range]) for (const end of ["start", "end"]) range.properties[end].change.connect(moved);
      if (!this.archs.length) return;
      fig.on_event("mousemove", ({ x, y }) => {
        if (x > 0 && y > 0) document.getElementById("probe").textContent = this.views.probe(x, y, this.answer);
      });
      fig.on_event("tap", ({ x, y }) => {
        const at = this.archs.findIndex((arch) => arch.id === this.settings.surface);
        if (x > 0 && y > 0) this.change("budget", Number(X.flopsAt(this.answer.pools[at], x, y).toPrecision(3)));
      });
    }

    change(key, value) {
      this.settings[key] = value;
      this.take(this.settings, key);
    }

    take(settings, key = null) {
      this.settings = settings;
      this.form.show(settings);
      const drawn = { hide: ["theme"], surface: ["theme", "losses"], only: ["runs"] }[key];
      this.redraw("address", ...(drawn ?? ["answer", "runs", "losses", "theme"]));
    }

    redraw(...what) {
      if (!this.pending.size) requestAnimationFrame(() => this.frame());
      what.forEach((one) => this.pending.add(one));
    }

    frame() {
      const what = this.pending;
      this.pending = new Set();
      if (what.has("answer")) this.compute();
      else if (what.has("theme")) this.readout();
      if (this.views) {
        if (what.has("answer")) {
          this.fitting = true;
          this.views.fit(this.answer, this.settings);
          this.fitting = false;
        }
        this.draw(what);
      }
      if (what.has("address")) this.address();
    }

    // browsers allow few changes of the address in a time: once the reader rests
    address() {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => {
        this.timer = null;
        history.replaceState(null, "", `#${X.fragment(this.settings, this.defaults)}`);
      }, REST_MS);
    }

    compute() {
      if (!this.archs.length) return;
      this.answer = X.answer(X.asked(this.settings, this.runtime), this.archs, this.runtime, this.data.confidence);
      this.readout();
    }

    readout() {
      if (!this.answer) return;
      const colours = Object.fromEntries(this.archs.map((arch) => [arch.id, this.theme.of(arch.colour)]));
      X.showAnswer(this.answer, this.archs, this.data.styles, this.runtime, this.data.notes, colours, (key, value) => this.change(key, X.enough(value)));
      document.getElementById("sources").textContent = [
        `Laws: ${this.archs.map((arch) => `${arch.name} ${arch.subset}, ${arch.form}`).join("; ")}; intervals ${100 * this.data.confidence} %.`,
        this.runtime ? `Times: ${this.runtime.about}.` : "No times: this study has no runtime model.",
      ].join(" ");
    }

    draw(what) {
      if (what.has("theme")) this.views.paint(this.theme, this.settings);
      if (what.has("runs")) this.views.showRuns(this.settings);
      if (what.has("losses")) this.views.drawLosses(this.settings);
      if (!what.has("answer") || !this.answer) return;
      this.views.drawOptima(this.answer);
      this.views.drawTimes(this.answer, this.runtime);
      this.views.drawCurve(this.answer, this.runtime);
    }
  };

  // a limit that a value keeps: rounded up to three digits
  X.enough = function (value) {
    const unit = Math.pow(10, Math.floor(Math.log10(value)) - 2);
    return Number((Math.ceil(value / unit - 1e-9) * unit).toPrecision(3));
  };

  X.begin = async function () {
    X.app = new X.App(read("data"));
    if (!X.app.archs.length) document.getElementById("answer").replaceChildren();
    X.app.start();
    performance.mark("answer");
    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve))); // the answer is there first
    await X.app.plot(read("plots"));
  };
  if (typeof document !== "undefined") X.begin();
})((globalThis.Explorer ??= {}));
