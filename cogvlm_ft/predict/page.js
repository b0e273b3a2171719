const at = page.byId;
const MAX_KEPT = 30;
const NUM_COLOURS = 7;
const asked = []; // the newest first
const files = []; // addresses of the files that can be saved
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
  if (box.zoomed) parts.push(both("second look", "放大后再次回答"));
  const item = document.createElement("li");
  const shown = parts.filter((part) => part[0]);
  item.append(...shown.flatMap((part, number) => (number ? [" · ", ...part] : part)));
  return item;
}

// What an answer without boxes means, and that it ends too early.
// The first answer of a conversation names what is present, without boxes.
function notices(answer, isAlone) {
  const found = [];
  const isFirst = document.body.dataset.style === "conversation" && !isAlone && !answer.answer.includes("[");
  if (answer.not_found) {
    found.push(["soft", "Not found: the model reports that the target is absent.", "未找到：模型认为目标不存在。"]);
  } else if (!answer.boxes && !isFirst) {
    found.push(["bad", "No box could be read from this answer.", "无法从该回答中读出框。"]);
  }
  if (answer.truncated) {
    found.push(["bad", "The answer was cut off at the token limit.", "回答达到词元上限，被截断。"]);
  }
  return found.map(([kind, en, zh]) => {
    const notice = document.createElement("p");
    notice.className = `notice ${kind}`;
    notice.append(...both(en, zh));
    return notice;
  });
}

function articleOf(answer, number, all) {
  const article = document.createElement("article");
  const question = element("h2", answer.prompt);
  const chip = document.createElement("i");
  chip.className = `chip t${number % NUM_COLOURS}`;
  question.prepend(chip);
  const list = document.createElement("ul");
  list.append(...(answer.boxes || []).map(boxItem));
  article.append(question, element("p", answer.answer || "…"), ...notices(answer, all.length === 1), list);
  return article;
}

function offer(link, name, content, type) {
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  files.push(link.href);
}

function show(entry) {
  const { name, found } = entry;
  at("picture").src = found.picture;
  at("answers").replaceChildren(...found.answers.map(articleOf));
  files.splice(0).forEach((address) => URL.revokeObjectURL(address));
  const bytes = Uint8Array.from(atob(found.picture.split(",")[1]), (char) => char.charCodeAt(0));
  const stem = name.replace(/\.[^.]*$/, "") || "photo";
  offer(at("save-picture"), `${stem}-answer.jpg`, bytes, "image/jpeg");
  const { picture, ...fields } = found;
  const text = JSON.stringify({ image: name, ...fields }, null, 2) + "\n";
  offer(at("save-json"), `${stem}-answer.json`, text, "application/json");
  at("result").hidden = false;
  for (const other of asked) other.button.setAttribute("aria-pressed", other === entry);
}

function keep(name, found) {
  const entry = { name, found, button: document.createElement("button") };
  const image = document.createElement("img");
  image.src = found.picture;
  image.alt = "";
  const text = element("span", found.answers.map((answer) => answer.prompt).join(" · "));
  text.append(element("small", name));
  entry.button.type = "button";
  entry.button.append(image, text);
  entry.button.addEventListener("click", () => show(entry));
  asked.unshift(entry);
  asked.splice(MAX_KEPT);
  at("asked-before").replaceChildren(...asked.map((each) => each.button));
  at("history").hidden = asked.length < 2;
  return entry;
}

async function ask() {
  busy = true;
  refresh();
  report(both("The model is answering …", "模型正在回答……"));
  const name = photo.name || "photo";
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
      show(keep(name, found));
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

page.enlarge("#picture");
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
