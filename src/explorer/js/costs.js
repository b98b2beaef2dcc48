// FLOPs, bytes, memory and times of many shapes, from the coefficients that explorer/costs.py solved for.
(function (X) {
  "use strict";
  const BASIS = {
    "1": () => 1,
    T: (length) => length,
    TT: (length) => length * length,
    chunks: (length, chunk) => Math.ceil(length / chunk),
    "1/T": (length) => 1 / length,
  };

  // (K,) counts of one sequence at a length
  function evaluate(form, length, chunk, size) {
    const found = new Float64Array(size);
    for (const [name, coefficients] of Object.entries(form.terms)) {
      const factor = BASIS[name](length, chunk);
      for (let k = 0; k < size; k++) found[k] += factor * coefficients[k];
    }
    return form.inverse ? found.map((value) => 1 / value) : found;
  }

  function unpackForms(value) {
    if (value && typeof value.f64 === "string") return X.unpack(value);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, unpackForms(part)]));
  }

  X.ShapeCosts = class {
    constructor(data) {
      Object.assign(this, unpackForms(data)); // chunk, num_params, train, prefill, step, widths
      this.size = this.num_params.length;
    }

    // the costs of shape k alone
    take(k) {
      const one = (value) => (value instanceof Float64Array ? value.slice(k, k + 1)
        : value === null || typeof value !== "object" ? value
          : Object.fromEntries(Object.entries(value).map(([name, part]) => [name, one(part)])));
      return Object.assign(Object.create(Object.getPrototypeOf(this)), one({ ...this }), { size: 1 });
    }

    // training FLOPs a token at a context, (K,)
    trainFlopsPerToken(context) {
      return evaluate(this.train, context, this.chunk, this.size);
    }

    // counts of one sequence by name, (K,) each: accounting.work of a prompt, or of a step after `length` tokens
    work(phase, length, width) {
      const forms = { ...this[phase], ...this.widths[width][phase] };
      return Object.fromEntries(Object.entries(forms).map(([name, form]) =>
        [name, evaluate(form, length, this.chunk, this.size)]));
    }

    // bytes that a device needs to serve the load, (K,)
    servingBytes(load, width) {
      const of = this.widths[width].memory, { batch, prompt, generate } = load;
      const all = prompt + generate;
      return Float64Array.from({ length: this.size }, (_, k) =>
        of["1"][k] + batch * (of.B[k] + prompt * of["B P"][k] + all * of["B (P + G)"][k]));
    }

    // inference FLOPs of a served token, (K,): those of a request over its tokens (accounting/serving.py)
    servedFlopsPerToken(load) {
      const flops = (phase, length) => {
        const linear = evaluate(this[phase].linear_flops, length, this.chunk, this.size);
        const mixing = evaluate(this[phase].mixing_flops, length, this.chunk, this.size);
        return linear.map((value, k) => value + mixing[k]);
      };
      const steps = load.generate - 1, total = flops("prefill", load.prompt);
      if (steps > 0) {
        const first = flops("step", load.prompt), last = flops("step", load.prompt + steps - 1);
        for (let k = 0; k < this.size; k++) total[k] += (steps * (first[k] + last[k])) / 2;
      }
      return total.map((value) => value / (load.prompt + load.generate));
    }
  };

  const LINEAR = ["linear_flops", "weight_bytes"], MIXING = ["mixing_flops", "scores", "state_bytes"];
  const SPARED = ["weight_bytes", "state_bytes"]; // by a cache
  const REST = ["activation_bytes", "constant", "block", "batched_block", "sequence"];

  // share of a call's bytes that come from memory where the last cache holds `held` times all of them
  const EDGE = 6; // how sharp its edge is (accounting/caches.py)
  function memoryShare(held) {
    return 1 / (1 + Math.pow(Math.min(held, 1e3), EDGE));
  }

  // time [s] by a row of the runtime model (docs/runtime.md): counts and costs by term
  X.fittedTime = function (counts, costs, p) {
    const missed = memoryShare((costs.cache ?? 0) * counts.cache);
    const share = (term) => (SPARED.includes(term) ? missed : 1) * costs[term] * counts[term];
    const parts = LINEAR.map(share);
    const larger = Math.max(...parts, Number.MIN_VALUE);
    const roof = larger * Math.pow(parts.reduce((sum, part) => sum + Math.pow(part / larger, p), 0), 1 / p);
    const wait = Math.pow(1 + Math.pow(costs.wait * counts.wait, p), 1 / p);
    const mixing = MIXING.reduce((sum, term) => sum + share(term), 0);
    return roof + mixing * wait + REST.reduce((sum, term) => sum + costs[term] * counts[term], 0);
  };

  X.Runtime = class {
    constructor(data, terms) {
      Object.assign(this, data);
      this.terms = terms;
    }

    // {ttft_s, step_time_s}, (K,) each; NaN where the architecture has no runtime model
    times(arch, load) {
      return {
        ttft_s: this.phase(arch, "prefill", "ttft", load.prompt, load.batch),
        // the last step is the slowest; one step is timed at least
        step_time_s: this.phase(arch, "step", "step_time", load.prompt + Math.max(load.generate - 2, 0), load.batch),
      };
    }

    phase(arch, phase, quantity, length, batch) {
      const shapes = arch.costs, row = this.kind === "fitted" ? (this.rows[arch.id] || {})[quantity] : null;
      if (this.kind === "fitted" && !row) return new Float64Array(shapes.size).fill(NaN);
      const one = shapes.work(phase, length, this.width);
      if (!row) return this.roofline(one, batch, shapes.size);
      const costs = Object.fromEntries(this.terms.map((term, i) => [term, row.costs[i]]));
      return Float64Array.from({ length: shapes.size }, (_, k) => {
        const blocks = arch.shapes.num_blocks[k];
        const counts = {
          linear_flops: batch * one.linear_flops[k],
          weight_bytes: one.weight_bytes[k], // each once, whatever the batch
          mixing_flops: batch * one.mixing_flops[k],
          scores: batch * one.scores[k],
          state_bytes: batch * one.state_bytes[k],
          activation_bytes: batch * one.activation_bytes[k],
          wait: 1 / (batch * one.streams[k]),
          cache: 1 / (one.weight_bytes[k] + batch * one.state_bytes[k]),
          constant: 1,
          block: blocks,
          batched_block: batch > 1 ? blocks : 0,
          sequence: batch,
        };
        return X.fittedTime(counts, costs, row.norm_p);
      });
    }

    // FLOPs or bytes, whichever takes longer
    roofline(one, batch, size) {
      return Float64Array.from({ length: size }, (_, k) => {
        const flops = batch * (one.linear_flops[k] + one.mixing_flops[k]);
        const bytes = one.weight_bytes[k] + batch * (one.activation_bytes[k] + one.state_bytes[k]);
        return Math.max(flops / this.flops_per_s, bytes / this.bytes_per_s);
      });
    }
  };
})((globalThis.Explorer ??= {}));
