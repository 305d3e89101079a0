// Makes the elements and numbers of the pages; read before page.js and results_page.js.
"use strict";
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node[name] = value;
    else if (name === "style") Object.assign(node.style, value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity));
  return node;
}
const el = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);
const percent = (value, digits = 2) => value === null ? "–" : (100 * value).toFixed(digits);
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const number = (value) => value.toLocaleString("en-GB");
const plural = (count, one) => `${number(count)} ${one}${count === 1 ? "" : "s"}`;
const swatch = (kind) => el("span", { class: `swatch ${kind}`, "aria-hidden": "true" });
const table = (attributes, head, body) =>
  el("table", attributes, el("thead", {}, head), el("tbody", {}, body));
