for (const box of page.all("input[type=checkbox]")) {
  box.onchange = () => page.root.classList.toggle(`no-${box.id}`, !box.checked);
}
page.fold();
page.hintAtScrolling();
page.enlarge(".photo, .chart");

// Tables: a click on a heading sorts, the largest number first, then the other way round.
const valueOf = (row, column) => {
  const text = row.cells[column].innerText.trim();
  const number = Number(text.replace(/[,%]/g, ""));
  return text === "–" ? -Infinity : Number.isNaN(number) ? text : number;
};
const compare = (a, b) => (typeof a === typeof b && typeof a === "string" ? a.localeCompare(b) : a < b ? -1 : Number(a > b));
for (const heading of page.all(".sortable th")) {
  heading.tabIndex = 0;
  const sort = () => {
    const table = heading.closest("table");
    const upwards = heading.getAttribute("aria-sort") === "descending";
    for (const other of page.all("th", table)) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", upwards ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows];
    const column = heading.cellIndex;
    rows.sort((a, b) => (upwards ? 1 : -1) * compare(valueOf(a, column), valueOf(b, column)));
    table.tBodies[0].append(...rows);
  };
  heading.addEventListener("click", sort);
  heading.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
}
for (const field of page.all(".filter")) {
  field.addEventListener("input", () => {
    const sought = field.value.trim().toLowerCase();
    for (const row of page.all("tbody tr", page.byId(field.dataset.filters))) {
      row.hidden = !row.textContent.toLowerCase().includes(sought);
    }
  });
}

// Charts: the values under the pointer.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;

function valueAt(drawing, axis, place) {
  const [low, high] = drawing.dataset[axis].split(" ").map(Number);
  const { left, right, top, bottom } = drawing.dataset;
  const part = axis === "x" ? (place - left) / (right - left) : (bottom - place) / (bottom - top);
  const isLog = drawing.dataset.logs.includes(axis);
  const value = isLog ? low * (high / low) ** part : low + part * (high - low);
  return Number(value.toPrecision(4)).toString();
}

function describe(drawing, across) {
  const found = page.all(".line polyline, .dashed polyline", drawing).map((line) => {
    const points = [...line.points];
    return { line, point: points.reduce((a, b) => (Math.abs(b.x - across) < Math.abs(a.x - across) ? b : a)) };
  });
  if (!found.length) return [];
  const title = document.createElement("p");
  title.textContent = valueAt(drawing, "x", found[0].point.x);
  const legend = drawing.closest(".panel")?.querySelector(".legend");
  return [title, ...found.map(({ line, point }) => {
    const row = document.createElement("p");
    const name = [...line.parentNode.classList].find((each) => /^c\d$/.test(each));
    const label = legend?.querySelector(`.key.${name}`)?.parentNode.cloneNode(true);
    row.append(...(label ? [label, " "] : []), valueAt(drawing, "y", point.y));
    return row;
  })];
}

document.addEventListener("pointermove", (event) => {
  const drawing = event.target.closest?.(".chart[data-x]");
  if (!drawing) {
    tip.hidden = true;
    return;
  }
  const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
  const rows = describe(drawing, place.x);
  tip.replaceChildren(...rows);
  tip.hidden = !rows.length;
  (drawing.closest("dialog") || document.body).append(tip);
  const isRight = event.clientX > innerWidth / 2;
  tip.style.left = isRight ? "auto" : `${event.clientX + 14}px`;
  tip.style.right = isRight ? `${innerWidth - event.clientX + 14}px` : "auto";
  tip.style.top = `${event.clientY + 14}px`;
});
