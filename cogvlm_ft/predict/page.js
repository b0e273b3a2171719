const at = page.byId;
let photo = null;
let busy = false;

function refresh() {
  at("send").disabled = busy || !photo || !at("asked").value.trim();
}

// A text in both languages; the page shows one of them.
function both(en, zh) {
  return ["en", "zh"].map((language) => {
    const span = element("span", language === "en" ? en : zh);
    span.lang = language;
    return span;
  });
}

function report(parts, bad = false) {
  at("state").replaceChildren(...parts);
  at("state").classList.toggle("bad", bad);
}

function take(file) {
  if (!file) return;
  photo = file;
  const preview = at("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.hidden = false;
  at("hint").textContent = file.name;
  at("result").hidden = true;
  report([]);
  refresh();
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function boxItem(box) {
  const parts = [[box.phrase], [box.xyxy.map((value) => value.toFixed(1)).join(", ") + " px"]];
  if (box.confidence !== null) parts.push([...both("confidence", "置信度"), " " + box.confidence.toFixed(2)]);
  if (box.zoomed) parts.push(both("second look", "二次查看"));
  const item = document.createElement("li");
  const shown = parts.filter((part) => part[0]);
  item.append(...shown.flatMap((part, number) => (number ? [" · ", ...part] : part)));
  return item;
}

function show(found) {
  at("picture").src = found.picture;
  at("answers").replaceChildren(
    ...found.answers.map((answer) => {
      const article = document.createElement("article");
      const list = document.createElement("ul");
      list.append(...(answer.boxes || []).map(boxItem));
      article.append(element("h2", answer.prompt), element("p", answer.answer || "…"), list);
      if (answer.truncated) {
        const note = element("p", "");
        note.append(...both("The answer was cut at the token limit.", "回答达到词元上限，被截断。"));
        article.append(note);
      }
      return article;
    }),
  );
  at("result").hidden = false;
}

async function ask() {
  busy = true;
  refresh();
  report(both("The model is answering …", "模型正在回答……"));
  const mode = document.querySelector("[name=mode]:checked").value;
  const query = new URLSearchParams({ asked: at("asked").value, mode });
  try {
    const response = await fetch("ask?" + query, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: photo,
    });
    const found = await response.json().catch(() => ({ error: "HTTP " + response.status }));
    if (response.ok) {
      show(found);
      report([]);
    } else {
      report([found.error], true);
    }
  } catch (error) {
    report([...both("The program does not respond.", "程序没有响应。"), " " + error], true);
  }
  busy = false;
  refresh();
}

at("preview").addEventListener("error", () => { at("preview").hidden = true; });
at("photo").addEventListener("change", () => take(at("photo").files[0]));
at("asked").addEventListener("input", refresh);
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!at("send").disabled) ask();
});
at("asked").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("drop").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") at("photo").click();
});
for (const name of ["dragover", "dragleave", "drop"]) {
  at("drop").addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
addEventListener("paste", (event) => take(event.clipboardData.files[0]));
refresh();
