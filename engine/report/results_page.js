// Lists RESULTS (results.js), a link each; a single one is opened at once.
"use strict";
(() => {
  const results = window.RESULTS;
  const address = (result) => `${encodeURIComponent(result.page)}/index.html`;
  if (results.length === 1) {
    location.replace(address(results[0]));
    return;
  }
  const metrics = [...new Set(results.flatMap((result) => Object.keys(result.ceiling)))];
  const percent = (value) => value === undefined ? "" : value === null ? "–" : (100 * value).toFixed(2);
  const make = (tag, ...children) => {
    const node = document.createElement(tag);
    node.append(...children);
    return node;
  };
  const row = (tag, cells) => {
    const line = make("tr", ...cells.map((cell) => make(tag, cell)));
    line.cells[1].className = "words";
    return line;
  };
  const body = results.flatMap((result) => {
    const link = make("a", `${result.dataset} ${result.split}`);
    link.href = address(result);
    const how = `${result.protocol}, threshold ${result.threshold}${result.swapped_sentences ? ", sentences swapped" : ""}`;
    const count = result.sentences.toLocaleString("en-GB");
    const scores = row("td", [link, how, count, ...metrics.map((name) => percent(result[name]))]);
    scores.cells[3].className = "main";
    const ceiling = row("td", ["", "a perfect model", "", ...metrics.map((name) => percent(result.ceiling[name]))]);
    ceiling.className = "quiet";
    return [scores, ceiling];
  });
  const head = make("thead", row("th", ["data", "protocol", "sentences", ...metrics]));
  document.getElementById("scores").append(make("table", head, make("tbody", ...body)));
})();
