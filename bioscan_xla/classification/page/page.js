"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const format = (n) => n.toLocaleString("en", { maximumFractionDigits: n < 10 && n % 1 ? 2 : 0 });
const percent = (part) => (part >= 0.1 ? Math.round(100 * part) : Number((100 * part).toPrecision(2))) + " %";

function numbers(field, Kind) {
  if (field === null || field === undefined) return null;
  const bytes = Uint8Array.from(atob(field), (letter) => letter.charCodeAt(0));
  return new Kind(bytes.buffer);
}
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
function draw(name, attributes = {}, text = null) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  return element;
}
function onActivate(element, action) {
  element.setAttribute("tabindex", "0");
  element.setAttribute("role", "button");
  element.addEventListener("click", action);
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); action(); }
  });
}
function hide(id) {
  $(id).remove();
}

const counts = D.counts && {
  sample: numbers(D.counts.sample, Int32Array),
  lineage: numbers(D.counts.lineage, Int32Array),
  reads: numbers(D.counts.reads, Float32Array),
  sequences: numbers(D.counts.sequences, Int32Array),
};

// Colours: a hue for each group (a phylum, or an order where nearly all are of one phylum), most
// frequent first; what has no name at that rank is grey.
const HUES = [188, 28, 265, 142, 340, 52, 215, 95, 300, 10, 165, 240];
const groupOf = D.groups.of_lineage;
const groupTotals = new Map();
groupOf.forEach((group, l) => groupTotals.set(group, (groupTotals.get(group) || 0) + D.reads[l]));
const groupNames = [...groupTotals.keys()].sort((a, b) => groupTotals.get(b) - groupTotals.get(a));
const hueOf = new Map(groupNames.filter((name) => name !== D.groups.unnamed).map((name, i) => [name, i]));
function colour(group, light = 58) {
  if (group === D.groups.other) return `hsl(205 12% ${light - 24}%)`;
  if (!hueOf.has(group)) return `hsl(205 8% ${light}%)`;
  const at = hueOf.get(group), round = Math.floor(at / HUES.length);
  return `hsl(${HUES[at % HUES.length] + 9 * round} ${62 - 14 * (round % 3)}% ${light}%)`;
}

// ---- head
$("title").textContent = D.title;
$("lede").textContent = D.lede;
for (const [label, value, small] of D.tiles) {
  $("tiles").append(make("div", {}, make("dt", {}, label), make("dd", {}, value, make("small", {}, small))));
}

// ---- composition
let chosen = -1; // sample, -1 for all
let byReads = Boolean(counts);
let path = []; // names from the root to the taxon that is shown
let opened = false;

function weights() { // of each lineage in the chosen sample
  const name = byReads ? "reads" : "sequences";
  if (chosen < 0) return D[name];
  const result = new Float64Array(D.lineages.length);
  counts.sample.forEach((s, i) => { if (s === chosen) result[counts.lineage[i]] += counts[name][i]; });
  return result;
}
function buildTree(perLeaf) {
  const root = { name: "All", rank: -1, value: 0, children: new Map(), parent: null, group: null };
  D.lineages.forEach((names, l) => {
    if (!perLeaf[l]) return;
    let node = root;
    node.value += perLeaf[l];
    names.forEach((name, rank) => {
      if (!name) return;
      if (!node.children.has(name)) {
        node.children.set(name, { name, rank, value: 0, children: new Map(), parent: node, group: groupOf[l] });
      }
      node = node.children.get(name);
      node.value += perLeaf[l];
    });
  });
  return root;
}
const sorted = (node) => [...node.children.values()].sort((a, b) => b.value - a.value);

function showComposition() {
  const root = buildTree(weights());
  let node = root;
  const valid = [];
  for (const name of path) {
    if (!node.children.has(name)) break;
    node = node.children.get(name);
    valid.push(name);
  }
  path = valid;
  // What nearly all sequences share is passed over.
  for (let first = !opened; first; ) {
    const [child] = sorted(node);
    first = Boolean(child) && child.value > 0.9 * node.value && child.children.size > 0;
    if (first) { node = child; path.push(child.name); }
  }
  opened = true;
  drawSunburst(node);
  $("crumbs").replaceChildren(...["All", ...path].map((name, i) => make("button", {
    type: "button", "aria-current": i === path.length ? "true" : null,
    onclick: () => { path = path.slice(0, i); showComposition(); },
  }, name)));
  const unit = byReads ? "reads" : "sequences";
  const named = sorted(node);
  const rest = node.value - named.reduce((sum, child) => sum + child.value, 0);
  const rows = named.map((child) => [child.name, child.value, child]);
  if (rest > node.value * 1e-9) rows.push([node === root ? "no name" : "not named further", rest, null]);
  $("children").replaceChildren(...rows.map(([name, value, child]) => {
    const italic = child && child.rank >= D.ranks.indexOf("genus") ? "taxon" : "";
    const bar = make("i", {});
    bar.style.cssText = `width:${(100 * value) / (node.value || 1)}%;background:${child ? colour(child.group) : "var(--faint)"}`;
    return make("li", {}, make("button", {
      type: "button", disabled: child && child.children.size ? null : "",
      title: child ? D.ranks[child.rank] : "",
      onclick: () => { path = [...path, name]; showComposition(); },
    }, bar, make("span", { class: italic }, name), make("span", { class: "n" }, `${format(value)} ${unit} · ${percent(value / (node.value || 1))}`)));
  }));
}
function drawSunburst(node) {
  const svg = $("sunburst");
  svg.replaceChildren();
  const RINGS = 4, INNER = 74, WIDTH = (252 - INNER) / RINGS;
  function ring(parent, from, to, depth, trail) {
    let start = from;
    for (const child of sorted(parent)) {
      const end = start + ((to - from) * child.value) / parent.value;
      if (end - start > 0.006) {
        const r0 = INNER + depth * WIDTH, r1 = r0 + WIDTH - 1.5, whole = Math.min(end, start + 2 * Math.PI - 1e-4);
        const large = whole - start > Math.PI ? 1 : 0;
        const at = (r, a) => `${(r * Math.sin(a)).toFixed(2)} ${(-r * Math.cos(a)).toFixed(2)}`;
        const arc = draw("path", {
          d: `M${at(r0, start)}L${at(r1, start)}A${r1} ${r1} 0 ${large} 1 ${at(r1, whole)}L${at(r0, whole)}A${r0} ${r0} 0 ${large} 0 ${at(r0, start)}Z`,
          fill: colour(child.group, 50 + 7 * depth),
        });
        const names = [...trail, child.name];
        arc.append(draw("title", {}, `${D.ranks[child.rank]}: ${child.name}, ${format(child.value)} (${percent(child.value / node.value)})`));
        onActivate(arc, () => { path = [...path, ...names]; if (!child.children.size) path.pop(); showComposition(); });
        arc.setAttribute("aria-label", `${child.name}, ${percent(child.value / node.value)}`);
        svg.append(arc);
        if (end - start > 0.3 && child.name.length * 6.2 < (end - start) * (r0 + WIDTH / 2)) {
          const middle = (start + end) / 2, turn = (middle * 180) / Math.PI, flip = middle > Math.PI / 2 && middle < 1.5 * Math.PI;
          const label = draw("text", { class: "inner", transform: `rotate(${turn}) translate(0 ${-(r0 + WIDTH / 2)}) rotate(${flip ? 180 : 0})`, dy: 4 }, child.name);
          svg.append(label);
        }
        if (depth + 1 < RINGS) ring(child, start, end, depth + 1, names);
      }
      start = end;
    }
  }
  if (node.value) ring(node, 0, 2 * Math.PI, 0, []);
  const centre = draw("circle", { r: INNER - 4, fill: "transparent" });
  svg.append(centre, draw("text", { y: -4, "font-size": node.name.length > 14 ? 11 : 15, "font-weight": 600, style: "fill:var(--ink)" }, node.name),
    draw("text", { y: 15 }, `${format(node.value)} ${byReads ? "reads" : "sequences"}`));
  if (path.length) {
    onActivate(centre, () => { path = path.slice(0, -1); showComposition(); });
    centre.setAttribute("aria-label", "One rank up");
    svg.append(draw("text", { y: 33, style: "fill:var(--accent)" }, "↑ one rank up"));
  }
}
function chooseSample(sample) {
  chosen = sample;
  $("sample").value = String(sample);
  markSites();
  showComposition();
}
function markSites() {
  for (const site of document.querySelectorAll(".site")) site.classList.toggle("on", Number(site.dataset.sample) === chosen);
}
$("sample").append(make("option", { value: -1 }, "all samples"), ...D.samples.map((s, i) => make("option", { value: i }, s.name + (s.control ? " (control)" : ""))));
$("sample").addEventListener("change", () => chooseSample(Number($("sample").value)));
if (counts) {
  for (const [name, value] of [["reads", true], ["sequences", false]]) {
    const input = make("input", { type: "radio", name: "weight", onchange: () => { byReads = value; showComposition(); } });
    input.checked = value;
    $("weight").append(make("label", {}, input, name));
  }
} else {
  document.querySelector("#composition .controls").remove();
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && path.length) { path = path.slice(0, -1); showComposition(); }
});
showComposition();

// ---- map and depth
const sites = D.samples.map((s, i) => ({ ...s, index: i })).filter((s) => s.latitude !== null && s.longitude !== null);
const deep = D.samples.map((s, i) => ({ ...s, index: i })).filter((s) => s.depth !== null && !s.control);
if (!sites.length && !deep.length) hide("places");
else {
  if (sites.length) drawMap(); else $("map").parentElement.remove();
  if (deep.length) drawDepth(); else $("depth").parentElement.remove();
  drawKey();
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    if (sites.length) drawMap();
    if (deep.length) drawDepth();
    markSites();
  });
}
function drawMap() {
  // As many units as pixels, so that labels have one size in every window.
  const svg = $("map"), W = Math.round(svg.clientWidth) || 640, H = Math.round(Math.max(260, W * 0.67));
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  const lats = sites.map((s) => s.latitude);
  // Across the date line the shorter way round is taken.
  const raw = sites.map((s) => s.longitude), shift = Math.max(...raw) - Math.min(...raw) > 180;
  const unwrap = (lon) => (shift && lon < 0 ? lon + 360 : lon);
  const lons = raw.map(unwrap);
  const middle = (values) => (Math.min(...values) + Math.max(...values)) / 2;
  const squeeze = Math.max(0.2, Math.cos((middle(lats) * Math.PI) / 180));
  const span = Math.max(6, 1.5 * Math.max((Math.max(...lons) - Math.min(...lons)) * squeeze, (Math.max(...lats) - Math.min(...lats)) * (W / H)));
  const scale = W / span, x0 = middle(lons), y0 = middle(lats);
  const X = (lon) => W / 2 + (lon - x0) * squeeze * scale, Y = (lat) => H / 2 - (lat - y0) * scale;
  const points = numbers(D.coastline.points, Int16Array);
  for (const turn of shift ? [0, 360] : [0, 360, -360]) {
    let at = 0, d = "";
    for (const length of D.coastline.lengths) {
      const corners = [];
      for (let i = 0; i < length; i++, at += 2) corners.push([X(points[at] / 180 + turn), Y(points[at + 1] / 180)]);
      if (corners.some(([x, y]) => x > -W && x < 2 * W && y > -H && y < 2 * H)) d += "M" + corners.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L") + "Z";
    }
    if (d) svg.append(draw("path", { class: "land", d }));
  }
  // The finest steps whose labels have room: 60 pixels side by side, 40 above each other.
  const stepOf = (room, degree) => [0.5, 1, 2, 5, 10, 20, 30].find((s) => s * degree >= room) || 45;
  const east = stepOf(60, squeeze * scale), north = stepOf(40, scale), half = W / (2 * squeeze * scale);
  const label = (x, y, text) => draw("text", { class: "degrees", x, y }, text);
  for (let lon = Math.ceil((x0 - half) / east) * east; X(lon) < W; lon += east) {
    const value = ((lon + 540) % 360) - 180;
    svg.append(draw("line", { class: "axis", x1: X(lon), x2: X(lon), y1: 0, y2: H }));
    if (X(lon) > 40 && X(lon) < W - 44) svg.append(label(X(lon) + 3, H - 5, `${Math.abs(value)}°${value < 0 ? "W" : "E"}`));
  }
  for (let lat = Math.ceil((y0 - H / 2 / scale) / north) * north; Y(lat) > 0; lat += north) {
    svg.append(draw("line", { class: "axis", y1: Y(lat), y2: Y(lat), x1: 0, x2: W }));
    if (Y(lat) > 16 && Y(lat) < H - 18) svg.append(label(4, Y(lat) - 4, `${Math.abs(lat)}°${lat < 0 ? "S" : "N"}`));
  }
  const most = Math.max(...sites.map((s) => s.reads), 1);
  for (const site of [...sites].sort((a, b) => b.reads - a.reads)) {
    const dot = draw("circle", { class: "site", "data-sample": site.index, cx: X(unwrap(site.longitude)), cy: Y(site.latitude), r: 4 + 10 * Math.sqrt(site.reads / most), fill: site.control ? "#8a98a0" : colour(site.groups[0] ? site.groups[0][0] : null) });
    dot.append(draw("title", {}, `${site.name}${site.depth === null ? "" : `, ${format(site.depth)} m`}: ${format(site.reads)} reads of ${format(site.sequences)} sequences`));
    onActivate(dot, () => chooseSample(chosen === site.index ? -1 : site.index));
    dot.setAttribute("aria-label", site.name);
    svg.append(dot);
  }
  $("map-caption").textContent = `${sites.length === 1 ? "1 sample" : sites.length + " samples"} with a position. Area: reads; colour: the most frequent ${D.groups.rank}. Choose one to see its composition.`;
}
function depthRows() { // one of each sample, or of each range of depths where there are many
  const ordered = [...deep].sort((a, b) => a.depth - b.depth);
  if (ordered.length <= 80) return ordered.map((s) => ({ label: `${format(s.depth)} m`, name: s.name, groups: s.groups, sample: s.index }));
  const most = Math.max(...deep.map((s) => s.depth)), step = [10, 20, 50, 100, 200, 500].find((s) => most / s <= 40) || 1000;
  const ranges = new Map();
  for (const s of ordered) {
    const first = Math.floor(s.depth / step) * step;
    if (!ranges.has(first)) ranges.set(first, { label: `${format(first)}–${format(first + step)} m`, reads: 0, samples: 0, sums: new Map() });
    const range = ranges.get(first);
    range.samples += 1;
    range.reads += s.reads;
    for (const [group, share] of s.groups) range.sums.set(group, (range.sums.get(group) || 0) + share * s.reads);
  }
  return [...ranges.values()].map((range) => ({
    label: range.label, name: `${range.samples} samples`, sample: null,
    groups: [...range.sums].map(([group, reads]) => [group, reads / range.reads]),
  }));
}
function drawDepth() {
  const rows = depthRows(), svg = $("depth"), W = Math.round(svg.clientWidth) || 420, TOP = 24;
  const LEFT = rows.length && rows[0].sample === null ? 104 : 62;
  const ROW = Math.max(7, Math.min(48, 400 / rows.length)), H = TOP + ROW * rows.length + 4;
  const THICK = Math.min(ROW - 2, 26), GAP = (ROW - THICK) / 2;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.append(draw("text", { x: LEFT - 8, y: 14, "text-anchor": "end" }, "depth"), draw("text", { x: LEFT, y: 14 }, `share of the reads by ${D.groups.rank}`));
  let labelled = -Infinity;
  for (const [i, row] of rows.entries()) {
    const y = TOP + i * ROW;
    if (y - labelled >= 13) { svg.append(draw("text", { x: LEFT - 8, y: y + ROW / 2 + 4, "text-anchor": "end" }, row.label)); labelled = y; }
    const bar = draw("g", { class: "site", style: "stroke-width:0" });
    let x = LEFT;
    for (const [group, share] of row.groups) {
      const width = share * (W - LEFT - 4);
      bar.append(draw("rect", { x, y: y + GAP, width, height: THICK, fill: colour(group) }));
      x += width;
    }
    if (!row.groups.length) bar.append(draw("text", { x: LEFT, y: y + ROW / 2 + 4 }, "no reads"));
    bar.append(draw("title", {}, `${row.name}, ${row.label}: ${row.groups.slice(0, 3).map(([name, share]) => `${name} ${percent(share)}`).join(", ")}`));
    bar.setAttribute("aria-label", `${row.name}, ${row.label}`);
    if (row.sample !== null) {
      bar.setAttribute("data-sample", row.sample);
      onActivate(bar, () => chooseSample(chosen === row.sample ? -1 : row.sample));
    }
    svg.append(bar);
  }
  $("depth-caption").textContent = rows.length && rows[0].sample === null
    ? "A bar is the composition of all samples of a range of depths, together."
    : "A bar is the composition of one sample; the shallowest is at the top. Choose one to see it above.";
}
function drawKey() { // what the colours of map and depths mean
  const seen = new Set(D.samples.flatMap((s) => s.groups.map(([group]) => group)));
  const order = [...groupNames.filter((name) => hueOf.has(name)), D.groups.unnamed, D.groups.other].filter((name) => seen.has(name));
  $("key").replaceChildren(...order.map((name) => {
    const dot = make("b");
    dot.style.background = colour(name);
    return make("span", {}, dot, name);
  }));
}

// ---- vectors
const xs = numbers(D.x, Uint16Array);
if (!xs) hide("vectors");
else scatter();
function scatter() {
  $("vectors-note").textContent = D.projection_note;
  const canvas = $("scatter"), hidden = new Set();
  let view = { x: 0, y: 0, scale: 1 }, grab = null;
  const groups = new Map();
  const ys = numbers(D.y, Uint16Array), isNew = numbers(D.new, Uint8Array);
  const leaf = numbers(D.leaf, Int32Array); // lineage of each point
  leaf.forEach((l, i) => {
    const group = groupOf[l];
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(i);
  });
  const place = (i, w, h) => {
    const side = Math.min(w, h) * 0.92 * view.scale;
    return [w / 2 + view.x + (xs[i] / 65535 - 0.5) * side * (w / Math.min(w, h)) , h / 2 + view.y + (0.5 - ys[i] / 65535) * side * (h / Math.min(w, h))];
  };
  function paint() {
    const ratio = window.devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
    canvas.width = w * ratio; canvas.height = h * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const size = Math.max(1.6, Math.min(5, 260 / Math.sqrt(leaf.length))) * Math.sqrt(view.scale);
    context.globalAlpha = leaf.length > 20000 ? 0.55 : 0.8;
    for (const [group, members] of groups) {
      if (hidden.has(group)) continue;
      context.fillStyle = colour(group);
      for (const i of members) {
        const [x, y] = place(i, w, h);
        context.fillRect(x - size / 2, y - size / 2, size, size);
      }
    }
    context.globalAlpha = 1;
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--warm");
    context.beginPath();
    for (const [group, members] of groups) {
      if (hidden.has(group)) continue;
      for (const i of members) {
        if (!isNew[i]) continue;
        const [x, y] = place(i, w, h);
        context.moveTo(x + size + 2, y);
        context.arc(x, y, size + 2, 0, 2 * Math.PI);
      }
    }
    context.stroke();
  }
  let asked = false;
  const repaint = () => { if (!asked) { asked = true; requestAnimationFrame(() => { asked = false; paint(); }); } };
  const toPoint = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const [x, y] = toPoint(event), by = Math.exp(-event.deltaY / 500), w = canvas.clientWidth / 2, h = canvas.clientHeight / 2;
    const scale = Math.max(0.8, Math.min(60, view.scale * by)), real = scale / view.scale;
    view = { x: x - w - (x - w - view.x) * real, y: y - h - (y - h - view.y) * real, scale };
    repaint();
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { grab = [event.clientX - view.x, event.clientY - view.y]; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { grab = null; });
  canvas.addEventListener("dblclick", () => { view = { x: 0, y: 0, scale: 1 }; repaint(); });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
    if (move) view = { ...view, x: view.x + move[0], y: view.y + move[1] };
    else if (event.key === "+" || event.key === "-") { const by = event.key === "+" ? 1.3 : 1 / 1.3; view = { x: view.x * by, y: view.y * by, scale: view.scale * by }; }
    else if (event.key === "0") view = { x: 0, y: 0, scale: 1 };
    else return;
    event.preventDefault(); repaint();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (grab) { view = { ...view, x: event.clientX - grab[0], y: event.clientY - grab[1] }; repaint(); return; }
    const [x, y] = toPoint(event), w = canvas.clientWidth, h = canvas.clientHeight;
    let best = -1, least = 100;
    for (const [group, members] of groups) {
      if (hidden.has(group)) continue;
      for (const i of members) { const [px, py] = place(i, w, h), away = (px - x) ** 2 + (py - y) ** 2; if (away < least) { least = away; best = i; } }
    }
    const tip = $("tip");
    tip.classList.toggle("on", best >= 0);
    if (best < 0) return;
    tip.textContent = `${D.ids ? D.ids[best] + ": " : ""}${D.lineages[leaf[best]].filter(Boolean).slice(-2).join(", ") || "no name"}${isNew[best] ? " · looks new" : ""}`;
    tip.style.left = Math.min(x + 14, w - 200) + "px"; tip.style.top = y + 14 + "px";
  });
  canvas.addEventListener("pointerleave", () => $("tip").classList.remove("on"));
  for (const group of groupNames.filter((name) => groups.has(name))) {
    const dot = make("b"); dot.style.background = colour(group);
    const button = make("button", { type: "button", "aria-pressed": "true", onclick: () => {
      if (!hidden.delete(group)) hidden.add(group);
      button.setAttribute("aria-pressed", String(!hidden.has(group))); repaint();
    } }, dot, `${group} ${format(groups.get(group).length)}`);
    $("legend").append(button);
  }
  new ResizeObserver(repaint).observe(canvas);
  paint();
}

// ---- confidence by rank
for (const rank of D.by_rank) {
  const W = 250, H = 84, BINS = rank.kept.length, most = Math.max(...rank.kept.map((n, i) => n + rank.cut[i]), 1);
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H + 14}`, role: "img", "aria-label": `${rank.name}: ${percent(rank.share)} named` });
  for (let i = 0; i < BINS; i++) {
    const w = W / BINS - 1, x = (i * W) / BINS, kept = (H * rank.kept[i]) / most, cut = (H * rank.cut[i]) / most;
    svg.append(draw("rect", { x, y: H - kept, width: w, height: kept, fill: "var(--accent)" }), draw("rect", { x, y: H - kept - cut, width: w, height: cut, fill: "var(--faint)", opacity: 0.5 }));
  }
  if (rank.threshold !== null) svg.append(draw("line", { x1: W * rank.threshold, x2: W * rank.threshold, y1: 0, y2: H, stroke: "var(--warm)", "stroke-width": 1.5 }));
  svg.append(draw("text", { x: 0, y: H + 12 }, "0"), draw("text", { x: W, y: H + 12, "text-anchor": "end" }, "confidence 1"));
  const identity = rank.identity === null ? "" : ` · median identity ${percent(rank.identity)}`;
  $("ranks").append(make("div", { class: "rank" }, make("h3", {}, rank.name), make("p", {}, `${percent(rank.share)} named${identity}`), svg));
}

// ---- novel, controls, methods
$("novel-note").textContent = D.novel_note;
if (!D.novel.length) $("novel-list").append(make("p", { class: "note" }, "No sequence looks new."));
for (const item of D.novel) {
  const block = make("div", { class: "alignment" });
  for (const line of item.alignment) {
    for (const run of line.match(/([*]+|-+|[^*-]+)/g) || []) block.append(run[0] === "*" ? make("span", { class: "x" }, run) : run[0] === "-" ? make("span", { class: "g" }, run) : run);
    block.append("\n");
  }
  $("novel-list").append(make("details", {}, make("summary", {}, make("b", {}, item.sequence_id), make("span", { class: "says" }, item.says), make("span", { class: "score" }, item.score.toFixed(2))),
    make("p", { class: "note" }, item.evidence), item.alignment.length ? block : null));
}
if (!D.controls) hide("controls");
else {
  $("controls-note").textContent = D.controls.note;
  const number = (text) => make("td", { class: "n" }, text);
  $("controls-table").append(make("thead", {}, make("tr", {}, ...["sequence", "name"].map((t) => make("th", {}, t)), ...["reads in controls", "reads elsewhere"].map((t) => make("th", { class: "n" }, t)))),
    make("tbody", {}, ...D.controls.rows.map((row) => make("tr", {}, make("td", {}, row[0]), make("td", {}, row[1]), number(format(row[2])), number(format(row[3]))))));
}
$("methods-text").textContent = D.methods;
$("copy").addEventListener("click", async () => {
  try { await navigator.clipboard.writeText(D.methods); } catch {
    getSelection().selectAllChildren($("methods-text")); document.execCommand("copy");
  }
  $("copy").textContent = "Copied";
});
for (const [name, value] of D.facts) $("facts").append(make("dt", {}, name), make("dd", {}, value));
for (const section of document.querySelectorAll("main > section")) {
  $("nav").append(make("a", { href: "#" + section.id }, section.querySelector("h2").textContent));
}
document.documentElement.dataset.ready = "true";
