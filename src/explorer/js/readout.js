// The answer as a sentence, a table, and what to be careful about.
(function (X) {
  "use strict";
  const element = X.element;
  const LIMIT = { ttft_s: ["time to first token", X.seconds], step_time_s: ["step time", X.seconds], serving_bytes: ["serving memory", X.bytes] };
  const KEYS = { ttft_s: "ttft", step_time_s: "step", serving_bytes: "memory" };
  const nat = (value) => `${value.toFixed(4)} nat`;

  function span(estimate, text) {
    if (!estimate || Number.isNaN(estimate.value)) return ["–"];
    const ends = [estimate.lo, estimate.hi].map((end) => (end === Infinity ? "no end" : text(end)));
    const shown = text(estimate.value);
    if (Number.isNaN(estimate.lo) || (ends[0] === shown && ends[1] === shown)) return [shown];
    return [shown, element("span", { class: "interval" }, `[${ends[0]}, ${ends[1]}]`)];
  }

  function cost(found) {
    if (!found) return "–";
    if (found.loss < 5e-5 && found.flops_ratio < 1.0005) return "nothing";
    return `${nat(found.loss)}, ${Number(found.flops_ratio.toPrecision(3))} × FLOPs`;
  }

  const of = (part, text) => (part.choice ? text(part.choice) : ["–"]);

  const ROWS = [
    ["N* by the surface", (part) => span(part.optimum.num_params, X.si)],
    ["N* by IsoFLOP power law", (part) => span((part.isoflop_optimum || {}).num_params, X.si)],
    ["D* by the surface", (part) => span(part.optimum.num_tokens, X.si)],
    ["D* by IsoFLOP power law", (part) => span((part.isoflop_optimum || {}).num_tokens, X.si)],
    ["the model", (part) => of(part, (m) => [`${m.shape.num_blocks} × ${m.shape.embedding_dim}`, element("span", { class: "interval" }, `${m.shape.num_heads} ${m.shape.num_heads === 1 ? "head" : "heads"} of ${m.shape.head_dim_qk}/${m.shape.head_dim_v}`)])],
    ["parameters N", (part) => of(part, (m) => [X.si(m.num_params)]), "num_params"],
    ["training tokens D", (part) => of(part, (m) => span(m.num_tokens, X.si)), "num_tokens"],
    ["loss [nat/token]", (part) => of(part, (m) => span(m.loss, X.loss)), "loss"],
    ["… by other forms of the law", (part) => of(part, (m) => [m.loss_other_forms ? m.loss_other_forms.map(X.loss).join(" to ") : "–"])],
    ["training FLOPs", (part) => of(part, (m) => span(m.training_flops, X.flops)), "training_flops"],
    ["total FLOPs, served too", (part, answer) => (answer.asked.served ? of(part, (m) => span(m.total_flops, X.flops)) : ["–"])],
    ["time to first token", (part) => of(part, (m) => [X.seconds(m.ttft_s)]), "ttft_s"],
    ["step time", (part) => of(part, (m) => [X.seconds(m.step_time_s)]), "step_time_s"],
    ["serving memory", (part) => of(part, (m) => [X.bytes(m.serving_bytes)]), "serving_bytes"],
    ["cost of the limits", (part) => [cost(part.cost_of_limits)]],
  ];

  function verdict(answer, names) {
    const found = answer.comparison;
    if (!found) return "No model answers this: see below what would.";
    if (!found.second) return answer.parts.length > 1 ? `Only ${names[found.best]} has a model that keeps the limits.` : `${names[found.best]} is the only architecture with a law here. Its best model:`;
    const text = (estimate, form) => {
      const ends = Number.isNaN(estimate.lo) ? "" : ` [${form(estimate.lo)}, ${form(estimate.hi)}]`;
      return form(estimate.value) + ends;
    };
    const gap = found.of === "loss"
      ? `Best: ${names[found.best]}, by ${text(found.advantage, (value) => value.toFixed(4))} nat/token over ${names[found.second]}`
      : `Best: ${names[found.best]}; ${names[found.second]} needs ${text(found.advantage, (value) => String(Number(value.toPrecision(3))))} times its FLOPs`;
    const sure = Number.isNaN(found.probability_best) ? "" : `; the better one in ${(100 * found.probability_best).toFixed(1)} % of resamples`;
    return `${gap}${sure}.`;
  }

  // items of the list of warnings: [text or nodes, whether it is trouble]
  function* warnings(answer, runtime, setLimit) {
    for (const part of answer.parts) {
      const { question } = answer;
      if (part.status === "blind") {
        const what = part.blind.map((name) => LIMIT[name][0]).join(" and ");
        yield [[`${part.name}: no runtime model ${runtime ? `on ${runtime.device} ` : ""}says its ${what}; drop that limit or take other times.`], true];
      }
      if (part.status === "impossible") yield [[`${part.name}: even the cheapest model needs more than this budget.`], true];
      if (part.status !== "infeasible") continue;
      const { binding, nearest, jointly } = part.infeasible;
      const together = binding.length > 1 && binding.length === Object.keys(nearest).length ? " together" : "";
      const line = [`${part.name}: no model keeps the limit of ${binding.map((name) => LIMIT[name][0]).join(" and ")}${together}.`];
      for (const [name, found] of Object.entries(nearest)) {
        const [what, form] = LIMIT[name];
        if (!Number.isFinite(found.needed)) continue;
        line.push(` ${what} of ${form(found.limit)}: ${form(found.needed)} would do, all else kept (${X.si(found.num_params)} parameters).`,
          element("button", { type: "button", "data-limit": KEYS[name], on: { click: () => setLimit(KEYS[name], found.needed) } }, `take ${form(found.needed)}`));
      }
      if (Object.values(nearest).every((found) => !Number.isFinite(found.needed)) && jointly) {
        const values = Object.entries(jointly.values).map(([name, value]) => `${LIMIT[name][0]} ${LIMIT[name][1](value)}`);
        line.push(` Nearest: all limits ${Number(jointly.factor.toPrecision(3))} times wider, ${X.si(jointly.num_params)} parameters: ${values.join(", ")}.`);
      }
      if (question.implied.length) line.push(` The memory limit is that of the device.`);
      yield [line, true];
    }
    for (const part of answer.parts) {
      for (const found of part.choice ? part.choice.extrapolation : []) {
        const form = found.quantity === "num_flops" ? X.flops : X.si, [low, high] = found.seen.map(form);
        yield [[`Extrapolated: ${part.name}, ${found.label} ${form(found.value)}, ${Number(found.factor.toPrecision(3))} times ${found.side} the ${low} to ${high} of the ${found.of}.`], found.factor > 3];
      }
    }
  }

  // sentences on the context, and on limits that are barely kept
  function* remarks(answer, archs, runtime) {
    const { asked } = answer;
    if (asked.load.prompt > asked.context) yield "Prompts are longer than the training context: the law says nothing of the loss there.";
    archs.forEach((arch, i) => {
      arch.remarks = [];
      const [low, high] = arch.ranges.context_length, part = answer.parts[i];
      if (asked.context < low || asked.context > high) {
        arch.remarks.push(`${arch.name}: no law at context ${X.count(asked.context)}; the factor of context ${X.count(asked.context < low ? low : high)} is used.`);
      } else if (!arch.surface.contexts.includes(asked.context)) {
        arch.remarks.push(`${arch.name}: context ${X.count(asked.context)} lies between those measured; its factor is interpolated.`);
      }
      for (const [name, quantity] of [["ttft_s", "ttft"], ["step_time_s", "step_time"]]) {
        const row = runtime && runtime.kind === "fitted" ? (runtime.rows[arch.id] || {})[quantity] : null;
        if (row && row.error !== null && name in asked.limits && part.choice && part.choice[name] * (1 + row.error) > asked.limits[name]) {
          arch.remarks.push(`${arch.name}: the ${LIMIT[name][0]} keeps its limit by less than the runtime model's error of ${Math.round(100 * row.error)} %.`);
        }
      }
    });
    for (const arch of archs) yield* arch.remarks;
  }

  X.showAnswer = function (answer, archs, styles, runtime, notes, colours, setLimit) {
    const names = Object.fromEntries(archs.map((arch) => [arch.id, arch.name]));
    const best = answer.comparison ? answer.comparison.best : null;
    const head = element("tr", {}, element("th", {}), ...answer.parts.map((part) => element("th", { scope: "col", style: `--colour:${colours[part.arch]}` }, part.name)));
    const body = ROWS.map(([label, cells, key]) => {
      const values = answer.parts.map((part) => cells(part, answer));
      if (values.every(([first]) => first === "–" || first === "unknown")) return null;
      return element("tr", { "data-row": key }, element("th", { scope: "row" }, label),
        ...values.map((value, i) => element("td", { class: `${key === "loss" ? "key-number" : ""} ${answer.parts[i].arch === best && answer.parts.length > 1 ? "best" : ""}`, "data-arch": answer.parts[i].arch }, ...value)));
    });
    const list = [...warnings(answer, runtime, setLimit)].map(([nodes, trouble]) => element("li", { class: trouble ? "trouble" : "" }, ...nodes));
    const node = document.getElementById("answer");
    node.replaceChildren(
      element("p", { class: "verdict" }, verdict(answer, names)),
      element("table", {}, element("thead", {}, head), element("tbody", {}, ...body.filter(Boolean))),
      list.length ? element("ul", { class: "warnings" }, ...list) : "",
    );
    const told = [...remarks(answer, archs, runtime), ...notes];
    document.getElementById("notes").replaceChildren(...told.map((text) => element("p", {}, text)));
  };
})((globalThis.Explorer ??= {}));
