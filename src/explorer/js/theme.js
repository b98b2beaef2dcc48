// Light and dark: the page's own colours, and those of the plots, which cannot see the style sheet.
(function (X) {
  "use strict";
  const KINDS = ["auto", "light", "dark"];

  const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const hex = (channels) => "#" + channels.map((value) => Math.round(value).toString(16).padStart(2, "0")).join("");

  // from one colour a share of the way to another
  X.mix = (from, to, share) => {
    const a = parse(from), b = parse(to);
    return hex(a.map((value, i) => value + share * (b[i] - value)));
  };

  X.Theme = class {
    constructor(button, changed) {
      this.kind = "auto";
      this.system = matchMedia("(prefers-color-scheme: dark)");
      this.system.addEventListener("change", () => this.apply());
      this.changed = changed;
      this.button = button;
      button.addEventListener("click", () => {
        this.kind = KINDS[(KINDS.indexOf(this.kind) + 1) % KINDS.length];
        this.apply();
      });
      this.apply(false);
    }

    get dark() {
      return this.kind === "dark" || (this.kind === "auto" && this.system.matches);
    }

    apply(tell = true) {
      document.documentElement.dataset.theme = this.dark ? "dark" : "light";
      this.button.textContent = `Theme: ${this.kind}`;
      const style = getComputedStyle(document.documentElement);
      this.colours = Object.fromEntries(["page", "panel", "ink", "soft", "line", "grid", "warn"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
      if (tell) this.changed();
    }

    // an architecture's colour, lighter on dark
    of(colour) {
      return this.dark ? X.mix(colour, "#ffffff", 0.35) : colour;
    }

    // from high losses to low ones
    palette(colour) {
      const low = X.mix(this.of(colour), this.colours.page, 0.45);
      return X.range(64, (i) => X.mix(low, this.colours.page, Math.pow(i / 63, 0.7)));
    }

    paint(fig) {
      const { page, ink, soft, line, grid } = this.colours;
      fig.background_fill_color = page;
      fig.border_fill_color = page;
      fig.outline_line_color = line;
      fig.title.text_color = ink;
      for (const axis of [...fig.below, ...fig.left]) {
        axis.axis_label_text_color = soft;
        axis.major_label_text_color = soft;
        axis.axis_line_color = line;
        axis.major_tick_line_color = line;
        axis.minor_tick_line_color = null;
        axis.axis_label_text_font_style = "normal";
      }
      for (const one of fig.center) if (one.type === "Grid") one.grid_line_color = grid;
    }
  };
})((globalThis.Explorer ??= {}));
