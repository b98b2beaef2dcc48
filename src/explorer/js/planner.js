// The search of planning/choose.py and recommend.py: of all shapes that can be built, the best for a question.
(function (X) {
  "use strict";
  const POINTS = 1200; // sizes between the shapes, as Candidates.smooth
  const STRIDES = [64, 8, 1]; // of the looks at them, each around the best of the one before
  const ROUNDING = 1 + 1e-12;

  X.LIMITS = ["ttft_s", "step_time_s", "serving_bytes"];

  // what the page's settings ask: a load, a training budget, limits
  X.question = function (settings, runtime) {
    const limits = {};
    for (const name of X.LIMITS) if (settings.limits[name] !== null) limits[name] = settings.limits[name];
    const timed = "ttft_s" in limits || "step_time_s" in limits, implied = [];
    if (timed && !("serving_bytes" in limits) && runtime && runtime.memory_limit_bytes !== null) {
      limits.serving_bytes = runtime.memory_limit_bytes; // the model must fit the device, too
      implied.push("serving_bytes");
    }
    return {
      context: settings.context,
      flops: settings.flops,
      loss: null,
      served: settings.served,
      load: { prompt: settings.prompt ?? settings.context, generate: settings.generate, batch: settings.batch },
      limits,
      implied,
    };
  };

  X.Arch = class {
    constructor(data, smoothing) {
      Object.assign(this, data);
      this.surface = new X.SurfaceLaw(data.surface);
      this.alternatives = data.alternatives.map((other) => new X.SurfaceLaw(other));
      this.lines = data.lines.map((line) => ({
        context: line.context,
        ...Object.fromEntries(["num_params", "num_tokens", "loss"].filter((name) => line[name]).map((name) => [name, X.unpack(line[name])])),
      }));
      this.costs = new X.ShapeCosts(data.costs);
      this.smoothing = smoothing;
      this.kept = new Map();
    }

    // what the shapes cost under a load; kept for the last few loads, as budgets and limits move most
    candidates(question, runtime) {
      const { context, load } = question;
      const key = [context, load.prompt, load.generate, load.batch, runtime ? runtime.device : ""].join();
      if (!this.kept.has(key)) {
        if (this.kept.size > 16) this.kept.clear();
        const unknown = () => new Float64Array(this.costs.size).fill(NaN);
        const times = runtime ? runtime.times(this, load) : { ttft_s: unknown(), step_time_s: unknown() };
        const width = runtime ? runtime.width : Object.keys(this.costs.widths)[0];
        const pool = {
          num_params: this.costs.num_params,
          log_params: this.costs.num_params.map(Math.log),
          train: this.costs.trainFlopsPerToken(context),
          serve: this.costs.servedFlopsPerToken(load),
          quantities: { ...times, serving_bytes: this.costs.servingBytes(load, width) },
        };
        pool.smooth = this.smooth(pool);
        this.kept.set(key, pool);
      }
      return this.kept.get(key);
    }

    // sizes between the shapes: FLOPs a token by local lines in ln N through the middle depth of every width
    smooth(pool) {
      const members = new Map();
      this.shapes.embedding_dim.forEach((width, k) => members.set(width, [...(members.get(width) || []), k]));
      const ladder = [...members.values()].map((found) => found[Math.floor(found.length / 2)]);
      if (ladder.length < 5) return pool;
      const x = ladder.map((k) => pool.log_params[k]);
      const low = Math.min(...x), step = (Math.max(...x) - low) / (POINTS - 1);
      const log_params = Float64Array.from({ length: POINTS }, (_, i) => low + i * step);
      const logs = [pool.train, pool.serve].map((costs) => ladder.map((k) => Math.log(costs[k])));
      const smoothed = [new Float64Array(POINTS), new Float64Array(POINTS)];
      for (let i = 0; i < POINTS; i++) {
        let s0 = 0, s1 = 0, s2 = 0;
        const t0 = [0, 0], t1 = [0, 0];
        for (let j = 0; j < x.length; j++) {
          const offset = x[j] - log_params[i], weight = Math.exp(-0.5 * (offset / this.smoothing) ** 2);
          s0 += weight; s1 += weight * offset; s2 += weight * offset * offset;
          for (let c = 0; c < 2; c++) {
            t0[c] += weight * logs[c][j];
            t1[c] += weight * offset * logs[c][j];
          }
        }
        for (let c = 0; c < 2; c++) smoothed[c][i] = Math.exp((s2 * t0[c] - s1 * t1[c]) / (s0 * s2 - s1 * s1));
      }
      return { num_params: log_params.map(Math.exp), log_params, train: smoothed[0], serve: smoothed[1] };
    }
  };

  // tokens, loss and FLOPs that a question leaves candidate k under one row of the law; into `out`
  function allocate(question, surface, row, c, pool, k, out) {
    const asked = question.loss !== null, n = pool.log_params[k];
    out.tokens = asked ? surface.tokensForLoss(row, n, question.loss, c) : question.flops / pool.train[k];
    const usable = Number.isFinite(out.tokens) && out.tokens >= 1;
    out.loss = usable ? surface.loss(row, n, Math.log(out.tokens), c) : NaN;
    out.training = pool.train[k] * out.tokens;
    out.serving = question.served * pool.serve[k];
    out.total = out.training + out.serving;
    const value = asked ? out.total : out.loss;
    const kept = usable && Number.isFinite(value) && (asked || out.training <= question.flops * ROUNDING);
    out.value = kept ? value : Infinity;
    return out.value;
  }

  X.allocation = function (question, arch, pool, k, row = 0) {
    const out = {};
    allocate(question, arch.surface, row, arch.surface.factors(question.context)[row], pool, k, out);
    return out;
  };

  // one candidate under every row of the law: fit, then resamples; [field] -> array of rows
  function resampled(question, arch, pool, k, fields) {
    const { surface } = arch, factors = surface.factors(question.context), out = {};
    const found = Object.fromEntries(fields.map((field) => [field, new Array(surface.rows)]));
    for (let row = 0; row < surface.rows; row++) {
      allocate(question, surface, row, factors[row], pool, k, out);
      for (const field of fields) found[field][row] = out[field];
    }
    return found;
  }

  function within(pool, limits, k) {
    return Object.entries(limits).every(([name, limit]) => pool.quantities[name][k] <= limit);
  }

  function best(values, kept) {
    let found = null;
    for (let k = 0; k < values.length; k++) {
      if (kept(k) && Number.isFinite(values[k]) && (found === null || values[k] < values[found])) found = k;
    }
    return found;
  }

  // {free, best, binding, nearest, jointly} as planning.choose.Choice; `blind`: limits without a runtime model
  X.choose = function (question, arch, pool) {
    const { limits } = question, names = Object.keys(limits), out = {};
    const c = arch.surface.factors(question.context)[0];
    const values = Float64Array.from({ length: pool.train.length }, (_, k) => allocate(question, arch.surface, 0, c, pool, k, out));
    const blind = names.filter((name) => pool.quantities[name].every(Number.isNaN));
    const choice = { values, free: best(values, () => true), best: null, binding: [], nearest: null, jointly: null, blind };
    if (choice.free === null || blind.length) return choice;
    choice.best = best(values, (k) => within(pool, limits, k));
    const without = (name) => Object.fromEntries(Object.entries(limits).filter(([other]) => other !== name));
    if (choice.best !== null) {
      choice.binding = names.filter((name) => {
        const other = best(values, (k) => within(pool, without(name), k));
        return other !== null && values[other] < values[choice.best];
      });
      if (!choice.binding.length && choice.best !== choice.free) choice.binding = names; // only together
      return choice;
    }
    const possible = (k) => Number.isFinite(values[k]);
    const alone = names.filter((name) => !values.some((_, k) => possible(k) && within(pool, { [name]: limits[name] }, k)));
    choice.binding = alone.length ? alone : names;
    choice.nearest = Object.fromEntries(names.map((name) => {
      const k = best(pool.quantities[name], (at) => possible(at) && within(pool, without(name), at));
      return [name, { limit: limits[name], k, needed: k === null ? Infinity : pool.quantities[name][k] }];
    }));
    const excess = values.map((_, k) => Math.max(...names.map((name) => pool.quantities[name][k] / limits[name])));
    const k = best(excess, possible);
    choice.jointly = k === null ? null : { factor: excess[k], k };
    return choice;
  };

  // N*, D*, loss of the best model without limits, whether or not it can be built, with intervals
  function lawOptimum(question, arch, pool, confidence) {
    const { surface } = arch, factors = surface.factors(question.context), smooth = pool.smooth;
    const size = smooth.train.length, out = {}, found = { num_params: [], num_tokens: [], loss: [], training_flops: [] };
    for (let row = 0; row < surface.rows; row++) {
      const value = (k) => allocate(question, surface, row, factors[row], smooth, k, out);
      let at = 0, least = Infinity;
      const look = (from, to, step) => {
        for (let k = Math.max(from, 0); k < Math.min(to, size); k += step) {
          const here = value(k);
          if (here < least) [least, at] = [here, k];
        }
      };
      look(0, size, size > 10 * STRIDES[0] ? STRIDES[0] : 1);
      if (least === Infinity) look(0, size, 1);
      STRIDES.slice(1).forEach((step, i) => look(at - STRIDES[i], at + STRIDES[i] + 1, step));
      const good = Number.isFinite(value(at));
      found.num_params.push(good ? smooth.num_params[at] : NaN);
      found.num_tokens.push(good ? out.tokens : NaN);
      found.loss.push(good ? out.loss : NaN);
      found.training_flops.push(good ? out.training : NaN);
    }
    return Object.fromEntries(Object.entries(found).map(([name, values]) => [name, X.estimate(values, confidence)]));
  }

  // N*, D*, L* of a budget by the power laws of the IsoFLOP minima
  function isoflopOptimum(arch, context, flops, confidence) {
    const found = {};
    for (const variable of ["num_params", "num_tokens", "loss"]) {
      const law = X.powerLaw(arch.lines, variable, context);
      if (!law) continue;
      const values = X.range(law.lines.length / 2, (row) => Math.pow(10, law.lines[2 * row] + law.lines[2 * row + 1] * Math.log10(flops)));
      found[variable] = X.estimate(values, confidence);
      found.context = law.how;
    }
    return Object.keys(found).length ? found : null;
  }

  const OUTSIDE = { num_params: "parameters", num_tokens: "training tokens", tokens_per_param: "tokens per parameter",
    num_flops: "training FLOPs", context_length: "context", batch_size: "batch", prefill_length: "prompt" };

  function outside(of, ranges, values) {
    const found = [];
    for (const [name, [low, high]] of Object.entries(ranges)) {
      const value = values[name], factor = value > high ? value / high : value < low ? low / value : 1;
      if (factor <= 1 + 1e-9) continue;
      found.push({ of, quantity: name, label: OUTSIDE[name], value, seen: [low, high], side: value > high ? "above" : "below", factor });
    }
    return found;
  }

  X.shapeOf = (arch, k) => Object.fromEntries(Object.entries(arch.shapes).map(([name, values]) => [name, values[k]]));

  function model(question, arch, pool, k, runtime, confidence) {
    const drawn = resampled(question, arch, pool, k, ["tokens", "loss", "training", "total", "value"]);
    const N = pool.num_params[k], D = drawn.tokens[0], log = [Math.log(N), Math.log(D)];
    const others = arch.alternatives.map((other) => other.loss(0, ...log, other.factors(question.context)[0]));
    const seen = { num_params: N, num_tokens: D, tokens_per_param: D / N, context_length: question.context, num_flops: drawn.training[0] };
    const served = { num_params: N, batch_size: question.load.batch, prefill_length: question.load.prompt };
    return {
      k, shape: X.shapeOf(arch, k), num_params: N, drawn,
      num_tokens: X.estimate(drawn.tokens, confidence), tokens_per_param: D / N,
      loss: X.estimate(drawn.loss, confidence),
      loss_other_forms: others.length ? [Math.min(...others), Math.max(...others)] : null,
      training_flops: X.estimate(drawn.training, confidence),
      serving_flops: question.served * pool.serve[k],
      total_flops: X.estimate(drawn.total, confidence),
      ttft_s: pool.quantities.ttft_s[k],
      step_time_s: pool.quantities.step_time_s[k],
      serving_bytes: pool.quantities.serving_bytes[k],
      extrapolation: [...outside("runs of the law", arch.ranges, seen), ...(runtime ? outside("measurements of times", runtime.ranges, served) : [])],
    };
  }

  // least FLOPs (total ones, where tokens are served) with which any shape reaches a loss
  function smallestBudget(question, arch, pool, loss) {
    const asked = { ...question, loss }, c = arch.surface.factors(question.context)[0], out = {};
    let least = Infinity;
    for (let k = 0; k < pool.train.length; k++) least = Math.min(least, allocate(asked, arch.surface, 0, c, pool, k, out));
    return least;
  }

  // the question of every architecture: with served tokens, least total FLOPs with the loss that the budget buys
  function target(question, archs, pools) {
    if (!question.served) return { question, loss: null };
    const training = { ...question, served: 0 };
    const losses = archs.map((arch, i) => {
      const { best } = X.choose(training, arch, pools[i]);
      return best === null ? Infinity : X.allocation(training, arch, pools[i], best).loss;
    });
    const loss = Math.min(...losses);
    return Number.isFinite(loss) ? { question: { ...question, loss }, loss } : { question: training, loss: null };
  }

  // the whole answer, as `xlstm-scaling recommend` has it
  X.answer = function (asked, archs, runtime, confidence) {
    const pools = archs.map((arch) => arch.candidates(asked, runtime));
    const { question, loss } = target(asked, archs, pools);
    const parts = archs.map((arch, i) => {
      const pool = pools[i], choice = X.choose(question, arch, pool);
      const part = { arch: arch.id, name: arch.name, choice: null, without_limits: null, infeasible: null, cost_of_limits: null };
      part.status = choice.blind.length ? "blind" : choice.free === null ? "impossible" : choice.best === null ? "infeasible" : "ok";
      part.blind = choice.blind;
      part.optimum = lawOptimum(question, arch, pool, confidence);
      part.isoflop_optimum = isoflopOptimum(arch, asked.context, asked.flops, confidence);
      if (choice.free !== null) part.without_limits = model(question, arch, pool, choice.free, runtime, confidence);
      if (part.status === "infeasible") part.infeasible = infeasible(choice, arch, pool, question.limits);
      if (part.status === "impossible") part.needed_flops = Math.min(...pool.train);
      if (part.status === "ok") {
        part.choice = choice.best === choice.free ? part.without_limits : model(question, arch, pool, choice.best, runtime, confidence);
        if (Object.keys(question.limits).length) {
          const { value } = part.choice.loss, enough = smallestBudget(question, arch, pool, value);
          part.cost_of_limits = { binding: choice.binding, loss: value - part.without_limits.loss.value,
            flops_ratio: part.choice.total_flops.value / enough };
        }
      }
      return part;
    });
    return { question, asked, target: loss, parts, pools, comparison: compare(question, archs, parts, confidence) };
  };

  function infeasible(choice, arch, pool, limits) {
    const about = (k) => (k === null ? null : { num_params: pool.num_params[k], shape: X.shapeOf(arch, k) });
    const nearest = Object.fromEntries(Object.entries(choice.nearest).map(([name, found]) => [name, { ...found, ...about(found.k) }]));
    const jointly = choice.jointly && {
      ...choice.jointly, ...about(choice.jointly.k),
      values: Object.fromEntries(Object.keys(limits).map((name) => [name, pool.quantities[name][choice.jointly.k]])),
    };
    return { binding: choice.binding, nearest, jointly };
  }

  // how sure it is that the best architecture is the best: over paired resamples of the chosen shapes
  function compare(question, archs, parts, confidence) {
    const byFlops = question.loss !== null;
    const valued = parts.map((part, i) => ({ part, i })).filter(({ part }) => part.choice).map(({ part, i }) => {
      const params = archs[i].surface.params, width = X.SURFACE_FIELDS.length;
      const known = (row) => X.range(width, (field) => params[row * width + field]).every(Number.isFinite);
      return { part, values: part.choice.drawn.value.map((value, row) => (row && !known(row) ? NaN : value)) };
    });
    if (!valued.length) return null;
    valued.sort((a, b) => a.values[0] - b.values[0]);
    const [first, second] = valued;
    if (!second) return { best: first.part.arch, second: null };
    const length = Math.min(...valued.map(({ values }) => values.length));
    let better = 0, pairs = 0;
    for (let row = 1; row < length; row++) {
      const rest = Math.min(...valued.slice(1).map(({ values }) => values[row])), mine = first.values[row];
      if (Number.isNaN(mine) || Number.isNaN(rest)) continue;
      pairs += 1;
      better += mine < rest ? 1 : mine === rest ? 0.5 : 0;
    }
    const both = Math.min(first.values.length, second.values.length);
    const gaps = X.range(both, (row) => (byFlops ? second.values[row] / first.values[row] : second.values[row] - first.values[row]));
    return { best: first.part.arch, second: second.part.arch, of: byFlops ? "total_flops" : "loss",
      advantage: X.estimate(gaps, confidence), probability_best: pairs ? better / pairs : NaN, paired_resamples: pairs };
  }

  // best loss against budget, and its interval, under the question's context, load and limits
  X.lossCurve = function (question, arch, pool, budgets, confidence) {
    return budgets.map((flops) => {
      const asked = { ...question, flops, loss: null, served: 0 };
      const choice = X.choose(asked, arch, pool);
      if (choice.best === null) return { flops, value: NaN, lo: NaN, hi: NaN };
      return { flops, ...X.estimate(resampled(asked, arch, pool, choice.best, ["loss"]).loss, confidence) };
    });
  };
})((globalThis.Explorer ??= {}));
