// Draws a report from REPORT (data.js) and, once they are there, MASKS (masks.js).
// Everything that comes from the data is set as text; nothing is read from a network.
"use strict";
(() => {
  const report = window.REPORT;
  const { models, rows, photos, groupings } = report;
  const isPair = models.length === 2;
  const PAGE_SIZE = 24;
  const TRUTH = [46, 204, 113], COLORS = [[255, 64, 129], [64, 128, 255]];
  const $ = (id) => document.getElementById(id);

  // ------------------------------------------------------------------------------------ small tools

  const SVG = "http://www.w3.org/2000/svg";
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return node;
  }
  const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
  const percent = (value, digits = 2) => value === null ? "–" : (100 * value).toFixed(digits);
  const main = report.metrics[0]; // gIoU where some sentences have no target
  const signed = (value, digits = 2) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  const number = (value) => value.toLocaleString("en-GB");
  const plural = (count, one) => `${number(count)} ${one}${count === 1 ? "" : "s"}`;
  const swatch = (model) => el("span", { class: `swatch m${model}`, "aria-hidden": "true" });

  // ------------------------------------------------------------------------------------------- head

  const fact = (name, value) => el("span", {}, `${name} `, el("b", {}, String(value)));

  function drawHead() {
    const first = models[0];
    document.title = `${report.title}: ${isPair ? "comparison" : first.protocol}`;
    $("title").textContent = isPair ? `${report.title}: ${models[1].name} against ${models[0].name}` : report.title;
    const facts = [fact("data set", first.dataset), fact("split", first.split), fact("refs", number(first.refs)),
      fact("sentences", number(report.sentences)), ...(isPair ? [] : modelFacts(first))];
    $("facts").append(...facts.flatMap((node) => [node, " "]));
  }

  function modelFacts(model) {
    const facts = [fact("protocol", model.protocol), fact("threshold", model.threshold)];
    facts.push(fact("checkpoint", model.checkpoint));
    if (model.swapped_sentences) facts.push(fact("sentences are", "swapped with those of another object of the photo"));
    return facts;
  }

  function drawScores() {
    const title = (name) => name === "N-acc" ? `N-acc (none: ${models[0].no_target_rule})` : name;
    const head = el("tr", {}, el("th", {}, "per cent"), report.metrics.map((name) => el("th", { scope: "col" }, title(name))));
    const body = [];
    models.forEach((model, m) => {
      const label = isPair
        ? [swatch(m), el("b", {}, model.name), el("small", {}, ...modelFacts(model).flatMap((node) => [node, "  "]))]
        : ["this model"];
      body.push(scoreRow("", label, (name) => percent(model[name])));
      if (!isPair || JSON.stringify(model.ceiling) !== JSON.stringify(models[1 - m].ceiling) || m === 1) {
        body.push(scoreRow("quiet", ["a perfect model at this input size and protocol"], (name) => percent(model.ceiling[name])));
      }
    });
    if (isPair) {
      const { intervals, level } = report.comparison;
      const label = [`${models[1].name} − ${models[0].name}`, el("small", {}, `[${percent(level, 0)} % interval]`)];
      body.push(scoreRow("difference", label, (name) => {
        const [difference, low, high] = intervals[name].map((value) => 100 * value);
        return [signed(difference), el("small", {}, `[${signed(low)}, ${signed(high)}]`)];
      }));
    }
    $("scores").append(el("table", {}, el("thead", {}, head), el("tbody", {}, body)));
    if (isPair) drawOutcome();
  }

  function scoreRow(kind, label, value) {
    const cells = report.metrics.map((name) => el("td", { class: name === main ? "main" : null }, value(name)));
    return el("tr", { class: kind }, el("td", {}, label), cells);
  }

  function drawOutcome() {
    const { won, lost, tied, margin, images, draws } = report.comparison;
    const parts = [["lost", lost], ["tied", tied], ["won", won]].filter(([, count]) => count);
    const bar = el("div", { class: "bar", "aria-hidden": "true" }, parts.map(([name, count]) => {
      const part = el("span", { class: name, title: `${name}: ${number(count)}` });
      part.style.flex = String(count);
      return part;
    }));
    const text = `${models[1].name} won ${number(won)}, lost ${number(lost)}, tied ${number(tied)} ` +
      `(IoU within ${margin}). Intervals: ${number(draws)} draws of ${plural(images, "photo")} with all their ` +
      "sentences, since sentences of one photo are not independent; both models on the same draw.";
    $("scores").append(el("div", { id: "outcomes" }, el("p", { class: "note" }, text), bar));
  }

  // ----------------------------------------------------------------------------------------- charts

  const WIDTH = 420, HEIGHT = 190, LEFT = 38, RIGHT = 6, TOP = 16, BOTTOM = 36;
  const x = (share) => LEFT + share * (WIDTH - LEFT - RIGHT);
  const y = (share) => HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);

  function frame(title, remark, ticks, label, axis, ...content) {
    const lines = ticks.map(([share, text]) => [
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(share), y2: y(share) }),
      svg("text", { x: LEFT - 6, y: y(share) + 4, "text-anchor": "end" }, text),
    ]);
    const below = svg("text", { x: x(0.5), y: HEIGHT - 3, "text-anchor": "middle" }, axis);
    const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": label }, lines, below, content);
    return el("figure", { class: "chart" }, el("figcaption", {}, title, " ", el("span", {}, remark)), drawing);
  }

  const numbersBelow = (values) => values.map((value) =>
    svg("text", { x: x(value), y: y(0) + 14, "text-anchor": "middle" }, value.toFixed(1)));

  const SHARE_TICKS = [0, 0.25, 0.5, 0.75, 1].map((share) => [share, percent(share, 0)]);

  function niceTicks(most) {
    const rough = Math.max(1, most / 4), power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    const top = Math.ceil(most / step) * step;
    return { top, ticks: Array.from({ length: top / step + 1 }, (_, i) => [i * step / top, number(i * step)]) };
  }

  // One slot a label; a bar a model. `heights[model][slot]` in [0, 1] of the axis.
  function bars(heights, slots, tell, onPick) {
    const slot = 1 / slots, gap = slots > 12 ? 0.1 : 0.22;
    const width = slot * (1 - gap) / heights.length;
    const marks = [];
    for (let i = 0; i < slots; i++) {
      heights.forEach((values, m) => {
        const left = i * slot + slot * gap / 2 + m * width;
        marks.push(svg("rect", {
          class: `bar m${m}`, x: x(left), width: Math.max(1, x(left + width) - x(left) - 1),
          y: y(values[i]), height: y(0) - y(values[i]), rx: 1.5,
        }));
      });
      const pick = () => onPick(i);
      marks.push(svg("rect", {
        class: "hit", x: x(i * slot), width: x(slot) - x(0), y: TOP, height: y(0) - TOP,
        tabindex: 0, role: "button", "aria-label": `${tell(i)}: show these sentences`,
        onclick: pick, onkeydown: (event) => { if (event.key === "Enter") pick(); },
      }, svg("title", {}, tell(i))));
    }
    return marks;
  }

  function histogramChart() {
    const slots = report.histogram[0].length;
    const { top, ticks } = niceTicks(Math.max(...report.histogram.flat()));
    const range = (i) => [i / slots, (i + 1) / slots];
    const tell = (i) => `IoU ${range(i).map((end) => end.toFixed(2)).join("–")}: ` +
      report.histogram.map((counts) => plural(counts[i], "sentence")).join(" / ");
    const labels = numbersBelow([0, 0.2, 0.4, 0.6, 0.8, 1]);
    const content = bars(report.histogram.map((counts) => counts.map((count) => count / top)), slots, tell, (i) => {
      const [low, high] = range(i);
      apply({ low: String(+low.toFixed(4)), high: String(+high.toFixed(4)) });
    });
    return frame("Sentences by IoU", "", ticks, "Number of sentences by IoU", "IoU", labels, content);
  }

  function curveChart() {
    const steps = report.curve[0].length - 1;
    const lines = report.curve.map((shares, m) => svg("polyline", {
      class: `curve m${m}`, points: shares.map((share, i) => `${x(i / steps).toFixed(1)},${y(share).toFixed(1)}`).join(" "),
    }));
    const at = report.metrics.filter((name) => name.startsWith("Pr@")).map((name) => [Number(name.slice(3)), name]);
    const dots = models.flatMap((model, m) => at.map(([place, name]) => svg("circle", {
      class: `dot m${m}`, cx: x(place), cy: y(model[name]), r: 3.5,
    }, svg("title", {}, `${isPair ? `${model.name}, ` : ""}${name}: ${percent(model[name])} %`))));
    const ceilings = models.map((model) => svg("polyline", {
      class: "mark", points: at.map(([place, name]) => `${x(place)},${y(model.ceiling[name])}`).join(" "),
    }, svg("title", {}, "a perfect model at this input size and protocol")));
    const labels = numbersBelow([0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]);
    return frame("Pr@X", `% of sentences${main === "gIoU" ? " with a target" : ""}; dashed: perfect model`, SHARE_TICKS,
      "Share of sentences with an IoU above X", "X", labels, ceilings, lines, dots);
  }

  function groupChart(grouping) {
    const count = grouping.labels.length;
    const heights = models.map((_, m) => grouping.rows.map((row) => row.models[m][main]));
    const tell = (i) => `${grouping.labels[i]}: ${main} ` + heights.map((values) => percent(values[i])).join(" / ") +
      ` %, ${plural(grouping.rows[i].sentences, "sentence")}`;
    const labels = grouping.labels.map((label, i) => svg("text", {
      x: x((i + 0.5) / count), y: y(0) + 14, "text-anchor": "middle",
    }, label.replace(" %", "")));
    const numbers = grouping.rows.map((row, i) => svg("text", {
      class: "value", x: x((i + 0.5) / count), y: y(Math.max(...heights.map((values) => values[i]))) - 4, "text-anchor": "middle",
    }, number(row.sentences)));
    const content = bars(heights, count, tell, (i) => apply({ [grouping.key]: String(i) }));
    const title = `${main} by ${grouping.title}`;
    return frame(title, "in %, above: count", SHARE_TICKS, title, "", labels, content, numbers);
  }

  function drawCharts() {
    const scales = groupings.filter((grouping) => grouping.is_scale).map(groupChart);
    $("charts").append(histogramChart(), curveChart(), ...scales);
  }

  // ----------------------------------------------------------------------------------------- tables

  function drawTables() {
    const kinds = groupings.find((grouping) => grouping.key === "kind");
    const brief = kinds.labels.map((label, i) => `${label} ${kinds.rows[i].models.map((scores) => percent(scores[main], 1)).join(" / ")}`);
    $("brief").textContent = `${main} by kind of sentence: ${brief.join(" · ")}`;
    const names = Object.keys(groupings[0].rows[0].models[0]);
    $("tables").querySelector(".columns").classList.toggle("pair", isPair);
    $("tables").querySelector(".columns").append(...groupings.map((grouping) => {
      const heads = models.flatMap((model, m) => names.map((name) => el("th", { scope: "col", title: model.name }, isPair ? swatch(m) : null, name)));
      const head = el("tr", {}, el("th", { scope: "col" }, grouping.title), el("th", { scope: "col" }, "sentences"), heads);
      const order = grouping.labels.map((_, i) => i);
      if (grouping.key === "category") order.sort((a, b) => grouping.rows[b].sentences - grouping.rows[a].sentences);
      const body = order.map((i) => {
        const row = grouping.rows[i];
        const pick = el("button", { type: "button", onclick: () => apply({ [grouping.key]: String(i) }) }, grouping.labels[i]);
        const cells = row.models.flatMap((scores) => names.map((name) => el("td", {}, percent(scores[name]))));
        return el("tr", {}, el("td", {}, pick), el("td", {}, number(row.sentences)), cells);
      });
      return el("div", { class: "scroll" }, el("table", { id: `table-${grouping.key}` }, el("thead", {}, head), el("tbody", {}, body)));
    }));
  }

  // ------------------------------------------------------------------------------------------ masks

  // COCO's compressed run lengths: five bits a character, each run relative to the one before last.
  function decodeRuns(text) {
    const runs = [];
    for (let place = 0; place < text.length;) {
      let value = 0, shift = 0, code;
      do {
        code = text.charCodeAt(place++) - 48;
        value |= (code & 31) << shift;
        shift += 5;
      } while (code & 32);
      if (code & 16 && shift < 32) value |= -1 << shift;
      if (runs.length > 2) value += runs[runs.length - 2];
      runs.push(value);
    }
    return runs;
  }

  // Runs go down the columns. A pixel of the smaller picture is set if any of its pixels is.
  function shrinkMask(runs, height, width, shownHeight, shownWidth) {
    const mask = new Uint8Array(shownHeight * shownWidth);
    const down = shownHeight / height, across = shownWidth / width;
    let start = 0, isSet = false;
    for (const run of runs) {
      for (let at = start; isSet && at < start + run;) {
        const column = Math.floor(at / height), top = at - column * height;
        const bottom = Math.min(height, top + start + run - at);
        const X = Math.min(shownWidth - 1, Math.floor(column * across));
        const last = Math.min(shownHeight - 1, Math.floor((bottom - 1) * down));
        for (let Y = Math.floor(top * down); Y <= last; Y++) mask[Y * shownWidth + X] = 1;
        at += bottom - top;
      }
      start += run;
      isSet = !isSet;
    }
    return mask;
  }

  function paint(pixels, mask, width, color, tint, line) {
    const set = (i, alpha) => {
      if (alpha <= pixels[4 * i + 3] && alpha < 255) return;
      pixels.set(color, 4 * i);
      pixels[4 * i + 3] = alpha;
    };
    for (let i = 0; i < mask.length; i++) {
      if (mask[i] && tint) set(i, tint);
      const right = (i + 1) % width ? i + 1 : i, below = i + width < mask.length ? i + width : i;
      if (line && (mask[i] !== mask[right] || mask[i] !== mask[below])) {
        set(i, 255);
        set(mask[i] !== mask[right] ? right : below, 255);
      }
    }
  }

  function drawMasks(canvas) {
    const { row, layers } = canvas.drawing;
    const [, height, width, shownHeight, shownWidth] = photos[rows.photo[row]];
    canvas.width = shownWidth;
    canvas.height = shownHeight;
    const context = canvas.getContext("2d");
    const image = context.createImageData(shownWidth, shownHeight);
    for (const { model, tint, line } of layers) {
      const text = model === null ? window.MASKS.truth[rows.ref_id[row]] : window.MASKS.predictions[model][row];
      const mask = shrinkMask(decodeRuns(text), height, width, shownHeight, shownWidth);
      paint(image.data, mask, shownWidth, model === null ? TRUTH : COLORS[model], tint, line);
    }
    context.putImageData(image, 0, 0);
    canvas.dataset.drawn = "";
  }

  const waiting = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      if (window.MASKS) drawMasks(target);
      else waiting.add(target);
    }
  }, { rootMargin: "400px" });

  function loadMasks() {
    const script = el("script", { src: "masks.js" });
    script.onload = () => {
      for (const canvas of waiting) drawMasks(canvas);
      waiting.clear();
    };
    script.onerror = () => { $("legend").textContent = "masks.js is not there: photos are shown without masks"; };
    document.body.append(script);
  }

  // ------------------------------------------------------------------------------------------ cards

  function picture(row, layers, isPale) {
    const [file, , , shownHeight, shownWidth, key] = photos[rows.photo[row]];
    const image = el("img", { src: report.photos_folder + encodeURIComponent(file), alt: `photo ${key}`, loading: "lazy", decoding: "async", class: isPale ? "pale" : null });
    const box = el("div", { class: "picture" }, image);
    image.onerror = () => box.classList.add("lost");
    box.style.aspectRatio = `${shownWidth} / ${shownHeight}`;
    if (layers.length) {
      const canvas = el("canvas", { "aria-hidden": "true" });
      canvas.drawing = { row, layers };
      box.append(canvas);
      observer.observe(canvas);
    }
    return box;
  }

  const outline = { model: null, tint: 0, line: true };
  function panels(row, view) {
    const predictions = models.map((_, model) => ({ model, tint: 145, line: false }));
    const panel = (caption, box) => el("figure", { class: "panel" }, box, el("figcaption", {}, caption));
    if (view === "overlay") return el("div", { class: "panels" }, picture(row, [...predictions.map((layer) => ({ ...layer, line: true })), outline], false));
    return el("div", { class: "panels" },
      panel("photo", picture(row, [], false)),
      panel("ground truth", picture(row, [{ model: null, tint: 145, line: true }], true)),
      models.map((model, m) => panel(isPair ? model.name : "prediction", picture(row, [predictions[m], outline], true))));
  }

  function meter(row, m) {
    const bar = el("i", { class: `m${m}` });
    bar.style.width = `${100 * rows.iou[m][row]}%`;
    return el("div", { class: "meter", "aria-hidden": "true" }, bar);
  }

  function verdict(row) {
    const scores = models.map((_, m) => el("b", { class: isPair ? `m${m}` : null }, `IoU ${rows.iou[m][row].toFixed(2)}`));
    if (isPair) scores.push(el("b", {}, signed(difference(row))));
    const groups = groupings.filter((grouping) => !grouping.is_scale).flatMap((grouping) =>
      rows.groups[grouping.key][row].map((place) => grouping.labels[place]));
    const details = [...groups, `${percent(rows.share[row], 1)} % of the photo`, `ref ${rows.ref_id[row]}`, `sentence ${rows.sent_id[row]}`];
    return el("div", { class: "verdict" }, scores, el("small", {}, details.join(" · ")));
  }

  const sentence = (row) => el("p", { class: "sentence" }, `“${rows.sentence[row]}”`);

  function card(row) {
    const open = el("button", { type: "button", class: "open", "aria-label": `enlarge: ${rows.sentence[row]}`, onclick: () => enlarge(row) }, panels(row, state.view));
    return el("article", { class: "card" }, open, sentence(row), models.map((_, m) => meter(row, m)), verdict(row));
  }

  // ---------------------------------------------------------------------------------- filter and sort

  const difference = (row) => rows.iou[1][row] - rows.iou[0][row];
  const scored = models.length - 1; // the model that the IoU range and the order by IoU are about
  const SORTS = {
    ...(isPair ? {
      loss: ["largest loss first", difference],
      gain: ["largest gain first", (row) => -difference(row)],
    } : {}),
    worst: ["worst first", (row) => rows.iou[scored][row]],
    best: ["best first", (row) => -rows.iou[scored][row]],
    smallest: ["smallest object first", (row) => rows.share[row]],
    largest: ["largest object first", (row) => -rows.share[row]],
    longest: ["longest sentence first", (row) => -rows.sentence[row].length],
    data: ["as in the data", (row) => row],
  };
  const isOutcome = {
    won: (row) => difference(row) > report.comparison.margin,
    lost: (row) => difference(row) < -report.comparison.margin,
    tied: (row) => Math.abs(difference(row)) <= report.comparison.margin,
  };
  const DEFAULTS = {
    text: "", low: "0", high: "1", sort: Object.keys(SORTS)[0], view: "panels", page: "1",
    ...(isPair ? { outcome: "" } : {}),
    ...Object.fromEntries(groupings.map((grouping) => [grouping.key, ""])),
  };
  const state = { ...DEFAULTS };
  let found = [];

  function drawControls() {
    const options = (entries) => entries.map(([value, text]) => el("option", { value }, text));
    const choice = (key, title, entries) =>
      el("label", {}, `${title} `, el("select", { id: key }, options([["", "all"], ...entries])));
    const short = { kind: "kind", size: "size", length: "words" };
    const selects = groupings.map((grouping) => choice(grouping.key, short[grouping.key] || grouping.title,
      grouping.labels.map((label, i) => [i, `${label} (${number(grouping.rows[i].sentences)})`])));
    if (isPair) {
      selects.unshift(choice("outcome", "outcome", Object.keys(isOutcome).map((name) => [name, name])));
      $("range").textContent = `IoU of ${models[1].name}`;
    }
    $("choices").append(...selects);
    $("sort").append(...options(Object.entries(SORTS).map(([value, [text]]) => [value, text])));
    const truth = el("span", {}, el("span", { class: "swatch outline", "aria-hidden": "true" }), "ground truth");
    $("legend").append(truth, ...models.map((model, m) => el("span", {}, swatch(m), isPair ? model.name : "prediction")));
    for (const key of Object.keys(DEFAULTS)) {
      if (key !== "page") $(key).addEventListener("input", () => apply({ [key]: $(key).value }, false));
    }
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    $("filters").addEventListener("reset", (event) => { event.preventDefault(); apply({ ...DEFAULTS }, false); });
    const turn = (id, target) => $(id).addEventListener("click", () => apply({ page: String(target()) }, true, false));
    turn("first", () => 1);
    turn("previous", () => Number(state.page) - 1);
    turn("next", () => Number(state.page) + 1);
    turn("last", () => numPages());
  }

  const numPages = () => Math.max(1, Math.ceil(found.length / PAGE_SIZE));

  function search() {
    const text = state.text.trim().toLowerCase();
    const low = state.low === "" ? 0 : Number(state.low), high = state.high === "" ? 1 : Number(state.high);
    const chosen = groupings.filter((grouping) => state[grouping.key] !== "")
      .map((grouping) => [rows.groups[grouping.key], Number(state[grouping.key])]);
    const outcome = isOutcome[state.outcome];
    const keep = (row) => rows.iou[scored][row] >= low && rows.iou[scored][row] <= high &&
      (!text || rows.sentence[row].toLowerCase().includes(text)) &&
      chosen.every(([members, place]) => members[row].includes(place)) && (!outcome || outcome(row));
    const [, value] = SORTS[state.sort];
    found = rows.sentence.map((_, row) => row).filter(keep).map((row) => [value(row), row])
      .sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, row]) => row);
  }

  // Take new choices, draw what they leave, and keep them in the address, so that it can be shared.
  function apply(changes, jump = true, restart = true) {
    Object.assign(state, restart ? { page: "1" } : {}, changes);
    for (const key of Object.keys(DEFAULTS)) {
      if (key !== "page" && $(key).value !== state[key]) $(key).value = state[key];
    }
    search();
    drawGallery();
    const changed = Object.entries(state).filter(([key, value]) => value !== DEFAULTS[key]);
    const address = new URLSearchParams(changed).toString();
    if (address !== location.hash.slice(1)) location.replace(`#${address}`);
    if (jump) $("gallery").scrollIntoView();
  }

  function readAddress() {
    for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
      const options = key in DEFAULTS && $(key).options;
      const isValid = options ? [...options].some((option) => option.value === value)
        : key === "text" || (["low", "high", "page"].includes(key) && Number.isFinite(Number(value)));
      if (isValid) state[key] = value;
    }
  }

  function drawGallery() {
    const pages = numPages();
    const page = Math.min(Math.max(1, Math.floor(Number(state.page)) || 1), pages);
    state.page = String(page);
    observer.disconnect();
    waiting.clear();
    const part = found.slice((page - 1) * PAGE_SIZE, page * PAGE_SIZE);
    const cards = part.map(card);
    $("cards").className = state.view === "overlay" ? "overlay" : isPair ? "pair" : "";
    $("cards").replaceChildren(...(cards.length ? cards : [el("p", { class: "empty" }, "no sentence fits; reset shows all")]));
    const ofAll = rows.sentence.length < report.sentences
      ? ` with a card, ${number(report.sentences)} scored, evenly from worst to best` : "";
    $("count").textContent = `${number(found.length)} of ${plural(rows.sentence.length, "sentence")}${ofAll}`;
    $("page").textContent = `page ${page} of ${number(pages)}`;
    $("first").disabled = $("previous").disabled = page === 1;
    $("next").disabled = $("last").disabled = page === pages;
  }

  // ----------------------------------------------------------------------------- one sentence, large

  let enlarged = null;
  function enlarge(row) {
    enlarged = row;
    const photo = photos[rows.photo[row]];
    $("enlarged").replaceChildren(panels(row, "panels"), sentence(row), ...models.map((_, m) => meter(row, m)), verdict(row),
      el("p", { class: "small" }, `${photo[5]} · ${photo[2]}×${photo[1]} pixels`));
    const place = found.indexOf(row);
    $("before").disabled = place <= 0;
    $("after").disabled = place < 0 || place === found.length - 1;
    if (!$("large").open) $("large").showModal();
  }

  function drawDialog() {
    const step = (by) => {
      const row = found[found.indexOf(enlarged) + by];
      if (row !== undefined) enlarge(row);
    };
    $("before").addEventListener("click", () => step(-1));
    $("after").addEventListener("click", () => step(1));
    $("close").addEventListener("click", () => $("large").close());
    $("large").addEventListener("click", (event) => { if (event.target === $("large")) $("large").close(); });
    $("large").addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    });
  }

  // ------------------------------------------------------------------------------ the other results

  function drawResults() {
    if (!report.results) return;
    const script = el("script", { src: report.results });
    script.onload = () => {
      const links = window.RESULTS.map((result) => el("a", {
        href: `../${encodeURIComponent(result.page)}/index.html`,
        "aria-current": result.page === report.page ? "page" : null,
      }, `${result.split} ${result.protocol}${result.swapped_sentences ? " swapped" : ""} ${percent(result.gIoU ?? result.mIoU, 1)}`));
      $("results").append(el("a", { href: "../index.html" }, "all results"), ...links);
      $("results").hidden = links.length < 2;
    };
    document.body.append(script);
  }

  drawHead();
  drawScores();
  drawCharts();
  drawTables();
  drawControls();
  drawDialog();
  readAddress();
  apply({ ...state }, false, false);
  drawResults();
  requestAnimationFrame(() => setTimeout(loadMasks)); // after the page is seen
  window.addEventListener("hashchange", () => {
    Object.assign(state, DEFAULTS);
    readAddress();
    apply({ ...state }, false, false);
  });
})();
