// What the report page does beyond standing there: theme, sorting, print, and the generated texts side by side.
// Text reaches the page through textContent alone, so nothing a model wrote can become markup.
"use strict";

function make(tag, settings, ...children) {
  const { dataset, ...plain } = settings || {};
  const node = Object.assign(document.createElement(tag), plain);
  Object.assign(node.dataset, dataset);
  node.append(...children);
  return node;
}

// ---------------------------------------------------------------------------------------------------------------------
// Theme, print, sorting

function themeButton() {
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (systemDark.matches ? "dark" : "light")) === "dark";
  const button = make("button", { type: "button", className: "theme" });
  const setLabel = () => { button.textContent = isDark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; setLabel(); });
  systemDark.addEventListener("change", setLabel);
  setLabel();
  document.querySelector("header").append(button);
}

function openForPrint() {
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")].filter((part) => !part.closest("#texts"));
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of opened) part.open = false; });
}

function sortable(table) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const body = table.tBodies[0];
  const value = (row, place) => {
    const cell = row.cells[place];
    const text = cell.dataset.value ?? cell.textContent.trim();
    const number = Number(text.replaceAll(",", ""));
    return text !== "" && !Number.isNaN(number) ? number : cell.matches(".missing") ? "" : text;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  heads.forEach((head, place) => {
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && !head.matches(".number"));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [value(row, place), row]);
      const empty = (entry) => entry[0] === "";
      rows.sort((a, b) => empty(a) - empty(b) || (down ? 1 : -1) * compare(a[0], b[0])); // what has no number stays last
      body.append(...rows.map(([, row]) => row));
    });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Generated texts

const PAGE = 10; // items at once
const MOST_PAIRS = 250000; // words x words up to which two texts are compared

const words = (text) => text.match(/\s+|[^\s]+/g) || [];

// The longest common run of words of two texts, as steps [kind, text]; null where they are too long to compare.
function compared(reference, text) {
  const a = words(reference), b = words(text);
  if (a.length * b.length > MOST_PAIRS) return null;
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const steps = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { steps.push(["", a[i]]); i++; j++; }
    else if (j >= b.length || (i < a.length && table[i + 1][j] >= table[i][j + 1])) steps.push(["del", a[i++]]);
    else steps.push(["ins", b[j++]]);
  }
  return { common: table[0][0], steps };
}

function nearest(references, text) {
  let best = null;
  for (const reference of references) {
    const difference = compared(reference, text);
    const share = ({ common, steps }) => common / (steps.length || 1);
    if (difference && (!best || share(difference) > share(best))) best = difference;
  }
  return best;
}

function marked(references, text) {
  const node = make("span", { className: "text" });
  const difference = references.includes(text) || !references.length ? null : nearest(references, text);
  if (!difference) { node.append(text || "(nothing)"); return node; }
  let last = null;
  for (const [kind, word] of difference.steps) {
    if (last && last.kind === kind) last.text += word;
    else { last = { kind, text: word }; node.append((last.node = kind ? make(kind) : document.createTextNode(""))); }
    last.node.textContent = last.text;
  }
  return node;
}

function article(data, item, shown) {
  const list = make("dl", { className: "written" });
  const line = (kind, name, ...content) => list.append(make("div", { className: kind }, make("dt", {}, name), make("dd", {}, ...content)));
  const [first, ...others] = item.r;
  if (first !== undefined) {
    const more = others.length
      ? [make("details", {}, make("summary", {}, `${others.length} more`), ...others.map((text) => make("p", {}, text)))]
      : [];
    line("reference", "reference", make("span", { className: "text" }, first), ...more);
  }
  const writers = new Map();
  for (const model of shown) {
    const place = item.m[model];
    if (place >= 0) writers.set(place, [...(writers.get(place) || []), data.models[model]]);
  }
  for (const [place, names] of writers) {
    const [text, right, scores] = item.t[place];
    const score = make("span", { className: "score" });
    if (right !== null) score.append(make("b", { className: right ? "right" : "" }, right ? "✓ right" : "✗ wrong"));
    const numbers = data.scores.map((name, i) => (scores[i] === null ? null : `${name} ${scores[i]}`)).filter(Boolean);
    if (numbers.length) score.append((right !== null ? " · " : "") + numbers.join(" · "));
    line("", names.join(", "), marked(item.r, text), score);
  }
  return make("article", {}, make("h3", {}, `Item ${item.n}`), make("p", { className: "prompt" }, item.p), list);
}

// The models to choose from, by strategy; the first of each strategy is chosen at the start.
function modelChoice(data, changed) {
  const boxes = data.models.map((name, i) =>
    make("input", { type: "checkbox", name: "model", value: name, checked: data.groups.indexOf(data.groups[i]) === i }));
  const first = boxes.map((box) => box.checked);
  const sets = [...new Set(data.groups)].map((group) =>
    make("fieldset", {}, make("legend", {}, group),
      ...boxes.filter((_, i) => data.groups[i] === group).map((box) => make("label", {}, box, box.value))));
  const set = (label, chosen) => {
    const button = make("button", { type: "button" }, label);
    button.addEventListener("click", () => { boxes.forEach((box, i) => { box.checked = chosen(i); }); changed(); });
    return button;
  };
  const buttons = make("div", { className: "texts-buttons" },
    set("First of each strategy", (i) => first[i]), set("All", () => true), set("None", () => false));
  const summary = make("summary");
  const shown = () => {
    const chosen = boxes.flatMap((box, i) => (box.checked ? [i] : []));
    summary.textContent = `Models: ${chosen.length} of ${boxes.length} shown`;
    return chosen;
  };
  return { node: make("details", { className: "texts-models" }, summary, buttons, ...sets), shown };
}

function texts(place, data) {
  let page = 0;
  const search = make("input", { type: "search", placeholder: "words in prompt or texts" });
  const differ = make("input", { type: "checkbox" });
  const wrong = make("input", { type: "checkbox", disabled: !data.items.some((item) => item.t.some((text) => text[1] !== null)) });
  const choice = modelChoice(data, () => { page = 0; show(); });
  const count = make("p", { role: "status" });
  const back = make("button", { type: "button" }, "Previous"), next = make("button", { type: "button" }, "Next");
  const list = make("div");
  const haystacks = data.items.map((item) => [item.p, ...item.r].join("\n").toLowerCase());

  function matching(shown) {
    const wanted = search.value.trim().toLowerCase();
    return data.items.filter((item, i) => {
      const places = [...new Set(shown.map((model) => item.m[model]).filter((place) => place >= 0))];
      if (differ.checked && new Set(places.map((place) => item.t[place][0])).size < 2) return false;
      if (wrong.checked && !places.some((place) => item.t[place][1] === 0)) return false;
      return !wanted || haystacks[i].includes(wanted) || places.some((place) => item.t[place][0].toLowerCase().includes(wanted));
    });
  }

  function show() {
    const shown = choice.shown();
    const matches = matching(shown);
    page = Math.max(0, Math.min(page, Math.ceil(matches.length / PAGE) - 1));
    const here = matches.slice(page * PAGE, page * PAGE + PAGE);
    const filtered = matches.length < data.items.length ? ` that match, of ${data.items.length}` : "";
    count.textContent = here.length
      ? `Items ${page * PAGE + 1} to ${page * PAGE + here.length} of ${matches.length}${filtered}`
      : `No item of ${data.items.length} matches.`;
    back.disabled = page === 0;
    next.disabled = (page + 1) * PAGE >= matches.length;
    list.replaceChildren(...here.map((item) => article(data, item, shown)));
  }

  const turn = (by) => () => { page += by; show(); place.scrollIntoView(); };
  back.addEventListener("click", turn(-1));
  next.addEventListener("click", turn(1));
  for (const control of [search, differ, wrong, choice.node])
    control.addEventListener(control === search ? "input" : "change", () => { page = 0; show(); });
  const tools = make("form", { className: "texts-tools" },
    make("label", {}, "Find ", search),
    make("label", {}, differ, "only where the shown models differ"),
    make("label", {}, wrong, "only where one of them is wrong"),
    choice.node);
  tools.setAttribute("aria-label", "Filter the generated texts");
  tools.addEventListener("submit", (event) => event.preventDefault());
  place.replaceChildren(tools, make("div", { className: "texts-pages" }, count, back, next), list);
  show();
}

themeButton();
openForPrint();
for (const table of document.querySelectorAll("table.sortable")) sortable(table);
const data = document.getElementById("texts-data");
if (data) texts(document.getElementById("texts"), JSON.parse(data.textContent));
