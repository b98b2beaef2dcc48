// Arrays from JSON, quantiles, and numbers as text.
(function (X) {
  "use strict";

  // {f64, shape} -> Float64Array (little-endian, as all browsers' machines are)
  X.unpack = function (packed) {
    const bytes = Uint8Array.from(atob(packed.f64), (character) => character.charCodeAt(0));
    return new Float64Array(bytes.buffer);
  };

  // quantile of ascending numbers, linear between them
  function quantile(sorted, share) {
    const at = share * (sorted.length - 1), low = Math.floor(at);
    const high = Math.min(low + 1, sorted.length - 1);
    return sorted[low] + (at - low) * (sorted[high] - sorted[low]);
  }

  // percentile interval of resamples, as planning.choose.interval: NaN is no value, an end may be infinite
  X.interval = function (samples, confidence) {
    const known = Float64Array.from(samples.filter((value) => !Number.isNaN(value))).sort();
    const tail = 0.5 * (1 - confidence), enough = 0.5 * samples.length;
    if (!samples.length || known.length < enough) return [NaN, NaN];
    if (known[known.length - 1] === Infinity) {
      return [tail, 1 - tail].map((share) => known[Math.round(share * (known.length - 1))]);
    }
    return known.length < 2 ? [NaN, NaN] : [quantile(known, tail), quantile(known, 1 - tail)];
  };

  // the first is the fit's, the others those of resamples
  X.estimate = function (values, confidence) {
    const [lo, hi] = X.interval(values.slice(1), confidence);
    return { value: values[0], lo, hi };
  };

  X.range = (length, of) => Array.from({ length }, (_, index) => of(index));

  X.geometric = function (low, high, points) {
    const step = Math.log(high / low) / (points - 1);
    return X.range(points, (i) => low * Math.exp(i * step));
  };

  // text, as `xlstm-scaling recommend` writes it

  function digits(value, count) {
    return String(Number(value.toPrecision(count)));
  }

  X.si = function (value) {
    if (value === null || Number.isNaN(value)) return "unknown";
    for (const [scale, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (Math.abs(value) >= 0.9995 * scale) {
        return value < 1e15 ? digits(value / scale, 3) + suffix : X.flops(value);
      }
    }
    return digits(value, 3);
  };

  X.flops = function (value) {
    if (!Number.isFinite(value)) return value === Infinity ? "no end" : "unknown";
    return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  };

  X.seconds = function (value) {
    if (!Number.isFinite(value)) return "unknown";
    for (const [scale, unit] of [[86400, "days"], [3600, "h"], [60, "min"], [1, "s"], [1e-3, "ms"]]) {
      if (value >= 0.9995 * scale) return `${digits(value / scale, 3)} ${unit}`;
    }
    return `${digits(value * 1e6, 3)} µs`;
  };

  // of an axis
  X.tickSeconds = (value) => (value >= 1 ? `${digits(value, 3)} s` : X.seconds(value));

  X.bytes = function (value) {
    if (!Number.isFinite(value)) return "unknown";
    return value >= 1e8 ? `${digits(value / 1e9, 3)} GB` : `${digits(value / 1e6, 3)} MB`;
  };

  X.count = (value) => Math.round(value).toLocaleString("en-US");
  X.loss = (value) => (Number.isFinite(value) ? value.toFixed(3) : "unknown");
})((globalThis.Explorer ??= {}));
