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
  const row = (tag, kind, data, how, ...numbers) => el("tr", { class: kind }, el(tag, {}, data),
    el(tag, { class: "words" }, how), numbers.map((value, i) =>
      el(tag, { class: i === 1 ? "main" : "" }, value)));
  const percents = (scores) =>
    metrics.map((name) => name in scores ? percent(scores[name]) : "");
  const body = results.flatMap((result) => {
    const link = el("a", { href: address(result) }, `${result.dataset} ${result.split}`);
    const swapped = result.swapped_sentences ? ", sentences swapped" : "";
    const how = `${result.protocol}, threshold ${result.threshold}${swapped}`;
    return [row("td", "", link, how, number(result.sentences), ...percents(result)),
      row("td", "quiet", "", "a perfect model", "", ...percents(result.ceiling))];
  });
  const head = row("th", "", "data", "protocol", "sentences", ...metrics);
  $("scores").append(table({}, head, body));
})();
