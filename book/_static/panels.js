// Moves the panels of the page "Move it yourself". All numbers and rows are in the page, as JSON: nothing is fetched.
"use strict";

const panels = JSON.parse(document.getElementById("panels").textContent);

// What a table says of a position; one that is no list says the same of all.
const at = (table, place) => place.reduce((part, index) => (Array.isArray(part) ? part[index] : part), table);

function values(panel, place) {
  const known = { shown: [...at(panel.marks, place)].filter((mark) => mark === "1").length };
  Object.entries(panel.controls).forEach(([name, choices], k) => { known[name] = choices[place[k]]; });
  Object.entries(panel.numbers).forEach(([name, table]) => { known[name] = at(table, place); });
  return known;
}

function draw(form, panel, inputs) {
  const place = inputs.map((input) => Number(input.value));
  const known = values(panel, place);
  const filled = (text) => text.replace(/\{(\w+)\}/g, (_, name) => known[name]);
  form.querySelectorAll("[data-row]").forEach((layer) => {
    layer.style.setProperty("--row", at(panel.rows[layer.dataset.row], place));
  });
  form.querySelectorAll("[data-fades]").forEach((layer) => { layer.style.opacity = known.opacity; });
  form.querySelectorAll("[data-says]").forEach((part) => { part.textContent = filled(part.dataset.says); });
  form.querySelectorAll("[data-alt]").forEach((image) => { image.setAttribute("aria-label", filled(image.dataset.alt)); });
  form.querySelectorAll("[data-value]").forEach((input) => {
    input.setAttribute("aria-valuetext", filled(input.dataset.value));
  });
  form.querySelectorAll(".marks li").forEach((item, k) => {
    const mark = at(panel.marks, place)[k];
    item.className = `mark-${mark}`;
    item.textContent = panel.words[Number(mark)];
  });
}

document.querySelectorAll("form.panel").forEach((form) => {
  const panel = panels[form.dataset.panel];
  const inputs = Object.keys(panel.controls).map((name) => form.elements.namedItem(name));
  form.addEventListener("submit", (event) => event.preventDefault());
  inputs.forEach((input) => {
    input.disabled = false;
    input.addEventListener("input", () => draw(form, panel, inputs));
  });
  draw(form, panel, inputs);
});
