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

  return { root, byId, all, memory };
})();
