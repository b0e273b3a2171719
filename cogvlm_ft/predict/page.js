"use strict";

const at = (id) => document.getElementById(id);
let photo = null;
let busy = false;

function refresh() {
  at("send").disabled = busy || !photo || !at("asked").value.trim();
}

function say(text, bad = false) {
  at("state").textContent = text;
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
  say("");
  refresh();
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function boxLine(box) {
  const parts = [box.phrase, box.xyxy.map((value) => value.toFixed(1)).join(", ") + " px"];
  if (box.confidence !== null) parts.push("confidence 置信度 " + box.confidence.toFixed(2));
  if (box.zoomed) parts.push("second look 二次查看");
  return parts.filter(Boolean).join(" · ");
}

function show(found) {
  at("picture").src = found.picture;
  at("answers").replaceChildren(
    ...found.answers.map((answer) => {
      const article = document.createElement("article");
      const list = document.createElement("ul");
      list.append(...(answer.boxes || []).map((box) => element("li", boxLine(box))));
      article.append(element("h2", answer.prompt), element("p", answer.answer || "…"), list);
      return article;
    }),
  );
  at("result").hidden = false;
}

async function ask() {
  busy = true;
  refresh();
  say("The model is looking … 模型正在查看……");
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
      say("");
    } else {
      say(found.error, true);
    }
  } catch (error) {
    say("The program does not answer. 程序没有响应。 " + error, true);
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
