// The page at work: sliders, chart, table, and all about one candidate. Every text is set as text, never as HTML.

const page = JSON.parse(document.getElementById("page-data").textContent);
const find = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const SURE = 0.95, PAGE_OF_ITEMS = 5, ROWS = 8;
const own = {weights: page.scores.map(s => s.weight), limits: page.scores.map(s => s.margin)};
let settings, view, rows;

function element(tag, attributes = {}, ...children) {
  const isDrawing = ["svg", "g", "path", "line", "circle", "text", "polyline", "title"].includes(tag);
  const made = isDrawing ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  made.append(...children.filter(child => child !== null));
  return made;
}

async function unpack(name) {
  const bytes = Uint8Array.from(atob(page.packs[name]), character => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return JSON.parse(await new Response(stream).text());
}

const unpacked = new Map();
function pack(name) {
  if (!unpacked.has(name)) unpacked.set(name, unpack(name));
  return unpacked.get(name);
}

// Numbers as the rest of the page writes them

function figure(score, value) {
  return score.percent ? `${(100 * value).toFixed(1)}%` : `${Number(value.toPrecision(3))}`.replace("-", "−");
}

function size(score, value) {
  return score.percent ? `${(100 * value).toFixed(1)} points` : `${Number(value.toPrecision(3))}`;
}

function unbroken(text) {
  return text.replaceAll(" ", "\u00a0");
}

function share(value) {
  return value >= 0.995 ? "over\u00a099%" : value <= 0.005 ? "under\u00a01%" : `${Math.round(100 * value)}%`;
}

// State: in the fragment of the address stands what differs from the study's own settings

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (key, usual) => {
    const value = parseFloat(given.get(key));
    return Number.isFinite(value) ? value : usual;
  };
  settings = {
    weights: page.scores.map((s, j) => s.kind === "objective" ? Math.max(number(`weight.${s.name}`, s.weight), 0.1) : 0),
    limits: page.scores.map(s => number(`limit.${s.name}`, s.margin)),
  };
  const known = name => page.candidates.some(c => c.name === name) ? name : null;
  const axis = (key, usual) => {
    const j = page.scores.findIndex(s => s.name === given.get(key));
    return j < 0 ? usual : j;
  };
  const second = page.scores.filter(s => s.kind === "objective").length > 1 ? 1 : null;
  view = {
    seen: known(given.get("see")),
    against: known(given.get("against")),
    x: second === null ? null : axis("x", 0),
    y: second === null ? 0 : axis("y", second),
    all: given.has("all"),
  };
}

function writeState() {
  const kept = new URLSearchParams();
  page.scores.forEach((score, j) => {
    if (settings.limits[j] !== own.limits[j]) kept.set(`limit.${score.name}`, settings.limits[j]);
    if (settings.weights[j] !== own.weights[j]) kept.set(`weight.${score.name}`, settings.weights[j]);
  });
  if (view.seen) kept.set("see", view.seen);
  if (view.against) kept.set("against", view.against);
  if (view.x !== null && view.x !== 0) kept.set("x", page.scores[view.x].name);
  if (view.x !== null && view.y !== 1) kept.set("y", page.scores[view.y].name);
  if (view.all) kept.set("all", "");
  history.replaceState(null, "", `#${kept}`);
}

// Sliders

function showSliders() {
  page.scores.forEach((score, j) => {
    const limit = find(`limit-${j}`), weight = find(`weight-${j}`), value = settings.limits[j];
    limit.value = value ?? limit.dataset.off;
    const text = value === null ? "no limit" : score.kind === "guard" ? size(score, value) : figure(score, value);
    find(`limit-text-${j}`).textContent = text;
    limit.setAttribute("aria-valuetext", text);
    if (!weight) return;
    weight.value = settings.weights[j];
    find(`weight-text-${j}`).textContent = `× ${settings.weights[j]}`;
  });
}

function listen() {
  page.scores.forEach((score, j) => {
    const limit = find(`limit-${j}`), weight = find(`weight-${j}`);
    limit.addEventListener("input", () => {
      const isOff = limit.dataset.off !== undefined
        && Math.abs(limit.value - limit.dataset.off) < 0.005 * (limit.max - limit.min);
      settings.limits[j] = isOff ? null : Number(Number(limit.value).toPrecision(4));
      update();
    });
    weight?.addEventListener("input", () => {
      settings.weights[j] = Number(weight.value);
      update();
    });
  });
  for (const axis of ["x", "y"]) find(axis)?.addEventListener("change", event => {
    view[axis] = Number(event.target.value);
    update();
  });
  find("all").addEventListener("change", event => { view.all = event.target.checked; update(); });
  find("reset").addEventListener("click", () => { settings = structuredClone(own); update(); });
  find("candidate").addEventListener("change", event => see(event.target.value));
  find("against").addEventListener("change", event => { view.against = event.target.value; update(); });
  for (const id of ["of-score", "change"]) find(id).addEventListener("change", showItems);
  find("won-and-lost").addEventListener("toggle", showItems);
  find("won-and-lost").open = view.against !== null;
  window.addEventListener("resize", showChart);
  window.addEventListener("hashchange", () => {
    readState();
    update();
  });
}

function see(name) {
  view.seen = name;
  update();
}

// What the settings choose

function standing(row) {
  if (!settings.limits.some(limit => limit !== null)) return ["", "no limits"];
  const p = share(row.probability);
  if (row.excess > 0) return row.meetsAsMeasured ? ["luck", `only by luck: ${p}`] : ["broken", `no: ${p}`];
  return row.probability >= SURE ? ["kept", `yes: ${p}`] : ["luck", `perhaps luck: ${p}`];
}

function showChoice() {
  const best = recommended(rows), merges = rows.filter(row => row.candidate.is_merge);
  const met = merges.filter(row => row.excess === 0).length;
  const name = best.candidate.name, isOwn = name === page.recommended;
  const text = best.excess === 0
    ? `${met} of ${merges.length} merges meet every limit; of these it loses least where it loses most `
      + `(${Math.round(100 * best.worst)}%). It meets them in ${share(best.probability)} of the resamples.`
    : "No merge meets every limit; this one exceeds them least. Loosen a limit, or train again.";
  find("choice").replaceChildren(
    element("strong", {}, name),
    isOwn ? ", as in the study's own settings. " : `, instead of ${page.recommended}. `, text);
  find("choice").className = best.excess > 0 ? "none" : best.probability >= SURE ? "good" : "mixed";
}

function showTable() {
  const best = recommended(rows);
  const shown = rows.filter((row, i) => view.all || row === best || i < ROWS || !row.candidate.is_merge);
  find("count").textContent = `${shown.length} of ${rows.length} candidates, the best first.`;
  find("all").checked = view.all;
  find("rows").replaceChildren(...shown.map(row => {
    const {candidate} = row, [level, text] = standing(row);
    return element("tr", {class: row === best ? "chosen" : null},
      element("th", {scope: "row"},
        element("button", {type: "button", class: "link", onclick: () => {
          see(candidate.name);
          find("candidate-title").focus();
        }}, candidate.name),
        element("small", {class: "block"}, row === best ? "recommended" : candidate.is_merge ? "" : "not a merge")),
      element("td", {class: `number ${level}`}, text),
      element("td", {class: "number"}, `${row.onFront ? "on it" : "behind"}, p ${share(candidate.p)}`),
      element("td", {class: "number"}, `${Math.round(100 * row.worst)}%`),
      ...candidate.texts.map((own, j) => element("td", {class: "number"}, unbroken(own),
        candidate.holdout ? element("small", {class: "block"}, `held out ${unbroken(candidate.holdout[j])}`) : null)));
  }));
}

// The chart

const STAR = "M0,-11 2.5,-3.4 10.5,-3.4 4,1.3 6.5,8.9 0,4.2 -6.5,8.9 -4,1.3 -10.5,-3.4 -2.5,-3.4Z";
const DIAMOND = "M0,-7 6,0 0,7 -6,0Z", DISC = "M-5,0A5,5 0 1 1 5,0A5,5 0 1 1 -5,0Z";

function scaleOf(values, from, to, isReversed) {
  let low = Math.min(...values), high = Math.max(...values);
  const pad = 0.07 * (high - low) || 0.05;
  [low, high] = isReversed ? [high + pad, low - pad] : [low - pad, high + pad];
  const place = value => from + (value - low) / (high - low) * (to - from);
  const span = Math.abs(high - low), rough = span / 7, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find(factor => power * factor >= rough);
  const first = Math.ceil(Math.min(low, high) / step);
  const ticks = Array.from({length: Math.floor(span / step) + 1}, (_, i) => (first + i) * step);
  return {place, ticks: ticks.filter(tick => tick <= Math.max(low, high))};
}

function showChart() {
  const width = Math.max(320, Math.min(760, find("chart").clientWidth - 28));
  const [height, left, bottom] = [Math.max(300, 0.6 * width), 62, 48];
  const ofX = view.x === null ? null : page.scores[view.x], ofY = page.scores[view.y];
  const valueX = row => ofX ? row.candidate.measured[view.x] : row.index + 1;
  const valueY = row => row.candidate.measured[view.y];
  const x = scaleOf(rows.map(valueX), left, width - 12, ofX?.sign < 0);
  const y = scaleOf(rows.map(valueY), height - bottom, 12, ofY.sign < 0);
  const at = row => [x.place(valueX(row)), y.place(valueY(row))];
  const svg = element("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": find("chart-says").textContent});
  const tickText = (score, value) => score ? score.percent ? `${Math.round(1000 * value) / 10}%` : `${Number(value.toPrecision(6))}` : `${value}`;
  for (const tick of x.ticks) svg.append(
    element("line", {class: "grid-line", x1: x.place(tick), x2: x.place(tick), y1: 12, y2: height - bottom}),
    element("text", {x: x.place(tick), y: height - bottom + 18, "text-anchor": "middle"}, tickText(ofX, tick)));
  for (const tick of y.ticks) svg.append(
    element("line", {class: "grid-line", x1: left, x2: width - 12, y1: y.place(tick), y2: y.place(tick)}),
    element("text", {x: left - 8, y: y.place(tick) + 4, "text-anchor": "end"}, tickText(ofY, tick)));
  const title = score => `${score.name} (${score.sign > 0 ? "higher" : "lower"} is better)`;
  svg.append(
    element("text", {class: "axis", x: (left + width) / 2, y: height - 8, "text-anchor": "middle"},
      ofX ? title(ofX) : "candidate, in the order measured"),
    element("text", {class: "axis", transform: `translate(14,${(height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle"}, title(ofY)));
  const limitLine = (j, scale, line) => {
    const score = page.scores[j], limit = settings.limits[j];
    if (limit === null) return;
    const value = score.kind === "guard"
      ? page.candidates[score.reference].measured[j] - score.sign * limit : limit;
    svg.append(element("line", {class: "limit-line", ...line(scale.place(value))}));
  };
  if (ofX) limitLine(view.x, x, p => ({x1: p, x2: p, y1: 12, y2: height - bottom}));
  limitLine(view.y, y, p => ({x1: left, x2: width - 12, y1: p, y2: p}));
  const best = recommended(rows);
  const isFlat = ofX && page.scores.filter(s => s.kind === "objective").length === 2
    && ofX.kind === "objective" && ofY.kind === "objective" && view.x !== view.y;
  if (isFlat) {
    const corners = rows.filter(row => row.onFront).map(at).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const steps = corners.flatMap(([px, py], i) => i ? [[corners[i - 1][0], py], [px, py]] : [[px, py]]);
    svg.append(element("polyline", {class: "front-line", points: steps.map(p => p.join()).join(" ")}));
  }
  const kind = row => row === best ? "star" : !row.candidate.is_merge ? "known" : row.onFront ? "front"
    : row.excess > 0 ? "out" : "other";
  const order = ["out", "other", "front", "known", "star"];
  const drawn = [...rows].sort((a, b) => order.indexOf(kind(a)) - order.indexOf(kind(b)));
  const marks = [], named = [];
  for (const row of drawn) {
    const [px, py] = at(row), k = kind(row), isLucky = standing(row)[0] === "luck";
    if (k === "star" || k === "known" || k === "front") {
      const bar = (score, j, scale) => scale && candidateBar(row, j, scale);
      const across = ofX && bar(ofX, view.x, x), up = bar(ofY, view.y, y);
      if (across) svg.append(element("line", {class: "error", x1: across[0], x2: across[1], y1: py, y2: py}));
      svg.append(element("line", {class: "error", x1: px, x2: px, y1: up[0], y2: up[1]}));
    }
    const shape = k === "star" ? STAR : k === "known" ? DIAMOND : DISC;
    marks.push(element("path", {
      class: `mark ${k}${isLucky ? " lucky" : ""}`, d: shape, transform: `translate(${px},${py})`,
      onclick: () => see(row.candidate.name),
    }, element("title", {}, [row.candidate.name, `limits: ${standing(row)[1]}`,
      ...page.scores.map((s, j) => `${s.name} ${row.candidate.texts[j]}`), ...row.candidate.lines.slice(0, 6)].join("\n"))));
    if (k === "star" || ["base", "expert"].includes(row.candidate.role)) named.push([row.candidate.name, px, py, k]);
  }
  svg.append(...marks, ...labels(named, drawn.map(at), [left, 12, width - 12, height - bottom]));
  find("chart").replaceChildren(svg);
}

function candidateBar(row, j, scale) {
  const value = row.candidate.measured[j], error = row.candidate.stderrs[j] ?? 0;
  return [scale.place(value - error), scale.place(value + error)];
}

// Names beside their marks: of a few places, that which covers least
function labels(named, marks, [left, top, right, bottom]) {
  const taken = marks.map(([x, y]) => [x - 7, y - 7, x + 7, y + 7]), made = [];
  const over = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0]))
    * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  for (const [name, x, y, k] of named.reverse()) {
    const length = 7.2 * name.length;
    const places = [0, -16, 16, -30, 30].flatMap(dy => [[x + 13, y + dy, "start"], [x - 13, y + dy, "end"]]);
    const box = ([px, py, anchor]) => [anchor === "start" ? px : px - length, py - 8, anchor === "start" ? px + length : px, py + 8];
    const cost = place => {
      const own = box(place), area = length * 16;
      return taken.reduce((sum, other) => sum + over(own, other), 0) + 10 * (area - over(own, [left, top, right, bottom]))
        + Math.abs(place[1] - y);
    };
    const chosen = places.reduce((a, b) => cost(b) < cost(a) ? b : a);
    taken.push(box(chosen));
    made.push(element("text", {class: `name ${k}`, x: chosen[0], y: chosen[1] + 4, "text-anchor": chosen[2]}, name));
  }
  return made;
}

// All about one candidate

function showCandidate() {
  const name = view.seen ?? recommended(rows).candidate.name;
  const candidate = page.candidates.find(c => c.name === name);
  find("candidate").value = name;
  find("candidate-title").textContent = `All about ${name}`;
  find("recipe").replaceChildren(
    `${candidate.method}. `, ...candidate.lines.flatMap(line => [element("span", {}, line), " "]));
  find("commands").textContent = candidate.commands;
  find("recipe-file").replaceChildren(element("a", {href: `recipes/${encodeURIComponent(name)}.yaml`}, `recipes/${name}.yaml`));
  find("scores").replaceChildren(...page.scores.map((score, j) => element("tr", {},
    element("th", {scope: "row"}, score.name),
    element("td", {class: "number"}, candidate.texts[j]),
    element("td", {class: "number"}, candidate.intervals[j].map(bound => figure(score, bound)).join(" to ")),
    element("td", {class: "number"}, candidate.holdout?.[j] ?? "not measured"))));
  const slices = page.slices.filter(slice => slice.texts[name]);
  find("slices").hidden = !slices.length;
  find("slice-rows").replaceChildren(...slices.map(slice => element("tr", {},
    element("th", {scope: "row"}, slice.name),
    ...slice.texts[name].map((text, j) => element("td", {class: "number"}, text ?? "–",
      element("small", {class: "block"}, `${slice.n_items[j]} items`))))));
  showDepth(name);
  const others = page.candidates.filter(c => c.name !== name);
  const usual = others.find(c => c.role === "expert") ?? others[0];
  const against = others.some(c => c.name === view.against) ? view.against : usual?.name;
  find("against").replaceChildren(...others.map(c => element("option", {value: c.name, selected: c.name === against}, c.name)));
  showItems();
}

const COLOURS = 7;

async function showDepth(name) {
  const panels = (await pack("depth"))[name] ?? [];
  if (find("candidate").value !== name) return;
  find("depth").replaceChildren(...panels.map(panel => {
    const values = panel.lines.flatMap(line => line.values).filter(value => value !== null);
    const layers = panel.lines[0].values.length;
    const x = scaleOf([0, layers], 40, 330, false), y = scaleOf([0, 1, ...values], 150, 10, false);
    const svg = element("svg", {viewBox: "0 0 340 190", role: "img", "aria-label":
      `${panel.title}: ${panel.lines.map(line => `${line.expert} ${line.values.map(v => v?.toFixed(2) ?? "–").join(", ")}`).join("; ")}`});
    for (const tick of y.ticks) svg.append(
      element("line", {class: "grid-line", x1: 40, x2: 330, y1: y.place(tick), y2: y.place(tick)}),
      element("text", {x: 34, y: y.place(tick) + 4, "text-anchor": "end"}, `${Number(tick.toPrecision(6))}`));
    for (const tick of x.ticks.filter(t => Number.isInteger(t) && t >= 0 && t < layers)) svg.append(
      element("text", {x: x.place(tick + 0.5), y: 168, "text-anchor": "middle"}, `${tick}`));
    svg.append(element("text", {class: "axis", x: 185, y: 186, "text-anchor": "middle"}, "layer"));
    for (const line of panel.lines) {
      const points = line.values.flatMap((v, i) => v === null ? [] : [[x.place(i), y.place(v)], [x.place(i + 1), y.place(v)]]);
      svg.append(element("polyline", {class: `expert-${line.colour % COLOURS}`, points: points.map(p => p.join()).join(" ")}));
    }
    const key = panel.lines.map(line => element("span", {class: `key expert-${line.colour % COLOURS}`}, line.expert));
    return element("figure", {}, element("figcaption", {}, `${panel.title} `, ...key), svg);
  }));
}

let asked = 0;
async function showItems() {
  if (!find("won-and-lost").open) return;
  const turn = ++asked, list = find("items"), name = find("candidate").value, other = find("against").value;
  const split = page.held_out.includes(name) && page.held_out.includes(other) ? "holdout" : "search";
  if (!page.packs[`items.${split}`] || !other) return;
  const [items, scores] = await Promise.all([pack(`items.${split}`), pack(`scores.${split}`)]);
  const [ours, theirs] = await Promise.all([replies(split, name), replies(split, other)]);
  if (turn !== asked) return;
  const signs = Object.fromEntries(page.scores.map(s => [s.name, s.sign]));
  const gains = items.map(([score], i) => signs[score] * (scores[name][i] - scores[other][i]));
  const isKnown = items.map((_, i) => scores[name][i] !== null && scores[other][i] !== null);
  const wanted = find("of-score").value, change = find("change").value;
  find("item-rows").replaceChildren(...page.scores.map(score => {
    const own = items.map((_, i) => i).filter(i => items[i][0] === score.name && isKnown[i]);
    return element("tr", {}, element("th", {scope: "row"}, score.name),
      element("td", {class: "number"}, `${own.filter(i => gains[i] > 0).length}`),
      element("td", {class: "number"}, `${own.filter(i => gains[i] < 0).length}`),
      element("td", {class: "number"}, `${own.length}`));
  }));
  const found = items.map((_, i) => i).filter(i => isKnown[i] && (!wanted || items[i][0] === wanted)
    && (change === "won" ? gains[i] > 0 : change === "lost" ? gains[i] < 0 : true));
  const where = split === "holdout" ? "held-out items" : "items of the search";
  find("items-say").textContent = `${found.length} of ${items.length} ${where}.`;
  list.replaceChildren();
  const more = element("button", {type: "button", onclick: add}, "Show more items");
  function add() {
    const from = list.querySelectorAll("article").length;
    more.remove();
    list.append(...found.slice(from, from + PAGE_OF_ITEMS).map(itemOf));
    if (found.length > from + PAGE_OF_ITEMS) list.append(more);
  }
  function itemOf(i) {
    const [score, item, prompt, target, sent] = items[i];
    const reply = (who, texts) => element("dl", {}, element("dt", {}, `${who} (score ${scores[who][i]})`),
      element("dd", {}, texts?.replies[i] ?? "this reply is not in the page; it is in the run directory"),
      ...(texts?.reasons?.[i] ? [element("dt", {}, "the judge's reason"), element("dd", {}, texts.reasons[i])] : []));
    return element("article", {class: "example"},
      element("p", {}, element("strong", {class: gains[i] > 0 ? "kept" : gains[i] < 0 ? "broken" : ""},
        gains[i] > 0 ? "won" : gains[i] < 0 ? "lost" : "alike"), ` ${score}`, element("small", {}, ` item ${item}`)),
      element("dl", {},
        element("dt", {}, "prompt"), element("dd", {}, prompt,
          sent ? element("details", {}, element("summary", {}, "the conversation as the model saw it"), element("pre", {}, sent)) : null),
        element("dt", {}, "target"), element("dd", {}, target)),
      element("div", {class: "grid"}, reply(name, ours), reply(other, theirs)));
  }
  add();
}

async function replies(split, name) {
  if (!page.packs[`replies.${split}.${name}`]) return null;
  const own = await pack(`replies.${split}.${name}`);
  if (!own.first) return own;
  const known = await pack(`replies.${split}.${own.first}`);
  const told = key => own[key]?.map((text, i) => text === 0 ? known[key]?.[i] : text);
  return {replies: told("replies"), reasons: told("reasons")};
}

function update() {
  rows = ranked(page, settings);
  for (const axis of ["x", "y"]) if (find(axis)) find(axis).value = view[axis];
  showSliders();
  showChoice();
  showTable();
  showChart();
  showCandidate();
  writeState();
}

find("explore").hidden = false;
readState();
listen();
update();
