// The figures: what their sources hold for an answer, and what the reader points at.
(function (X) {
  "use strict";
  const CURVE_POINTS = 32, TIME_POINTS = 40, LEVELS = 12;
  const LEAST_SPAN = 10;
  const BEYOND = 100; // the curve goes on to this multiple of the largest budget measured

  X.Views = class {
    // figures: name -> Bokeh's figure; archs: with laws
    constructor(figures, data, archs) {
      Object.assign(this, { figures, data, archs });
      const { x_range, y_range } = figures.surface;
      this.home = [x_range.start, x_range.end, y_range.start, y_range.end];
      this.image = this.source("surface", "losses").data.image[0]; // written in place
      this.curves = new Map();
    }

    source(figure, name) {
      return this.figures[figure].document.get_model_by_name(name);
    }

    renderer(figure, name) {
      return this.figures[figure].renderers.find((one) => one.name === name);
    }

    // colours of all lines and points, by the theme
    paint(theme, settings) {
      for (const [name, fig] of Object.entries(this.figures)) {
        theme.paint(fig);
        for (const one of fig.renderers) {
          const [kind, arch] = (one.name || "").split(":"), style = this.data.styles[arch];
          if (kind === "limit") one.glyph.line_color = theme.colours.warn;
          if (!style) continue;
          const colour = theme.of(style.colour);
          if (kind === "band") one.glyph.fill_color = colour;
          else one.glyph.line_color = ["best"].includes(kind) || (kind === "chosen" && name !== "surface") ? theme.colours.page : colour;
          if (["runs", "best", "chosen"].includes(kind)) one.glyph.fill_color = colour;
          if (kind === "runs") one.hover_glyph.line_color = theme.colours.ink;
          one.visible = !settings.hide.includes(arch);
        }
      }
      this.renderer("surface", "text").glyph.text_color = theme.colours.soft;
      this.source("curve", "budget").line_color = theme.colours.soft;
      const arch = this.archs.find((one) => one.id === settings.surface);
      if (arch) this.source("surface", "palette").palette = theme.palette(arch.colour);
      for (const one of this.archs) {
        const { glyph } = this.renderer("surface", `contours:${one.id}`), focus = one.id === settings.surface;
        glyph.line_alpha = focus ? 0.9 : 0.55;
        glyph.line_dash = focus ? [] : [2, 4];
      }
    }

    // the points of the runs: those of other contexts are pale, or left out
    showRuns(settings) {
      const { runs, styles } = this.data, known = this.archs.length > 0;
      const found = Object.fromEntries(Object.keys(styles).map((arch) => [arch, []]));
      runs.run_id.forEach((_, i) => {
        const here = !known || runs.context_length[i] === settings.context;
        if (runs.arch[i] in found && runs.num_params[i] && runs.num_tokens[i] && (here || !settings.only)) found[runs.arch[i]].push([i, here]);
      });
      for (const [arch, rows] of Object.entries(found)) {
        const column = (of) => rows.map(([i, here]) => of(i, here));
        const data = {
          N_params: column((i) => runs.num_params[i]), D_tokens: column((i) => runs.num_tokens[i]),
          H_flops: column((i) => runs.num_flops[i] ?? NaN), val_loss: column((i) => runs.val_loss[i] ?? NaN),
          alpha: column((i, here) => (here ? 0.75 : 0.22)), run_id: column((i) => runs.run_id[i]),
          arch_name: column(() => styles[arch].name), context: column((i) => X.count(runs.context_length[i] ?? NaN)),
          set: column((i) => runs.experiment_set[i]), status: column((i) => (runs.status[i] === "ok" ? "" : runs.status[i])),
          N: column((i) => X.si(runs.num_params[i])), D: column((i) => X.si(runs.num_tokens[i])),
          H: column((i) => X.flops(runs.num_flops[i] ?? NaN)), loss: column((i) => (runs.val_loss[i] === null ? "none" : runs.val_loss[i].toFixed(4))),
          rate: column((i) => (runs.learning_rate[i] === null ? "unknown" : String(Number(runs.learning_rate[i].toPrecision(3))))),
          batch: column((i) => (runs.batch[i] === null ? "unknown" : X.count(runs.batch[i]))),
        };
        for (const name of ["surface", "curve"]) this.source(name, `runs ${arch}`).data = data;
      }
    }

    // what the surface shows: the reader's view, else the runs and the optima
    fit(answer, settings) {
      let [x0, x1, y0, y1] = settings.view ?? this.home;
      if (!settings.view) {
        for (const part of answer ? answer.parts : []) {
          const { num_params: N, num_tokens: D } = part.choice ? { num_params: { value: part.choice.num_params }, num_tokens: part.choice.num_tokens } : part.optimum;
          if (!(N.value > 0 && D.value > 0)) continue;
          [x0, x1, y0, y1] = [Math.min(x0, N.value / 2), Math.max(x1, N.value * 2), Math.min(y0, D.value / 2), Math.max(y1, D.value * 2)];
        }
      }
      const { x_range, y_range } = this.figures.surface;
      x_range.setv({ start: x0, end: x1, reset_start: this.home[0], reset_end: this.home[1] });
      y_range.setv({ start: y0, end: y1, reset_start: this.home[2], reset_end: this.home[3] });
    }

    range() {
      const { x_range, y_range } = this.figures.surface;
      return [x_range.start, x_range.end, y_range.start, y_range.end];
    }

    // colours of one architecture's losses, and curves of equal loss of all, over what is visible
    drawLosses(settings) {
      const arch = this.archs.find((one) => one.id === settings.surface);
      if (!arch) return;
      const [x0, x1, y0, y1] = this.range(), [rows, columns] = this.image.shape;
      const c = arch.surface.factors(settings.context)[0], values = new Float64Array(rows * columns);
      const step = [Math.log(x1 / x0) / columns, Math.log(y1 / y0) / rows];
      for (let i = 0; i < rows; i++) {
        for (let j = 0; j < columns; j++) {
          values[i * columns + j] = arch.surface.loss(0, Math.log(x0) + (j + 0.5) * step[0], Math.log(y0) + (i + 0.5) * step[1], c);
        }
      }
      const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
      // losses crowd at their floor: colours and curves are even in the logarithm of what lies above it
      const floor = low - 0.02 * low, scale = (value) => Math.log(value - floor), ends = [scale(low), scale(high)];
      this.image.set(values.map((value) => (scale(value) - ends[0]) / (ends[1] - ends[0])));
      this.source("surface", "losses").data = { image: [this.image], x: [x0], y: [y0], dw: [x1 - x0], dh: [y1 - y0] };
      const levels = X.levels(X.range(LEVELS, (i) => floor + Math.exp(ends[0] + ((i + 0.7) / LEVELS) * (ends[1] - ends[0]))));
      for (const one of this.archs) {
        const lines = levels.map((level) => one.surface.isoLine(level, settings.context)).filter(Boolean);
        const clip = (values, from, to) => values.map((value) => Math.min(Math.max(value, from / 1e3), to * 1e3));
        this.source("surface", `contours ${one.id}`).data = { xs: lines.map(({ N }) => clip(N, x0, x1)), ys: lines.map(({ D }) => clip(D, y0, y1)) };
      }
      this.label(arch, levels, settings);
    }

    // a curve's loss where it leaves the view, to the right or at the top
    label(arch, levels, settings) {
      const [x0, x1, y0, y1] = this.range(), data = { x: [], y: [], text: [] };
      const right = x1 * Math.pow(x0 / x1, 0.008), top = y1 * Math.pow(y0 / y1, 0.045);
      for (const level of levels) {
        const line = arch.surface.isoLine(level, settings.context, 400);
        if (!line) continue;
        let x = right, y = line.D[line.N.findLastIndex((N) => N <= right)] ?? Infinity;
        if (!(y >= y0 && y <= top)) {
          x = line.N[line.D.findLastIndex((D) => D >= top)] ?? 0;
          y = top;
        }
        if (x < x0 || x > right) continue;
        data.x.push(x); data.y.push(y); data.text.push(String(level));
      }
      this.source("surface", "labels").data = data;
    }

    // the budget's line, the optimum with its interval, the chosen model
    drawOptima(answer) {
      answer.parts.forEach((part, i) => {
        const arch = this.archs[i], pool = answer.pools[i], { smooth } = pool, { question } = answer;
        const tokens = (from, k) => X.allocation(question, arch, from, k).tokens;
        const sizes = X.range(Math.ceil(smooth.train.length / 6), (at) => Math.min(6 * at, smooth.train.length - 1));
        const line = sizes.map((k) => [smooth.num_params[k], tokens(smooth, k)]).filter(([, D]) => D >= 1 && Number.isFinite(D)).sort((a, b) => a[0] - b[0]);
        const kept = this.keptLine(pool, question, (k) => tokens(pool, k));
        this.source("surface", `isoflop ${arch.id}`).data = { x: line.map(([N]) => N), y: line.map(([, D]) => D), kept: line.map(([N, D]) => (kept(N) ? D : NaN)) };
        const { lo, hi, value } = part.optimum.num_params;
        const within = X.range(smooth.train.length, (k) => k).filter((k) => smooth.num_params[k] >= lo && smooth.num_params[k] <= hi);
        this.source("surface", `interval ${arch.id}`).data = { x: within.map((k) => smooth.num_params[k]), y: within.map((k) => tokens(smooth, k)) };
        this.source("surface", `best ${arch.id}`).data = { x: [value], y: [part.optimum.num_tokens.value] };
        const { choice } = part;
        this.source("surface", `chosen ${arch.id}`).data = choice ? { x: [choice.num_params], y: [choice.num_tokens.value] } : { x: [], y: [] };
        this.source("curve", `curve chosen ${arch.id}`).data = choice ? { x: [choice.training_flops.value], y: [choice.loss.value] } : { x: [], y: [] };
      });
      this.source("curve", "budget").location = answer.asked.flops;
    }

    // whether the nearest shape of a size keeps the limits
    keptLine(pool, question) {
      const names = Object.keys(question.limits);
      const order = X.range(pool.train.length, (k) => k).sort((a, b) => pool.num_params[a] - pool.num_params[b]);
      const sizes = order.map((k) => pool.num_params[k]);
      const kept = order.map((k) => names.every((name) => pool.quantities[name][k] <= question.limits[name]));
      return (N) => {
        let [low, high] = [0, sizes.length - 1];
        while (high - low > 1) {
          const middle = (low + high) >> 1;
          if (sizes[middle] <= N) low = middle; else high = middle;
        }
        return kept[N / sizes[low] < sizes[high] / N ? low : high];
      };
    }

    drawCurve(answer, runtime) {
      const { question } = answer, { flops, loss, served, implied, ...rest } = question;
      this.archs.forEach((arch, i) => {
        const key = JSON.stringify([arch.id, runtime ? runtime.device : "", rest]);
        if (!this.curves.has(key)) {
          if (this.curves.size > 40) this.curves.clear();
          const [low, high] = arch.ranges.num_flops ?? [question.flops / 10, question.flops];
          const curve = X.lossCurve(question, arch, answer.pools[i], X.geometric(low, BEYOND * high, CURVE_POINTS), this.data.confidence);
          this.curves.set(key, curve.filter(({ value }) => Number.isFinite(value)));
        }
        const curve = this.curves.get(key);
        this.source("curve", `curve ${arch.id}`).data = { x: curve.map((at) => at.flops), y: curve.map((at) => at.value),
          lo: curve.map((at) => (Number.isNaN(at.lo) ? at.value : at.lo)), hi: curve.map((at) => (Number.isNaN(at.hi) ? at.value : at.hi)) };
      });
    }

    // times of the chosen models over the length of the prompt
    drawTimes(answer, runtime) {
      const { load, limits } = answer.question, position = load.prompt + Math.max(load.generate - 2, 0);
      const contexts = this.archs.flatMap((arch) => arch.ranges.context_length);
      const ends = [Math.min(...contexts, load.prompt) / 4, 16 * Math.max(...contexts, load.prompt / 4)];
      const lengths = [...new Set(X.geometric(Math.max(ends[0], 1), ends[1], TIME_POINTS).map(Math.round))];
      for (const [figure, quantity, at] of [["ttft", "ttft_s", load.prompt], ["step", "step_time_s", position]]) {
        answer.parts.forEach((part, i) => {
          const arch = this.archs[i], times = { x: [], y: [] }, model = part.choice;
          if (model && runtime && Number.isFinite(model[quantity])) {
            const one = { id: arch.id, costs: arch.costs.take(model.k), shapes: { num_blocks: [model.shape.num_blocks] } };
            for (const prompt of lengths) {
              times.x.push(prompt);
              times.y.push(runtime.times(one, { prompt, generate: 1, batch: load.batch })[quantity][0]);
            }
          }
          this.source(figure, `${figure} ${arch.id}`).data = times;
          const known = model && Number.isFinite(model[quantity]);
          this.source(figure, `${figure} chosen ${arch.id}`).data = known ? { x: [at], y: [model[quantity]] } : { x: [], y: [] };
        });
        const limit = limits[quantity], shown = [...(limit === undefined ? [] : [limit])];
        for (const { id } of this.archs) shown.push(...this.source(figure, `${figure} ${id}`).data.y);
        this.show(figure, [lengths[0], lengths[lengths.length - 1]], shown);
        this.source(figure, `limit ${figure}`).data = limit === undefined ? { x: [], y: [] } : { x: [lengths[0], lengths[lengths.length - 1]], y: [limit, limit] };
      }
    }

    // the ranges of a figure of times: at least a factor of `LEAST_SPAN` upwards
    show(figure, [x0, x1], values) {
      const { x_range, y_range } = this.figures[figure];
      const low = values.length ? Math.min(...values) : 1e-3, high = values.length ? Math.max(...values) : 1;
      const margin = Math.max(1.15, Math.sqrt(LEAST_SPAN / (high / low)));
      x_range.setv({ start: x0, end: x1 });
      y_range.setv({ start: low / margin, end: high * margin });
    }

    // losses of every architecture at a point, and the FLOPs of getting there
    probe(N, D, answer) {
      const parts = this.archs.map((arch, i) => {
        const c = arch.surface.factors(answer.asked.context)[0], flops = X.flopsAt(answer.pools[i], N, D);
        return `${arch.name} ${X.loss(arch.surface.loss(0, Math.log(N), Math.log(D), c))} nat/token for ${X.flops(flops)} FLOPs`;
      });
      return `N ${X.si(N)}, D ${X.si(D)}, ${X.si(D / N)} tokens per parameter: ${parts.join("; ")}`;
    }
  };

  // training FLOPs of N parameters on D tokens, by the size nearest to N
  X.flopsAt = function (pool, N, D) {
    const { log_params, train } = pool.smooth, distance = (k) => Math.abs(log_params[k] - Math.log(N));
    let nearest = 0;
    for (let k = 1; k < train.length; k++) if (distance(k) < distance(nearest)) nearest = k;
    return D * train[nearest];
  };

  // round numbers near some ascending ones, as few digits as keep them apart
  X.levels = function (wanted) {
    const rounded = wanted.map((value, i) => {
      const gap = Math.min(i ? value - wanted[i - 1] : Infinity, i + 1 < wanted.length ? wanted[i + 1] - value : Infinity);
      const unit = Math.pow(10, Math.floor(Math.log10(gap)));
      const step = gap >= 5 * unit ? 5 * unit : gap >= 2 * unit ? 2 * unit : unit;
      return Number((Math.round(value / step) * step).toPrecision(6));
    });
    return [...new Set(rounded)];
  };
})((globalThis.Explorer ??= {}));
