// The laws of one architecture, as planning/laws.py has them: row 0 is the fit, the others are resamples.
(function (X) {
  "use strict";
  const A = 0, B = 1, E = 2, ALPHA = 3, BETA = 4, GAMMA = 5, WIDTH = 6; // fitting.loss_surface.SURFACE_FIELDS

  X.SURFACE_FIELDS = ["A", "B", "E", "alpha", "beta", "gamma"];

  // L(N, D, T) = c(T) (E + (A / N^alpha + B / D^beta)^gamma) [nat/token]
  X.SurfaceLaw = class {
    constructor(data) {
      this.params = X.unpack(data.params); // (rows, 6)
      this.rows = this.params.length / WIDTH;
      this.contexts = data.contexts;
      this.logFactors = X.unpack(data.log_factors); // (rows, contexts)
      this.factorsOf = new Map();
    }

    // c(T) of every row: between contexts ln c is linear in ln T, beyond them it is that of the nearest
    factors(context) {
      if (!this.factorsOf.has(context)) {
        if (this.factorsOf.size > 64) this.factorsOf.clear();
        const known = this.contexts, count = known.length;
        let right = known.findIndex((one) => one >= context);
        right = Math.min(Math.max(right < 0 ? count : right, 1), Math.max(count - 1, 1));
        const left = Math.min(right - 1, count - 1), at = Math.min(right, count - 1);
        const share = count === 1 ? 0 : Math.min(Math.max(Math.log(context / known[left]) / Math.log(known[at] / known[left]), 0), 1);
        const log = this.logFactors;
        const factors = Float64Array.from({ length: this.rows }, (_, row) =>
          Math.exp((1 - share) * log[row * count + left] + share * log[row * count + at]));
        this.factorsOf.set(context, factors);
      }
      return this.factorsOf.get(context);
    }

    // loss of ln N, ln D by one row; c: its factor
    loss(row, logParams, logTokens, c) {
      const p = this.params, at = row * WIDTH;
      const inner = p[at + A] * Math.exp(-p[at + ALPHA] * logParams) + p[at + B] * Math.exp(-p[at + BETA] * logTokens);
      return c * (p[at + E] + Math.pow(inner, p[at + GAMMA]));
    }

    // tokens D with which exp(logParams) parameters reach the loss: Infinity where no D does, NaN without a row
    tokensForLoss(row, logParams, loss, c) {
      const p = this.params, at = row * WIDTH;
      if (Number.isNaN(p[at + A] + p[at + B] + p[at + E] + p[at + ALPHA] + p[at + BETA] + p[at + GAMMA])) return NaN;
      const reducible = loss / c - p[at + E];
      if (!(reducible > 0)) return Infinity;
      const room = Math.pow(reducible, 1 / p[at + GAMMA]) - p[at + A] * Math.exp(-p[at + ALPHA] * logParams);
      return room > 0 ? Math.exp((Math.log(p[at + B]) - Math.log(room)) / p[at + BETA]) : Infinity;
    }

    // the fit's curve of equal loss from D -> inf to N -> inf: {N, D}, or null where the loss is below its floor.
    // The shares of the two terms are s and 1 - s, s a logistic function of evenly spaced points
    isoLine(loss, context, points = 160) {
      const p = this.params, reducible = loss / this.factors(context)[0] - p[E];
      if (!(reducible > 0)) return null;
      const inner = Math.pow(reducible, 1 / p[GAMMA]), N = [], D = [];
      for (let i = 0; i < points; i++) {
        const share = 1 / (1 + Math.exp(24 - (48 * i) / (points - 1)));
        N.unshift(Math.pow(p[A] / (inner * share), 1 / p[ALPHA]));
        D.unshift(Math.pow(p[B] / (inner * (1 - share)), 1 / p[BETA]));
      }
      return { N, D };
    }
  };

  // the power law of a variable's minima (rows x intercept, slope, in log10) at a context, and how it was found
  X.powerLaw = function (lines, variable, context) {
    const known = lines.filter((line) => line[variable]);
    if (!known.length) return null;
    const exact = known.find((line) => line.context === context);
    if (exact) return { lines: exact[variable], how: `context ${X.count(context)}` };
    const below = known.filter((line) => line.context < context), above = known.filter((line) => line.context > context);
    if (!below.length || !above.length) {
      const nearest = below.length ? below[below.length - 1] : above[0];
      return { lines: nearest[variable], how: `the nearest context with a law, ${X.count(nearest.context)}` };
    }
    const low = below[below.length - 1], high = above[0];
    const share = Math.log(context / low.context) / Math.log(high.context / low.context);
    return {
      lines: low[variable].map((value, i) => (1 - share) * value + share * high[variable][i]),
      how: `between contexts ${X.count(low.context)} and ${X.count(high.context)}`,
    };
  };
})((globalThis.Explorer ??= {}));
