// Draws a report from REPORT (data.js) and, once they are there, MASKS (masks.js).
// Everything that comes from the data is set as text; nothing is read from a network.
"use strict";
(() => {
  const report = window.REPORT;
  const { models, rows, photos, groupings } = report;
  const isPair = models.length === 2;
  const main = report.metrics[0]; // gIoU where some sentences have no target
  const PAGE_SIZE = 24;
  const TRUTH = [46, 204, 113], COLORS = [[255, 64, 129], [64, 128, 255]];
  const PERFECT = "a perfect model at this input size and protocol";

  // ------------------------------------------------------------------------------------------- head

  const facts = (pairs) => pairs.flatMap(([name, value]) =>
    [el("span", {}, `${name} `, el("b", {}, value)), "  "]);
  const modelFacts = (model) => facts([["protocol", model.protocol],
    ["threshold", model.threshold], ["checkpoint", model.checkpoint], ...(model.swapped_sentences
      ? [["sentences are", "swapped with those of another object of the photo"]] : [])]);

  function drawHead() {
    const [first, second] = models, { title } = report;
    document.title = `${title}: ${isPair ? "comparison" : first.protocol}`;
    $("title").textContent = isPair ? `${title}: ${second.name} against ${first.name}` : title;
    const shared = [["data set", first.dataset], ["split", first.split],
      ["refs", number(first.refs)], ["sentences", number(report.sentences)]];
    $("facts").append(...facts(shared), ...(isPair ? [] : modelFacts(first)));
  }

  function drawScores() {
    const heads = report.metrics.map((name) => el("th", { scope: "col" },
      name === "N-acc" ? `N-acc (none: ${models[0].no_target_rule})` : name));
    const row = (kind, label, value) => el("tr", { class: kind }, el("td", {}, label),
      report.metrics.map((name) => el("td", { class: name === main ? "main" : "" }, value(name))));
    const body = models.map((model, m) => {
      const label = isPair
        ? [swatch(`m${m}`), el("b", {}, model.name), el("small", {}, modelFacts(model))]
        : "this model";
      return [row("", label, (name) => percent(model[name])),
        row("quiet", PERFECT, (name) => percent(model.ceiling[name]))];
    });
    if (isPair) {
      const { intervals, level } = report.comparison;
      const interval = el("small", {}, `[${percent(level, 0)} % interval]`);
      const label = [`${models[1].name} − ${models[0].name}`, interval];
      body.push(row("difference", label, (name) => {
        const [difference, low, high] = intervals[name].map((value) => signed(100 * value));
        return [difference, el("small", {}, `[${low}, ${high}]`)];
      }));
    }
    $("scores").append(table({}, el("tr", {}, el("th", {}, "per cent"), heads), body));
    if (isPair) drawOutcome();
  }

  function drawOutcome() {
    const { won, lost, tied, margin, images, draws } = report.comparison;
    const parts = Object.entries({ lost, tied, won }).filter(([, count]) => count);
    const bar = el("div", { class: "bar", "aria-hidden": "true" }, parts.map(([name, count]) =>
      el("span", { class: name, title: `${name}: ${number(count)}`, style: { flex: count } })));
    const text = `${models[1].name} won ${number(won)}, lost ${number(lost)}, tied ` +
      `${number(tied)} (IoU within ${margin}). Intervals: ${number(draws)} draws of ` +
      `${plural(images, "photo")} with all their sentences, since sentences of one photo are not ` +
      "independent; both models on the same draw.";
    $("scores").append(el("div", { id: "outcomes" }, el("p", { class: "note" }, text), bar));
  }

  // ----------------------------------------------------------------------------------------- charts

  const WIDTH = 420, HEIGHT = 190, LEFT = 38, RIGHT = 6, TOP = 16, BOTTOM = 36;
  const x = (share) => LEFT + share * (WIDTH - LEFT - RIGHT);
  const y = (share) => HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);
  const SHARE_TICKS = [0, 0.25, 0.5, 0.75, 1].map((share) => [share, percent(share, 0)]);

  const write = (text, left, top, attributes = {}) =>
    svg("text", { x: left, y: top, "text-anchor": "middle", ...attributes }, text);
  const scale = (values) => values.map((value) => write(value.toFixed(1), x(value), y(0) + 14));

  function chart(title, remark, ticks, axis, ...content) {
    const lines = ticks.map(([share, text]) => [
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(share), y2: y(share) }),
      write(text, LEFT - 6, y(share) + 4, { "text-anchor": "end" }),
    ]);
    const frame = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": title };
    const drawing = svg("svg", frame, lines, write(axis, x(0.5), HEIGHT - 3), content);
    const caption = el("figcaption", {}, title, " ", el("span", {}, remark));
    return el("figure", { class: "chart" }, caption, drawing);
  }

  // One slot a label; a bar a model. `heights[model][slot]` in [0, 1] of the axis.
  function bars(heights, slots, tell, onPick) {
    const slot = 1 / slots, gap = slots > 12 ? 0.1 : 0.22;
    const width = slot * (1 - gap) / heights.length;
    return Array.from({ length: slots }, (_, i) => {
      const own = heights.map((values, m) => svg("rect", {
        class: `bar m${m}`, x: x(i * slot + slot * gap / 2 + m * width), rx: 1.5,
        width: Math.max(1, x(width) - x(0) - 1), y: y(values[i]), height: y(0) - y(values[i]),
      }));
      return [own, svg("rect", {
        class: "hit", x: x(i * slot), width: x(slot) - x(0), y: TOP, height: y(0) - TOP,
        tabindex: 0, role: "button", "aria-label": `${tell(i)}: show these sentences`,
        onclick: () => onPick(i), onkeydown: (event) => { if (event.key === "Enter") onPick(i); },
      }, svg("title", {}, tell(i)))];
    });
  }

  function histogramChart() {
    const slots = report.histogram[0].length, most = Math.max(...report.histogram.flat());
    const rough = Math.max(1, most / 4), power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    const top = Math.ceil(most / step) * step;
    const ticks = Array.from({ length: top / step + 1 }, (_, i) =>
      [i * step / top, number(i * step)]);
    const tell = (i) => `IoU ${(i / slots).toFixed(2)}–${((i + 1) / slots).toFixed(2)}: ` +
      report.histogram.map((counts) => plural(counts[i], "sentence")).join(" / ");
    const heights = report.histogram.map((counts) => counts.map((count) => count / top));
    const content = bars(heights, slots, tell, (i) =>
      choose({ low: +(i / slots).toFixed(4), high: +((i + 1) / slots).toFixed(4) }));
    return chart("Sentences by IoU", "", ticks, "IoU", scale([0, 0.2, 0.4, 0.6, 0.8, 1]), content);
  }

  function curveChart() {
    const line = (kind, places, ...children) => {
      const points = places.map(([at, share]) => `${x(at).toFixed(1)},${y(share).toFixed(1)}`);
      return svg("polyline", { class: kind, points: points.join(" ") }, children);
    };
    const at = report.metrics.filter((name) => name.startsWith("Pr@"))
      .map((name) => [Number(name.slice(3)), name]);
    const steps = report.curve[0].length - 1;
    const content = models.map((model, m) => [
      line("mark", at.map(([place, name]) => [place, model.ceiling[name]]),
        svg("title", {}, PERFECT)),
      line(`curve m${m}`, report.curve[m].map((share, i) => [i / steps, share])),
      at.map(([place, name]) => svg("circle", {
        class: `dot m${m}`, cx: x(place), cy: y(model[name]), r: 3.5,
      }, svg("title", {}, `${isPair ? `${model.name}, ` : ""}${name}: ${percent(model[name])} %`))),
    ]);
    const whose = main === "gIoU" ? "sentences with a target" : "sentences";
    const remark = `% of ${whose}; dashed: perfect model`;
    const labels = scale([0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]);
    return chart("Pr@X", remark, SHARE_TICKS, "X", labels, content);
  }

  function groupChart({ key, title, labels, rows: groups }) {
    const heights = models.map((_, m) => groups.map((group) => group.models[m][main]));
    const tell = (i) => `${labels[i]}: ${main} ` +
      `${heights.map((values) => percent(values[i])).join(" / ")} %, ` +
      plural(groups[i].sentences, "sentence");
    const texts = groups.map((group, i) => {
      const middle = x((i + 0.5) / labels.length);
      const top = y(Math.max(...heights.map((values) => values[i]))) - 4;
      return [write(labels[i].replace(" %", ""), middle, y(0) + 14),
        write(number(group.sentences), middle, top, { class: "value" })];
    });
    const content = bars(heights, labels.length, tell, (i) => choose({ [key]: i }));
    return chart(`${main} by ${title}`, "in %, above: count", SHARE_TICKS, "", content, texts);
  }

  // ----------------------------------------------------------------------------------------- tables

  function groupTable({ key, title, labels, rows: groups }) {
    const names = Object.keys(groups[0].models[0]);
    const heads = models.map((model, m) => names.map((name) =>
      el("th", { scope: "col", title: model.name }, isPair ? swatch(`m${m}`) : [], name)));
    const body = groups.map((group, i) => {
      const onclick = () => choose({ [key]: i });
      const pick = el("button", { type: "button", onclick }, labels[i]);
      const cells = group.models.map((scores) =>
        names.map((name) => el("td", {}, percent(scores[name]))));
      return el("tr", {}, el("td", {}, pick), el("td", {}, number(group.sentences)), cells);
    });
    const head = [title, "sentences"].map((name) => el("th", { scope: "col" }, name));
    return el("div", { class: "scroll" },
      table({ id: `table-${key}` }, el("tr", {}, head, heads), body));
  }

  function drawTables() {
    const kinds = groupings.find((grouping) => grouping.key === "kind");
    const brief = kinds.rows.map((group, i) =>
      `${kinds.labels[i]} ${group.models.map((scores) => percent(scores[main], 1)).join(" / ")}`);
    $("brief").textContent = `${main} by kind of sentence: ${brief.join(" · ")}`;
    $("columns").classList.toggle("pair", isPair);
    $("columns").append(...groupings.map(groupTable));
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
  function shrinkMask(runs, [, height, width, shownHeight, shownWidth]) {
    const mask = new Uint8Array(shownHeight * shownWidth);
    let end = 0;
    runs.forEach((run, i) => {
      end += run;
      for (let pixel = i % 2 ? end - run : end; pixel < end; pixel++) {
        const top = Math.floor(pixel % height * shownHeight / height);
        const left = Math.floor(Math.floor(pixel / height) * shownWidth / width);
        mask[top * shownWidth + left] = 1;
      }
    });
    return mask;
  }

  function paint(pixels, mask, width, color, tint, hasLine) {
    const set = (i, alpha) => {
      if (alpha > pixels[4 * i + 3] || alpha === 255) pixels.set([...color, alpha], 4 * i);
    };
    for (let i = 0; i < mask.length; i++) {
      if (mask[i] && tint) set(i, tint);
      const right = (i + 1) % width ? i + 1 : i, below = i + width < mask.length ? i + width : i;
      if (hasLine && (mask[i] !== mask[right] || mask[i] !== mask[below])) {
        set(i, 255);
        set(mask[i] !== mask[right] ? right : below, 255);
      }
    }
  }

  function drawMasks(canvas) {
    const { row, layers } = canvas.drawing, photo = photos[rows.photo[row]];
    [, , , canvas.height, canvas.width] = photo;
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    for (const { model, tint, hasLine } of layers) {
      const { truth, predictions } = window.MASKS;
      const text = model === null ? truth[rows.ref_id[row]] : predictions[model][row];
      const mask = shrinkMask(decodeRuns(text), photo);
      paint(image.data, mask, canvas.width, model === null ? TRUTH : COLORS[model], tint, hasLine);
    }
    context.putImageData(image, 0, 0);
    canvas.dataset.drawn = "";
  }

  const load = (src, onload, onerror = null) =>
    document.body.append(el("script", { src, onload, onerror }));
  const masks = new Promise((resolve) => {
    const complain = () => {
      $("legend").textContent = "masks.js is not there: photos are shown without masks";
    };
    const start = () => setTimeout(() => load("masks.js", resolve, complain));
    requestAnimationFrame(start); // after the page is seen
  });
  const observer = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      masks.then(() => drawMasks(target));
    }
  }, { rootMargin: "400px" });

  // ------------------------------------------------------------------------------------------ cards

  function picture(row, layers, isPale) {
    const [file, , , shownHeight, shownWidth, key] = photos[rows.photo[row]];
    const style = { aspectRatio: `${shownWidth} / ${shownHeight}` };
    const box = el("div", { class: "picture", style }, el("img", {
      src: report.photos_folder + encodeURIComponent(file), alt: `photo ${key}`, loading: "lazy",
      decoding: "async", class: isPale ? "pale" : "", onerror: () => box.classList.add("lost"),
    }));
    if (layers.length) {
      const canvas = el("canvas", { "aria-hidden": "true" });
      canvas.drawing = { row, layers };
      box.append(canvas);
      observer.observe(canvas);
    }
    return box;
  }

  const TINT = 145; // alpha of 255
  function panels(row, view) {
    const isOverlay = view === "overlay", truth = { model: null, tint: 0, hasLine: true };
    const predictions = models.map((_, model) => ({ model, tint: TINT, hasLine: isOverlay }));
    if (isOverlay) {
      return el("div", { class: "panels" }, picture(row, [...predictions, truth], false));
    }
    const panel = (caption, layers) => el("figure", { class: "panel" },
      picture(row, layers, layers.length > 0), el("figcaption", {}, caption));
    return el("div", { class: "panels" }, panel("photo", []),
      panel("ground truth", [{ ...truth, tint: TINT }]), models.map((model, m) =>
        panel(isPair ? model.name : "prediction", [predictions[m], truth])));
  }

  function words(row) {
    const meters = models.map((_, m) => el("div", { class: "meter", "aria-hidden": "true" },
      el("i", { class: `m${m}`, style: { width: `${100 * rows.iou[m][row]}%` } })));
    const scores = models.map((_, m) =>
      el("b", { class: isPair ? `m${m}` : "" }, `IoU ${rows.iou[m][row].toFixed(2)}`));
    if (isPair) scores.push(el("b", {}, signed(difference(row))));
    const groups = groupings.filter((grouping) => !grouping.is_scale).flatMap(({ key, labels }) =>
      rows.groups[key][row].map((place) => labels[place]));
    const details = [...groups, `${percent(rows.share[row], 1)} % of the photo`,
      `ref ${rows.ref_id[row]}`, `sentence ${rows.sent_id[row]}`].join(" · ");
    return [el("p", { class: "sentence" }, `“${rows.sentence[row]}”`), meters,
      el("div", { class: "verdict" }, scores, el("small", {}, details))];
  }

  function card(row) {
    const name = `enlarge: ${rows.sentence[row]}`, onclick = () => enlarge(row);
    const open = { type: "button", class: "open", "aria-label": name, onclick };
    const view = form.elements.view.value;
    return el("article", { class: "card" }, el("button", open, panels(row, view)), words(row));
  }

  // ---------------------------------------------------------------------------------- filter and sort

  const form = $("filters");
  const scored = models.length - 1; // the model that the IoU range and the order by IoU are about
  const difference = (row) => rows.iou[1][row] - rows.iou[0][row];
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
  const choices = () => Object.fromEntries(new FormData(form));
  let defaults, address = null, found = [], page = 1;

  function drawControls() {
    const options = (entries) => entries.map(([value, text]) => el("option", { value }, text));
    const choice = (name, title, entries) =>
      el("label", {}, `${title} `, el("select", { name }, options([["", "all"], ...entries])));
    if (isPair) {
      const outcomes = Object.keys(isOutcome).map((name) => [name, name]);
      $("choices").append(choice("outcome", "outcome", outcomes));
      $("range").textContent = `IoU of ${models[1].name}`;
    }
    const entries = ({ labels, rows: groups }) => labels.map((label, i) =>
      [i, `${label} (${number(groups[i].sentences)})`]);
    $("choices").append(...groupings.map((grouping) => choice(
      grouping.key, grouping.key === "length" ? "words" : grouping.key, entries(grouping))));
    const sorts = Object.entries(SORTS).map(([key, [text]]) => [key, text]);
    form.elements.sort.append(...options(sorts));
    const legend = (kind, text) => el("span", {}, swatch(kind), text);
    $("legend").append(legend("outline", "ground truth"),
      ...models.map((model, m) => legend(`m${m}`, isPair ? model.name : "prediction")));
    form.oninput = () => show();
    form.onsubmit = (event) => event.preventDefault();
    $("clear").onclick = () => { form.reset(); show(); };
    form.reset();
    defaults = { ...choices(), page: "1" };
  }

  function search() {
    const { low, high, sort, outcome, ...chosen } = choices();
    const text = chosen.text.trim().toLowerCase();
    const groups = groupings.filter(({ key }) => chosen[key] !== "")
      .map(({ key }) => [rows.groups[key], Number(chosen[key])]);
    const keep = (row) => rows.iou[scored][row] >= Number(low || 0) &&
      rows.iou[scored][row] <= Number(high || 1) &&
      (!text || rows.sentence[row].toLowerCase().includes(text)) &&
      groups.every(([members, place]) => members[row].includes(place)) &&
      (!outcome || isOutcome[outcome](row));
    const [, value] = SORTS[sort]; // sorting keeps the order of equals
    return rows.sentence.map((_, row) => row).filter(keep).sort((a, b) => value(a) - value(b));
  }

  // Show a page of what the choices leave, and keep them in the address, so that it can be shared.
  function show(wanted = 1) {
    found = search();
    const pages = Math.max(1, Math.ceil(found.length / PAGE_SIZE));
    page = Math.min(Math.max(1, Math.floor(wanted) || 1), pages);
    observer.disconnect();
    const cards = found.slice((page - 1) * PAGE_SIZE, page * PAGE_SIZE).map(card);
    const nothing = el("p", { class: "empty" }, "no sentence fits; reset shows all");
    const isOverlay = form.elements.view.value === "overlay";
    $("cards").className = isOverlay ? "overlay" : isPair ? "pair" : "";
    $("cards").replaceChildren(...(cards.length ? cards : [nothing]));
    const ofAll = rows.sentence.length < report.sentences
      ? ` with a card, ${number(report.sentences)} scored, evenly from worst to best` : "";
    $("count").textContent =
      `${number(found.length)} of ${plural(rows.sentence.length, "sentence")}${ofAll}`;
    $("page").textContent = `page ${page} of ${number(pages)}`;
    const targets = { first: 1, previous: page - 1, next: page + 1, last: pages };
    for (const [id, target] of Object.entries(targets)) {
      $(id).disabled = target === page || target < 1 || target > pages;
      $(id).onclick = () => { show(target); $("gallery").scrollIntoView(); };
    }
    const changed = Object.entries({ ...choices(), page: String(page) })
      .filter(([key, value]) => value !== defaults[key]);
    address = new URLSearchParams(changed).toString();
    if (address !== location.hash.slice(1)) location.replace(`#${address}`);
  }

  function choose(changes) {
    for (const [key, value] of Object.entries(changes)) form.elements[key].value = value;
    show();
    $("gallery").scrollIntoView();
  }

  function readAddress() {
    if (address === location.hash.slice(1)) return; // show() has set it
    form.reset();
    const wanted = new URLSearchParams(location.hash.slice(1));
    for (const [key, value] of wanted) {
      const control = form.elements.namedItem(key);
      if (!control || (control.type === "number" && isNaN(value))) continue;
      control.value = value;
      if (control.selectedIndex === -1) control.selectedIndex = 0; // there is no such choice
    }
    show(Number(wanted.get("page")));
  }

  // ----------------------------------------------------------------------------- one sentence, large

  const large = $("large");
  function enlarge(row) {
    const [, height, width, , , key] = photos[rows.photo[row]];
    const size = el("p", { class: "small" }, `${key} · ${width}×${height} pixels`);
    $("enlarged").replaceChildren(panels(row, "panels"), ...words(row).flat(), size);
    const place = found.indexOf(row);
    for (const [id, other] of [["before", found[place - 1]], ["after", found[place + 1]]]) {
      $(id).disabled = other === undefined;
      $(id).onclick = () => enlarge(other);
    }
    if (!large.open) large.showModal();
  }
  $("close").onclick = () => large.close();
  large.onclick = (event) => { if (event.target === large) large.close(); }; // beside it
  large.onkeydown = ({ key }) => {
    if (key === "ArrowLeft") $("before").click();
    if (key === "ArrowRight") $("after").click();
  };

  // ------------------------------------------------------------------------------ the other results

  function drawResults() {
    const links = window.RESULTS.map((result) => el("a", {
      href: `../${encodeURIComponent(result.page)}/index.html`,
      "aria-current": result.page === report.page ? "page" : null,
    }, `${result.split} ${result.protocol}${result.swapped_sentences ? " swapped" : ""} ` +
      percent(result.gIoU ?? result.mIoU, 1)));
    $("results").append(el("a", { href: "../index.html" }, "all results"), ...links);
    $("results").hidden = links.length < 2;
  }

  drawHead();
  drawScores();
  const scales = groupings.filter((grouping) => grouping.is_scale);
  $("charts").append(histogramChart(), curveChart(), ...scales.map(groupChart));
  drawTables();
  drawControls();
  readAddress();
  window.onhashchange = readAddress;
  if (report.results) load(report.results, drawResults);
})();
