(() => {
  const { byId, all, memory } = page;
  const place = "review decisions of " + document.body.dataset.memory;

  // Part -> row of the file that build.py reads.
  let decisions = new Map();
  try { decisions = new Map(JSON.parse(memory.get(place) || "[]").map((row) => [row.id, row])); } catch { /* start empty */ }

  function show() {
    for (const button of all("button[data-decision]")) {
      const row = decisions.get(button.closest("figure").dataset.part);
      button.setAttribute("aria-pressed", String(row !== undefined && row.decision === button.dataset.decision));
    }
    byId("count").textContent = decisions.size;
    byId("decisions").hidden = decisions.size === 0;
  }

  function decide(figure, decision, changes) {
    const { part, image, kind } = figure.dataset;
    decisions.set(part, { id: part, decision, ...changes, image, kind });
    keep();
  }

  function keep() {
    memory.set(place, JSON.stringify([...decisions.values()]));
    show();
  }

  function goodBoxes(boxes, mayBeEmpty) {
    const good = (box) => Array.isArray(box) && box.length === 4 && box.every(Number.isFinite) && box[0] < box[2] && box[1] < box[3];
    return Array.isArray(boxes) && (boxes.length > 0 || mayBeEmpty) && boxes.every(good);
  }

  // The new values of an edit; null if they cannot be used.
  function changesOf(form, figure) {
    const changes = {};
    for (const label of all("label:not([hidden])", form)) {
      const field = label.dataset.field;
      const text = label.querySelector("input, textarea, select").value.trim();
      if (field !== "boxes") {
        if (!text) return null;
        if (text !== figure.dataset[field === "language" ? field : "phrase"]) changes[field] = text;
        continue;
      }
      let boxes;
      try { boxes = JSON.parse(text); } catch { return null; }
      if (!goodBoxes(boxes, figure.dataset.level === "target")) return null;
      if (JSON.stringify(boxes) !== JSON.stringify(JSON.parse(figure.dataset.boxes))) changes.boxes = boxes;
    }
    return Object.keys(changes).length ? changes : null;
  }

  function openEditor(figure) {
    if (figure.querySelector(".editor")) return;
    const form = byId("editor").content.firstElementChild.cloneNode(true);
    const fields = { target: ["phrase", "language", "boxes"], box: ["boxes"], turn: ["answer"] }[figure.dataset.level];
    const earlier = decisions.get(figure.dataset.part) || {};
    for (const label of all("label", form)) {
      const field = label.dataset.field;
      label.hidden = !fields.includes(field);
      const before = { boxes: figure.dataset.boxes, language: figure.dataset.language }[field] ?? figure.dataset.phrase;
      const value = field === "boxes" && earlier.boxes ? JSON.stringify(earlier.boxes) : earlier[field] ?? before;
      label.querySelector("input, textarea, select").value = value;
    }
    form.querySelector(".units").textContent = `(${figure.dataset.units})`;
    form.querySelector(".cancel").onclick = () => form.remove();
    form.onsubmit = (event) => {
      event.preventDefault();
      const changes = changesOf(form, figure);
      form.querySelector(".mistake").hidden = changes !== null;
      if (changes === null) return;
      decide(figure, "edit", changes);
      form.remove();
    };
    figure.append(form);
    form.querySelector("label:not([hidden]) input, label:not([hidden]) textarea").focus();
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-decision]");
    if (button) {
      const figure = button.closest("figure");
      if (button.getAttribute("aria-pressed") === "true") {
        decisions.delete(figure.dataset.part);
        keep();
      } else if (button.dataset.decision === "edit") {
        openEditor(figure);
      } else {
        decide(figure, button.dataset.decision, {});
      }
    }
    const filter = event.target.closest("button[data-filter]");
    if (filter) {
      for (const other of all("button[data-filter]")) other.setAttribute("aria-pressed", String(other === filter));
      for (const section of all(".kind")) section.hidden = filter.dataset.filter !== "" && section.dataset.kind !== filter.dataset.filter;
    }
  });

  byId("clear").onclick = () => {
    decisions.clear();
    keep();
  };

  byId("download").onclick = () => {
    const text = JSON.stringify({ decisions: [...decisions.values()] }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "review_decisions.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };

  show();
})();
