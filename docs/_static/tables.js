// A click on the head of a column sorts its table; numbers by their value, in front of cells without one.
"use strict";

const number = (text) => (/^[≈\s]*[−-]?\d/.test(text) ? parseFloat(text.replace("−", "-").match(/-?\d+(\.\d+)?/)[0]) : Infinity);

Tablesort.extend("number", () => false, (a, b) => (number(a) === number(b) ? 0 : number(b) - number(a)));
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table")) {
    for (const head of table.querySelectorAll("th.text-right")) head.dataset.sortMethod = "number";
    new Tablesort(table);
  }
});
