"use strict";
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);

  // What is remembered between visits; a browser may refuse, then it lasts as long as the page.
  const memory = {
    get(name) { try { return localStorage.getItem(name); } catch { return null; } },
    set(name, value) { try { localStorage.setItem(name, value); } catch { /* no place to keep it */ } },
  };

  function setLanguage(language) {
    root.dataset.lang = language;
    root.lang = language;
  }
  setLanguage(memory.get("report language") || (navigator.language.startsWith("zh") ? "zh" : "en"));
  byId("language").onclick = () => {
    setLanguage(root.dataset.lang === "en" ? "zh" : "en");
    memory.set("report language", root.dataset.lang);
  };

  if (memory.get("report theme")) root.dataset.theme = memory.get("report theme");
  byId("theme").onclick = () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    memory.set("report theme", root.dataset.theme);
  };

  for (const box of document.querySelectorAll("input[type=checkbox]")) {
    box.onchange = () => root.classList.toggle(`no-${box.id}`, !box.checked);
  }
})();
