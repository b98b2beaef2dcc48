// The page works without this: it adds the switch of the theme, the filter of claims, copying, and opens details.
"use strict";
const root = document.documentElement;
try {
  const theme = localStorage.getItem("xlstm-scaling-theme");
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
} catch { /* no storage: the system's theme holds */ }

document.addEventListener("DOMContentLoaded", () => {
  themes();
  copying();
  filters();
  contents();
  revealTarget();
  addEventListener("hashchange", revealTarget);
  printing();
});

function themes() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const tell = () => button.setAttribute("aria-pressed", String(dark()));
  button.hidden = false;
  tell();
  system.addEventListener("change", tell);
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("xlstm-scaling-theme", root.dataset.theme); } catch { /* for this visit alone */ }
    tell();
  });
}

function copying() {
  for (const button of document.querySelectorAll("button.copy")) {
    const block = document.getElementById(button.dataset.copy);
    button.hidden = false;
    button.addEventListener("click", async () => {
      let done = false;
      try {
        await navigator.clipboard.writeText(block.textContent);
        done = true;
      } catch {
        // file: pages may have no clipboard: leave the text selected
        getSelection().selectAllChildren(block);
        done = document.execCommand("copy");
      }
      button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
      setTimeout(() => { button.textContent = "Copy"; }, 2500);
    });
  }
}

function filters() {
  const form = document.querySelector("form.filter");
  if (!form) return;
  const rows = [...document.querySelectorAll("table.claims tbody tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const [words, verdict, topic] = ["words", "verdict", "topic"].map((name) => document.getElementById("claim-" + name));
  const count = document.getElementById("claim-count");
  const apply = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, index) => {
      const keep = (!verdict.value || row.dataset.verdict === verdict.value)
        && (!topic.value || row.dataset.topic === topic.value)
        && wanted.every((word) => texts[index].includes(word));
      row.hidden = !keep;
      shown += keep;
    });
    count.textContent = `${shown} of ${rows.length} claims`;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}

function contents() {
  const links = new Map([...document.querySelectorAll(".contents a[href^='#']")].map((a) => [a.hash.slice(1), a]));
  const strip = document.querySelector(".contents ol");
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((a) => a.removeAttribute("aria-current"));
      const link = links.get(entry.target.id);
      link?.setAttribute("aria-current", "true");
      if (link && strip.scrollWidth > strip.clientWidth) strip.scrollLeft = link.offsetLeft - 20;
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  links.forEach((_, id) => watch.observe(document.getElementById(id)));
}

function revealTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  let opened = false;
  if (target.hidden) { target.hidden = false; opened = true; }
  for (let box = target.closest("details"); box; box = box.parentElement.closest("details")) {
    if (!box.open) { box.open = true; opened = true; }
  }
  if (opened) target.scrollIntoView();
}

function printing() {
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open], .settings)")];
    closed.forEach((box) => { box.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((box) => { box.open = false; }));
}
