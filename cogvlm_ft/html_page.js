"use strict";
const page = (() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // What is remembered between visits; a browser may refuse, then it lasts as long as the page.
  const memory = {
    get(name) { try { return localStorage.getItem(name); } catch { return null; } },
    set(name, value) { try { localStorage.setItem(name, value); } catch { /* nothing is kept */ } },
  };

  function setLanguage(language) {
    root.dataset.lang = language;
    root.lang = language;
  }
  setLanguage(memory.get("page language") || (navigator.language.startsWith("zh") ? "zh" : "en"));
  byId("language").onclick = () => {
    setLanguage(root.dataset.lang === "en" ? "zh" : "en");
    memory.set("page language", root.dataset.lang);
  };

  if (memory.get("page theme")) root.dataset.theme = memory.get("page theme");
  byId("theme").onclick = () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    memory.set("page theme", root.dataset.theme);
  };

  // Click on a drawing to see it large, with what is said about it; a click or Escape closes it.
  function enlarge(selector) {
    const dialog = document.createElement("dialog");
    dialog.className = "zoomed";
    dialog.onclick = () => dialog.close();
    document.body.append(dialog);
    const open = (drawing) => {
      const words = drawing.closest("figure, .panel")?.querySelector("figcaption, h3");
      dialog.replaceChildren(drawing.cloneNode(true), ...(words ? [words.cloneNode(true)] : []));
      dialog.showModal();
    };
    for (const drawing of all(selector)) {
      drawing.tabIndex = 0;
      drawing.addEventListener("click", () => open(drawing));
      drawing.addEventListener("keydown", (event) => { if (event.key === "Enter") open(drawing); });
    }
  }

  // Sections fold: on a phone all but those marked first are closed. A link opens the section that it leads to.
  function fold() {
    const small = matchMedia("(max-width: 560px)").matches;
    for (const section of all("details.fold")) section.open = !small || section.hasAttribute("data-first");
    const reveal = () => {
      for (let at = byId(location.hash.slice(1)); at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
      byId(location.hash.slice(1))?.querySelector("details.fold")?.setAttribute("open", "");
    };
    addEventListener("hashchange", reveal);
    reveal();
  }

  // A wide table says that it can be moved sideways.
  function hintAtScrolling() {
    const watch = new ResizeObserver((seen) => {
      for (const { target } of seen) target.classList.toggle("more", target.scrollWidth > target.clientWidth + 1);
    });
    for (const area of all(".scroll")) watch.observe(area);
  }

  return { root, byId, all, memory, enlarge, fold, hintAtScrolling };
})();
