"use strict";
// Sorting by a click on a heading and filtering by words; without this script the page is complete.

const rowsOf = (body) => [...body.rows].filter((row) => !row.classList.contains("group"));

function keyOf(row, index) {
  const cell = row.cells[index];
  const raw = cell.dataset.value ?? cell.textContent.trim();
  const number = Number(raw);
  return raw === "" || Number.isNaN(number) ? raw : number;
}

function compare(a, b) {
  const numbers = (typeof a === "number") - (typeof b === "number");
  if (numbers !== 0) return -numbers;
  return typeof a === "number" ? a - b : a.localeCompare(b);
}

function sort(table, index, descending) {
  for (const body of table.tBodies) {
    const rows = rowsOf(body);
    rows.sort((a, b) => compare(keyOf(a, index), keyOf(b, index)) * (descending ? -1 : 1));
    body.append(...rows);
  }
  [...table.tHead.rows[0].cells].forEach((cell, at) => {
    if (at === index) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((cell, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = cell.textContent;
    button.addEventListener("click", () => sort(table, index, cell.getAttribute("aria-sort") === "ascending"));
    cell.replaceChildren(button);
  });
}

function filter(words) {
  const holds = (text) => words.every((word) => text.toLowerCase().includes(word));
  for (const body of document.querySelectorAll("main tbody")) {
    const group = body.querySelector(".group");
    const rows = rowsOf(body);
    for (const row of rows) row.hidden = !holds(`${group ? group.textContent : ""} ${row.textContent}`);
    if (group) group.hidden = rows.every((row) => row.hidden);
  }
  for (const failure of document.querySelectorAll(".failure")) failure.hidden = !holds(failure.textContent);
}

function addFilter(place) {
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = "Filter rows";
  input.setAttribute("aria-label", "Show only rows and failures with these words");
  input.addEventListener("input", () => filter(input.value.toLowerCase().split(/\s+/).filter(Boolean)));
  place.append(input);
}

document.querySelectorAll("table").forEach(makeSortable);
addFilter(document.getElementById("tools"));
