// The settings of a view: what they are, where they may move, how they are read, and the part of the address after #.
(function (X) {
  "use strict";
  const UNITS = {
    number: { "": 1, k: 1e3, m: 1e6, b: 1e9, g: 1e9, t: 1e12 },
    time: { "": 1, s: 1, ms: 1e-3, us: 1e-6, "µs": 1e-6, min: 60 },
    bytes: { "": 1, b: 1, kb: 1e3, mb: 1e6, gb: 1e9, tb: 1e12 },
  };

  // "1e21", "16k", "50 ms", "80 GB" -> number, or NaN
  X.parseQuantity = function (text, kind) {
    const found = /^([+-]?[\d.,]*\d\.?(?:e[+-]?\d+)?)\s*([a-zµ]*)$/i.exec(text.trim().replace(/_/g, ""));
    const unit = found && UNITS[kind][found[2].toLowerCase()];
    return found && unit ? Number(found[1].replace(/,/g, "")) * unit : NaN;
  };

  const round = (value) => Number(value.toPrecision(3));
  const whole = (value) => Math.max(1, Math.round(value));

  // controls: key of the address and of the settings, text, range of the slider. `empty`: an empty field stands for it
  X.controls = function (data, archs, runtime) {
    const ends = (name) => {
      const known = data.archs.map((arch) => arch.ranges[name]).filter(Boolean);
      return [Math.min(...known.map(([low]) => low)), Math.max(...known.map(([, high]) => high))];
    };
    const flops = ends("num_flops"), contexts = ends("context_length"), tokens = ends("num_tokens");
    const seen = X.quantityRanges(data, archs, runtime, X.defaults(data));
    const prompt = [Math.min(contexts[0], 128), 16 * contexts[1]];
    return [
      { group: "Training", key: "budget", label: "Budget [FLOPs]", low: flops[0] / 10, high: flops[1] * 1000, kind: "number", text: X.flops, snap: round },
      { key: "context", label: "Context [tokens]", low: contexts[0] / 4, high: contexts[1] * 16, kind: "number", text: X.count, snap: octaves, check: whole, ticks: data.archs[0].surface.contexts },
      { group: "Serving", key: "batch", label: "Requests side by side", low: 1, high: 1024, kind: "number", text: X.count, snap: octaves, check: whole },
      { key: "prompt", label: "Prompt [tokens]", low: prompt[0], high: prompt[1], kind: "number", text: X.count, snap: octaves, check: whole, empty: "= context", off: "low" },
      { key: "generate", label: "Tokens out a request", low: 1, high: 16384, kind: "number", text: X.count, snap: octaves, check: whole },
      { key: "served", label: "Tokens served in all", low: tokens[0], high: tokens[1] * 1e4, kind: "number", text: X.si, snap: round, empty: "none", off: "low" },
      { group: "Limits", key: "ttft", label: "Time to first token", ...margins(seen.ttft_s), kind: "time", text: X.seconds, snap: round, empty: "no limit", off: "high" },
      { key: "step", label: "Time of a decode step", ...margins(seen.step_time_s), kind: "time", text: X.seconds, snap: round, empty: "no limit", off: "high" },
      { key: "memory", label: "Serving memory", ...margins(seen.serving_bytes), kind: "bytes", text: X.bytes, snap: round, empty: "no limit", off: "high" },
    ].map((control) => ({ check: (value) => value, ...control }));
  };

  function octaves(value) {
    return whole(Math.pow(2, Math.round(4 * Math.log2(value)) / 4));
  }

  function margins([low, high]) {
    return Number.isFinite(low) ? { low: round(low / 3), high: round(high * 3) } : { low: 1e-3, high: 1e3 };
  }

  // least and largest of every quantity that may be limited, over all shapes at some settings
  X.quantityRanges = function (data, archs, runtime, settings) {
    const found = Object.fromEntries(X.LIMITS.map((name) => [name, [Infinity, -Infinity]]));
    for (const arch of archs) {
      const { quantities } = arch.candidates(X.asked(settings, runtime), runtime);
      for (const name of X.LIMITS) {
        for (const value of quantities[name]) {
          if (Number.isNaN(value)) continue;
          found[name] = [Math.min(found[name][0], value), Math.max(found[name][1], value)];
        }
      }
    }
    return found;
  };

  // null is "none" or "as usual"
  X.defaults = function (data) {
    const largest = data.archs.map((arch) => (arch.ranges.num_flops || [1e18, 1e18])[1]);
    return {
      budget: round(data.study.budget ?? Math.min(...largest)), context: data.archs.length ? data.archs[0].base_context : 1,
      batch: 1, prompt: null, generate: 1, served: null, ttft: null, step: null, memory: null,
      times: data.runtimes.length ? data.runtimes[0].device : null,
      surface: data.archs.length ? data.archs[0].id : null,
      hide: [], only: false, view: null,
    };
  };

  X.asked = function (settings, runtime) {
    return X.question({
      flops: settings.budget, context: settings.context, served: settings.served ?? 0, prompt: settings.prompt,
      generate: settings.generate, batch: settings.batch,
      limits: { ttft_s: settings.ttft, step_time_s: settings.step, serving_bytes: settings.memory },
    }, runtime);
  };

  const NUMBERS = ["budget", "context", "batch", "prompt", "generate", "served", "ttft", "step", "memory"];
  const WHOLE = ["context", "batch", "prompt", "generate"];

  // what differs from the defaults, as the address has it after #; the budget and the context always
  X.fragment = function (settings, defaults) {
    const parts = new URLSearchParams();
    for (const key of NUMBERS) {
      const shown = ["budget", "context"].includes(key) || settings[key] !== defaults[key];
      if (shown) parts.set(key, settings[key] === null ? "none" : String(settings[key]).replace("e+", "e"));
    }
    for (const key of ["times", "surface"]) if (settings[key] !== defaults[key]) parts.set(key, settings[key]);
    if (settings.hide.length) parts.set("hide", settings.hide.join(","));
    if (settings.only) parts.set("only", "1");
    if (settings.view) parts.set("view", settings.view.map((value) => Number(value.toPrecision(5))).join(","));
    return parts.toString().replace(/%2C/g, ",");
  };

  // the settings that an address asks for; what it has wrong stays as it is by default
  X.parseFragment = function (text, defaults, data) {
    const settings = { ...defaults, hide: [] }, parts = new URLSearchParams(text.replace(/^#/, ""));
    for (const key of NUMBERS) {
      if (!parts.has(key)) continue;
      const value = parts.get(key) === "none" ? null : X.parseQuantity(parts.get(key), "number");
      if (value === null ? defaults[key] === null : Number.isFinite(value) && value > 0) {
        settings[key] = value !== null && WHOLE.includes(key) ? whole(value) : value;
      }
    }
    const known = data.archs.map((arch) => arch.id), devices = data.runtimes.map((runtime) => runtime.device);
    if (devices.includes(parts.get("times"))) settings.times = parts.get("times");
    if (known.includes(parts.get("surface"))) settings.surface = parts.get("surface");
    if (parts.has("hide")) settings.hide = parts.get("hide").split(",").filter((arch) => arch in data.styles);
    settings.only = parts.get("only") === "1";
    const view = (parts.get("view") || "").split(",").map(Number);
    if (view.length === 4 && view.every((value) => value > 0) && view[0] < view[1] && view[2] < view[3]) settings.view = view;
    return settings;
  };

  // the command that answers what is shown
  X.command = function (settings, data) {
    const quote = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replace(/'/g, `'"'"'`)}'`);
    const words = ["xlstm-scaling", "recommend", "--flops", String(settings.budget), "--context-length", String(settings.context)];
    const options = { batch: ["batch-size", 1], prompt: ["prefill-length", null], generate: ["generate-length", 1],
      served: ["tokens-served", null], ttft: ["max-ttft-s", null], step: ["max-step-time-s", null], memory: ["max-serving-bytes", null] };
    for (const [key, [option, usual]] of Object.entries(options)) {
      if (settings[key] !== usual) words.push(`--${option}`, String(settings[key]));
    }
    const runtime = data.runtimes.find((one) => one.device === settings.times);
    const fitted = data.runtimes.filter((one) => one.kind === "fitted").length;
    if (runtime && (runtime.kind === "roofline" || fitted > 1)) words.push("--device", runtime.device);
    if (data.study.laws) words.push("--laws", data.study.laws);
    return words.map(quote).join(" ").replace(/e\+/g, "e");
  };
})((globalThis.Explorer ??= {}));
