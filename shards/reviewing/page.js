(() => {
  const { byId, all, memory } = page;
  const place = "review decisions of " + document.body.dataset.memory;

  // Part -> row of the file that build.py reads; kind -> "accept" or "drop" for all of its parts.
  let decisions = new Map();
  let bulk = new Map();
  try {
    const kept = JSON.parse(memory.get(place) || "{}");
    decisions = new Map((kept.rows || []).map((row) => [row.id, row]));
    bulk = new Map(kept.bulk || []);
  } catch { /* start empty */ }

  // The ids of a whole kind: 8 bytes each, by level.
  function partsOf(kind) {
    const element = all(".bulk").find((each) => each.closest(".kind").dataset.kind === kind);
    const ids = [];
    for (const part of element ? element.dataset.parts.split(" ") : []) {
      const [level, text] = part.split(":");
      const bytes = atob(text);
      for (let i = 0; i < bytes.length; i += 8) {
        let id = level + "-";
        for (let k = i; k < i + 8; k++) id += bytes.charCodeAt(k).toString(16).padStart(2, "0");
        ids.push(id);
      }
    }
    return ids;
  }

  // What is decided in total. A part of two kinds is dropped if one of them is; a decision of its own counts more.
  function rowsOfKinds() {
    const rows = new Map();
    for (const [kind, decision] of bulk) {
      for (const id of partsOf(kind)) {
        if (decision === "drop" || !rows.has(id)) rows.set(id, { id, decision, kind });
      }
    }
    return rows;
  }
  let ofKinds = rowsOfKinds();
  const allRows = () => new Map([...ofKinds, ...decisions]);

  function show() {
    for (const button of all("button[data-decision]")) {
      const figure = button.closest("figure");
      const row = decisions.get(figure.dataset.part) || (figure.dataset.bulk && ofKinds.get(figure.dataset.part));
      button.setAttribute("aria-pressed", String(Boolean(row) && row.decision === button.dataset.decision));
    }
    for (const button of all("button[data-all]")) {
      button.setAttribute("aria-pressed", String(bulk.get(button.closest(".kind").dataset.kind) === button.dataset.all));
    }
    const count = allRows().size;
    byId("count").textContent = count.toLocaleString("en");
    byId("decisions").hidden = count === 0;
  }

  function decide(figure, decision, changes) {
    const { part, image, kind } = figure.dataset;
    decisions.set(part, { id: part, decision, ...changes, image, kind });
    keep();
  }

  function decideAll(kind, decision) {
    if (bulk.get(kind) === decision) bulk.delete(kind);
    else bulk.set(kind, decision);
    const mine = new Set(partsOf(kind));
    for (const [id, row] of decisions) if (mine.has(id) && row.kind === kind && row.decision !== "edit") decisions.delete(id);
    ofKinds = rowsOfKinds();
    keep();
  }

  function keep() {
    memory.set(place, JSON.stringify({ rows: [...decisions.values()], bulk: [...bulk] }));
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

  // The next suspects of a kind, which are in the page but not yet part of what is shown.
  function showMore(button) {
    const section = button.closest(".kind");
    const page = section.querySelector("template.later");
    if (page) {
      section.querySelector(".cards").append(page.content.cloneNode(true));
      page.remove();
    }
    countLeft(button);
    show();
  }

  function countLeft(button) {
    const section = button.closest(".kind");
    const left = all("template.later", section).reduce((sum, page) => sum + page.content.querySelectorAll("article").length, 0);
    button.hidden = left === 0;
    button.querySelector("b").textContent = left.toLocaleString("en");
  }

  // Labels keep the size of text on the screen, however large their picture is.
  function scaleLabels(drawing) {
    const { width, height } = drawing.viewBox.baseVal;
    const shown = drawing.getBoundingClientRect();
    if (!shown.width || !shown.height) return;
    const scale = Math.max(width / shown.width, height / shown.height);
    for (const label of all(".label", drawing)) {
      label.setAttribute("transform", `translate(${label.dataset.x} ${label.dataset.y}) scale(${scale})`);
    }
  }
  const sizes = new ResizeObserver((entries) => entries.forEach((entry) => scaleLabels(entry.target)));
  for (const drawing of all(".layer svg")) sizes.observe(drawing);

  const large = byId("large");
  let enlarged = null;
  function enlarge(picture) {
    enlarged = picture;
    const stage = large.querySelector(".stage");
    const copy = document.createElement("div");
    copy.className = picture.classList.contains("two") ? "two" : "";
    for (const child of picture.children) copy.append(child.cloneNode(true));
    stage.replaceChildren(copy);
    const caption = picture.closest("figure").querySelector("figcaption > b, figcaption");
    large.querySelector("p").textContent = picture.querySelector("img").alt || caption.textContent;
    if (!large.open) large.showModal();
    for (const drawing of all("svg", copy)) sizes.observe(drawing);
  }
  large.onclick = () => large.close();
  large.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const visible = all("main .open").filter((picture) => picture.offsetParent !== null);
    const next = visible[visible.indexOf(enlarged) + step];
    if (next) enlarge(next);
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-decision]");
    if (button) {
      const figure = button.closest("figure");
      const isOwn = decisions.has(figure.dataset.part);
      if (button.getAttribute("aria-pressed") === "true") {
        if (isOwn) decisions.delete(figure.dataset.part);
        else if (button.dataset.decision === "drop") decisions.set(figure.dataset.part, { id: figure.dataset.part, decision: "accept", image: figure.dataset.image, kind: figure.dataset.kind });
        keep();
      } else if (button.dataset.decision === "edit") {
        openEditor(figure);
      } else {
        decide(figure, button.dataset.decision, {});
      }
    }
    const whole = event.target.closest("button[data-all]");
    if (whole) decideAll(whole.closest(".kind").dataset.kind, whole.dataset.all);
    const more = event.target.closest("button.show-more");
    if (more) showMore(more);
    const tab = event.target.closest("button[data-gallery]");
    if (tab) {
      for (const other of all("button[data-gallery]")) {
        other.setAttribute("aria-pressed", String(other === tab));
        byId(`gallery-${other.dataset.gallery}`).hidden = other !== tab;
      }
    }
    const picture = event.target.closest("main .open");
    if (picture) enlarge(picture);
    const filter = event.target.closest("button[data-filter]");
    if (filter) {
      for (const other of all("button[data-filter]")) other.setAttribute("aria-pressed", String(other === filter));
      for (const section of all(".kind:not([data-kind^='note.'])")) section.hidden = filter.dataset.filter !== "" && section.dataset.kind !== filter.dataset.filter;
    }
  });

  byId("clear").onclick = () => {
    decisions.clear();
    bulk.clear();
    ofKinds = rowsOfKinds();
    keep();
  };

  byId("download").onclick = () => {
    const text = JSON.stringify({ decisions: [...allRows().values()] }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "review_decisions.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };

  for (const button of all("button.show-more")) countLeft(button);
  show();
})();
