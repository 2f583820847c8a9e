// Tables of the class `sortable`: a click on the title of a column sorts by it, a second one reverses.
"use strict";

/** The first number in a text, or null. "51.6 ± 0.3" is 51.6, "2,701,442 / 27,955,970" is 2701442. */
function firstNumber(text) {
  const found = text.replace(/(\d),(?=\d{3})/g, "$1").match(/[-+−]?\d+(\.\d+)?/);
  return found ? Number(found[0].replace("−", "-")) : null;
}

/** Whether a column is one of numbers: every cell that is not empty begins with one. */
function isNumeric(texts) {
  return texts.every((text) => text === "" || /^[[(]?[-+−]?\d/.test(text));
}

function sortBy(table, column, descending) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row, place) => ({
    row, place, text: row.cells[column].textContent.trim(),
  }));
  const numeric = isNumeric(rows.map((each) => each.text));
  const compare = (one, other) => numeric
    ? firstNumber(one.text) - firstNumber(other.text)
    : one.text.localeCompare(other.text);
  rows.sort((one, other) => {
    if (!one.text || !other.text) { // what is empty stands last, in both directions
      return (one.text ? 0 : 1) - (other.text ? 0 : 1) || one.place - other.place;
    }
    return (descending ? -1 : 1) * compare(one, other) || one.place - other.place;
  });
  body.append(...rows.map((each) => each.row));
  return numeric;
}

function makeSortable(table) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort-button";
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener("click", () => {
      const texts = [...table.tBodies[0].rows].map((row) => row.cells[column].textContent.trim());
      const before = title.getAttribute("aria-sort");
      const descending = before ? before === "ascending" : isNumeric(texts);
      titles.forEach((each) => each.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(table, column, descending);
    });
  });
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("table.sortable").forEach(makeSortable);
});
