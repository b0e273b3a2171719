for (const box of page.all("input[type=checkbox]")) {
  box.onchange = () => page.root.classList.toggle(`no-${box.id}`, !box.checked);
}
