// The form: a slider and a field for every setting, choices, and buttons.
(function (X) {
  "use strict";
  const STEPS = 1000; // of a slider

  X.element = function (tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  };

  class Control {
    constructor(spec, change) {
      Object.assign(this, spec);
      const id = `set-${spec.key}`;
      this.field = X.element("input", { type: "text", id, inputmode: "text", placeholder: spec.empty ?? null, spellcheck: "false" });
      this.slider = X.element("input", { type: "range", min: 0, max: STEPS, step: 1, "aria-label": spec.label, id: `${id}-slider` });
      this.problem = X.element("span", { class: "problem", role: "alert" });
      const marks = spec.ticks && X.element("datalist", { id: `${id}-marks` }, ...spec.ticks.map((value) => X.element("option", { value: this.position(value) })));
      if (marks) this.slider.setAttribute("list", marks.id);
      this.node = X.element("div", { class: "control" }, X.element("label", { for: id }, spec.label), this.field, this.slider, this.problem, ...(marks ? [marks] : []));
      this.slider.addEventListener("input", () => change(spec.key, this.ofSlider()));
      this.field.addEventListener("change", () => this.read(change));
    }

    position(value) {
      const at = Math.round((STEPS * Math.log(value / this.low)) / Math.log(this.high / this.low));
      return Math.min(Math.max(at, 0), STEPS);
    }

    ofSlider() {
      const at = Number(this.slider.value);
      if ((this.off === "low" && at === 0) || (this.off === "high" && at === STEPS)) return null;
      return this.snap(this.low * Math.pow(this.high / this.low, at / STEPS));
    }

    read(change) {
      const text = this.field.value.trim();
      const none = this.empty !== undefined && (text === "" || text === this.empty);
      const value = none ? null : X.parseQuantity(text, this.kind);
      const good = none || (Number.isFinite(value) && value > 0);
      this.complain(good ? "" : `not a positive number${this.empty ? `, nor empty for “${this.empty}”` : ""}: ${text}`);
      if (good) change(this.key, none ? null : this.check(value));
    }

    complain(text) {
      this.problem.textContent = text;
      this.field.setAttribute("aria-invalid", String(Boolean(text)));
    }

    show(value) {
      this.complain("");
      this.field.value = value === null ? "" : this.text(value);
      this.field.title = value === null ? "" : String(value);
      const off = this.off === "low" ? 0 : STEPS;
      this.slider.value = value === null ? off : this.position(value);
      this.slider.setAttribute("aria-valuetext", value === null ? this.empty : this.text(value));
    }
  }

  // the whole form; change(key, value) is called when the reader moves something
  X.Form = class {
    constructor(form, data, specs, change, actions) {
      this.controls = specs.map((spec) => new Control(spec, change));
      let group = null;
      for (const control of this.controls) {
        if (control.group) {
          group = X.element("fieldset", {}, X.element("legend", {}, control.group));
          form.append(group);
        }
        group.append(control.node);
      }
      this.times = choice("Times by", "times", data.runtimes.map((one) => [one.device, one.assumed ? `${one.device} (data sheet)` : one.device]), change);
      if (group && data.runtimes.length) group.append(this.times.node);
      this.surface = choice("Colours: loss of", "surface", data.archs.map((arch) => [arch.id, arch.name]), change);
      const shown = X.element("fieldset", {}, X.element("legend", {}, "View"));
      if (data.archs.length) shown.append(this.surface.node);
      this.boxes = Object.entries(data.styles).map(([arch, style]) => {
        const box = X.element("input", { type: "checkbox", id: `show-${arch}`, "data-arch": arch, on: { change: () => change("hide", this.hidden()) } });
        const swatch = X.element("span", { class: "swatch", style: `background:${style.colour}` });
        shown.append(X.element("label", { class: "check" }, box, swatch, style.name));
        return box;
      });
      this.only = X.element("input", { type: "checkbox", id: "show-only", on: { change: () => change("only", this.only.checked) } });
      shown.append(X.element("label", { class: "check" }, this.only, "only runs of this context"));
      form.append(shown, X.element("div", { class: "buttons" }, ...Object.entries(actions).map(([text, [id, action]]) =>
        X.element("button", { type: "button", id, on: { click: action } }, text))));
      form.append(X.element("p", { id: "copied", class: "soft", "aria-live": "polite" }));
      form.addEventListener("submit", (event) => event.preventDefault());
    }

    hidden() {
      return this.boxes.filter((box) => !box.checked).map((box) => box.dataset.arch);
    }

    show(settings) {
      for (const control of this.controls) control.show(settings[control.key]);
      if (settings.times !== null) this.times.select.value = settings.times;
      if (settings.surface !== null) this.surface.select.value = settings.surface;
      for (const box of this.boxes) box.checked = !settings.hide.includes(box.dataset.arch);
      this.only.checked = settings.only;
    }
  };

  function choice(label, key, options, change) {
    const select = X.element("select", { id: `set-${key}` }, ...options.map(([value, text]) => X.element("option", { value }, text)));
    select.addEventListener("change", () => change(key, select.value));
    return { select, node: X.element("div", {}, X.element("label", { for: `set-${key}`, class: "check" }, label), select) };
  }

  // clipboard where the browser lets a local page have it, else the text itself to copy by hand
  X.copy = async function (text) {
    const told = document.getElementById("copied");
    try {
      await navigator.clipboard.writeText(text);
      told.textContent = `Copied: ${text}`;
    } catch {
      told.textContent = text;
      const range = document.createRange();
      range.selectNodeContents(told);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
    }
  };
})((globalThis.Explorer ??= {}));
