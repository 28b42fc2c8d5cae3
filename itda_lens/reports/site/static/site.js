"use strict";
// Draws the pages of a site from the data files beside them. Text goes into the page as text, never as
// markup. Data files are scripts that call `itda.receive`, since pages on disk may not fetch files.

const itda = (() => {
  const known = new Map(), wanted = new Map();

  function receive(name, value) {
    known.set(name, value);
    wanted.get(name)?.resolve(value);
  }

  function need(name) {
    if (known.has(name)) return Promise.resolve(known.get(name));
    if (!wanted.has(name)) {
      const entry = {};
      entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
      wanted.set(name, entry);
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onerror = () => entry.reject(new Error(`data/${name}.js cannot be read`));
      document.head.append(script);
    }
    return wanted.get(name).promise;
  }

  // Elements

  function h(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (value === null || value === undefined) continue;
      if (name === "style") for (const [key, own] of Object.entries(value)) element.style.setProperty(key, own);
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  }

  function s(tag, properties = {}, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // A quotation: before, token, after. Each part is isolated, so that text written from right to left
  // cannot reorder its surroundings.
  function quote([before, token, after], most = Infinity) {
    const start = before.length > most ? "…" + before.slice(-most) : before;
    return h("span", { class: "quote" },
      h("bdi", { class: "around" }, start), h("mark", {}, h("bdi", {}, token)), h("bdi", { class: "around" }, after));
  }

  const percent = (value) => (value === 0 ? "0%" : value < 0.0001 ? "<0.01%" : `${(100 * value).toFixed(value < 0.01 ? 2 : 1)}%`);
  const number = (value) => Number(value).toLocaleString("en-US", { maximumSignificantDigits: 3 });
  const signed = (value) => `${value < 0 ? "−" : "+"}${number(Math.abs(value))}`;
  const whole = (value) => Number(value).toLocaleString("en-US");
  const link = (atom) => `atom.html#atom=${atom}`;
  const labelOf = (table, atom) => [table.before[atom], table.token[atom], table.after[atom]];

  function hashValues() {
    return new URLSearchParams(location.hash.slice(1));
  }

  function setHash(values) {
    const text = new URLSearchParams(values).toString();
    try {
      history.replaceState(null, "", text ? `#${text}` : location.pathname);
    } catch { /* some browsers refuse it for files: the page works all the same */ }
  }

  // The table of atoms: only the rows that can be seen are in the page.

  const COLUMNS = [
    { key: "atom", title: "atom", hint: "Number of the atom. Builders put the most useful ones first.", show: (v) => whole(v) },
    { key: "label", title: "came from", hint: "The token whose activation the atom is, in its text" },
    { key: "density", title: "fires at", hint: "Share of tokens whose code has the atom", show: percent, down: true },
    { key: "energy", title: "energy", hint: "Its share of the squared coefficients of all codes", show: percent, down: true },
    { key: "mean_size", title: "mean size", hint: "Mean absolute coefficient where it fires", show: number, down: true },
    { key: "negative", title: "negative", hint: "Share of its coefficients that are negative: there the code says NOT", show: percent, down: true },
    { key: "f1", title: "label F1", hint: "How well “it fires at the label's token” predicts where it fires", show: (v) => v.toFixed(2), down: true },
  ];

  async function indexPage() {
    const [about, table] = await Promise.all([need("about"), need("table")]);
    const n = table.token.length;
    const columns = COLUMNS.filter(({ key }) => key === "atom" || key === "label" || table[key]);
    if (!about.labelled) Object.assign(columns[1], { title: "fires most at", hint: "The token with its largest coefficient" });
    const tokens = table.token.map((token) => token.toLowerCase());
    const texts = tokens.map((token, i) => table.before[i].toLowerCase() + token + table.after[i].toLowerCase());
    const [search, tokenOnly, scroller, count] = ["search", "token-only", "scroller", "count"].map((id) => document.getElementById(id));
    const heads = document.querySelector("#atoms thead tr"), body = document.querySelector("#atoms tbody");
    const state = { sort: "atom", down: false, order: [], active: 0, from: -1, to: -1 };
    search.form.addEventListener("submit", (event) => event.preventDefault());

    for (const column of columns) {
      heads.append(h("th", { class: `c-${column.key}${column.key === "label" ? "" : " n"}`, scope: "col" },
        h("button", { type: "button", title: column.hint, onclick: () => sortBy(column) }, column.title)));
    }

    function matcher() {
      const text = search.value, pattern = text.match(/^\/(.+)\/$/);
      search.removeAttribute("aria-invalid");
      const where = tokenOnly.checked ? tokens : texts;
      if (!pattern) {
        const low = text.toLowerCase();
        return (i) => where[i].includes(low);
      }
      try {
        const regex = new RegExp(pattern[1], "iu");
        const raw = tokenOnly.checked ? table.token : null;
        return (i) => regex.test(raw ? raw[i] : table.before[i] + table.token[i] + table.after[i]);
      } catch {
        search.setAttribute("aria-invalid", "true");
        return () => false;
      }
    }

    function refresh() {
      const matches = matcher(), order = [];
      for (let i = 0; i < n; i++) if (matches(i)) order.push(i);
      const values = state.sort === "label" ? tokens : state.sort === "atom" ? null : table[state.sort];
      const sign = state.down ? -1 : 1;
      order.sort((a, b) => {
        if (!values) return sign * (a - b);
        const x = values[a], y = values[b];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return x < y ? -sign : x > y ? sign : a - b;
      });
      Object.assign(state, { order, active: 0, from: -1, to: -1 });
      columns.forEach(({ key }, i) => {
        if (key === state.sort) heads.children[i].setAttribute("aria-sort", state.down ? "descending" : "ascending");
        else heads.children[i].removeAttribute("aria-sort");
      });
      count.textContent = order.length === n ? `${whole(n)} atoms` : `${whole(order.length)} of ${whole(n)} atoms`;
      const values_ = {};
      if (search.value) values_.q = search.value;
      if (tokenOnly.checked) values_.token = "1";
      if (state.sort !== "atom" || state.down) values_.sort = (state.down ? "-" : "") + state.sort;
      setHash(values_);
      scroller.scrollTop = 0;
      draw();
    }

    function sortBy(column) {
      state.down = state.sort === column.key ? !state.down : Boolean(column.down);
      state.sort = column.key;
      refresh();
    }

    document.getElementById("atoms").classList.toggle("scored", Boolean(table.f1));
    const narrow = () => matchMedia("(max-width: 46rem)").matches;
    const rowHeight = () => parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));

    function draw() {
      const height = rowHeight(), spare = 8;
      const from = Math.max(0, Math.floor(scroller.scrollTop / height) - spare);
      const to = Math.min(state.order.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / height) + spare);
      if (from === state.from && to === state.to) return;
      Object.assign(state, { from, to });
      const space = (rows) => h("tr", { class: "space", "aria-hidden": "true" }, h("td", { style: { height: `${rows * height}px` } }));
      const rows = state.order.slice(from, to).map((atom, i) => row(atom, from + i));
      body.replaceChildren(space(from), ...rows, space(state.order.length - to));
      if (!state.order.length) body.append(h("tr", {}, h("td"), h("td", { class: "none" }, "No atom matches.")));
    }

    function row(atom, place) {
      const cells = columns.map(({ key, show }) => {
        const value = key === "atom" ? atom : key === "label" ? null : table[key][atom];
        const inside = key === "label" ? h("a", { href: link(atom) }, quote(labelOf(table, atom), narrow() ? 10 : 26)) : value === null ? "–" : show(value);
        return h("td", { class: `c-${key}${key === "label" ? "" : " n"}` }, inside);
      });
      return h("tr", { "data-atom": atom, class: place === state.active && document.activeElement === scroller ? "active" : null,
        onclick: (event) => { if (!event.target.closest("a")) location.href = link(atom); } }, cells);
    }

    function choose(place) {
      const height = rowHeight(), head = heads.offsetHeight;
      state.active = Math.max(0, Math.min(state.order.length - 1, place));
      const top = state.active * height, seen = scroller.clientHeight - head;
      if (top < scroller.scrollTop) scroller.scrollTop = top;
      else if (top + height > scroller.scrollTop + seen) scroller.scrollTop = top + height - seen;
      state.from = -1;
      draw();
    }

    scroller.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
    addEventListener("resize", () => { state.from = -1; draw(); });
    scroller.addEventListener("focus", () => { state.from = -1; draw(); });
    scroller.addEventListener("blur", () => { state.from = -1; draw(); });
    scroller.addEventListener("keydown", (event) => {
      if (event.target !== scroller) return;
      const page = Math.floor(scroller.clientHeight / rowHeight()) - 1;
      const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
      if (event.key in moves) {
        event.preventDefault();
        choose(state.active + moves[event.key]);
      } else if (event.key === "Enter" && state.order.length) location.href = link(state.order[state.active]);
    });
    search.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") { event.preventDefault(); scroller.focus(); }
    });
    addEventListener("keydown", (event) => {
      if (event.key === "/" && !event.target.closest("input, select, textarea")) { event.preventDefault(); search.select(); search.focus(); }
    });
    let timer;
    search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(refresh, n > 20000 ? 120 : 0); });
    tokenOnly.addEventListener("change", refresh);

    const before = hashValues();
    search.value = before.get("q") ?? "";
    tokenOnly.checked = before.get("token") === "1";
    const sort = before.get("sort") ?? "atom";
    state.down = sort.startsWith("-");
    if (columns.some(({ key }) => key === sort.replace("-", ""))) state.sort = sort.replace("-", "");
    refresh();
  }

  // The page of an atom

  const panel = (title, note, ...inside) => h("section", { class: "panel" }, h("h2", {}, title), note ? h("p", {}, note) : null, ...inside);

  function contexts(entries) {
    return h("ol", { class: "contexts" }, entries.map(([before, token, after, value]) =>
      h("li", {}, h("span", { class: `value ${value < 0 ? "neg" : "pos"}` }, signed(value)), quote([before, token, after]))));
  }

  function histogram(counts, edges) {
    const width = 480, height = 130, base = 108, most = Math.max(1, ...counts), step = width / counts.length;
    const name = (edge) => (edge === null ? "" : number(edge).replace("-", "−"));
    const picture = s("svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Histogram of the atom's coefficients" });
    counts.forEach((count, i) => {
      const tall = (base - 14) * count / most;
      const bar = s("rect", { x: i * step + 1, y: base - tall, width: step - 2, height: tall, class: i < counts.length / 2 ? "bar-neg" : "bar-pos" });
      const low = edges[i] === null ? "−∞" : name(edges[i]), high = edges[i + 1] === null ? "∞" : name(edges[i + 1]);
      bar.append(s("title", {}, `${whole(count)} from ${low} to ${high}`));
      picture.append(bar);
      if (count) picture.append(s("text", { x: (i + 0.5) * step, y: base - tall - 3, "text-anchor": "middle" }, whole(count)));
    });
    picture.append(s("line", { x1: 0, x2: width, y1: base, y2: base }));
    edges.forEach((edge, i) => { if (edge !== null && i % 2 === 0) picture.append(s("text", { x: i * step, y: base + 13, "text-anchor": "middle" }, name(edge))); });
    return picture;
  }

  function pairs(table, headings, rows) {
    return h("table", { class: "pairs" },
      h("thead", {}, h("tr", {}, headings.map((heading, i) => h("th", { class: i ? "n" : null, scope: "col" }, heading)))),
      h("tbody", {}, rows.map(([atom, ...figures]) => h("tr", {},
        h("td", { class: "name" }, h("a", { href: link(atom), title: `atom ${atom}` }, quote(labelOf(table, atom), 16))),
        figures.map((figure) => h("td", { class: "n" }, figure))))));
  }

  const chips = (entries) => h("ul", { class: "chips" }, entries.map(([token, change]) =>
    h("li", { title: `change of its logit: ${signed(change)}` }, h("bdi", {}, token))));

  async function atomPage() {
    const [about, table] = await Promise.all([need("about"), need("table")]);
    const place = document.getElementById("atom"), n = table.token.length;
    const go = (atom) => { location.hash = `atom=${atom}`; };
    let shown = 0;

    async function draw() {
      const asked = hashValues().get("atom") ?? "0", atom = Number(asked);
      if (!/^\d+$/.test(asked) || atom >= n) {
        place.replaceChildren(h("h1", {}, "No such atom"), h("p", {}, `Atoms of this dictionary have the numbers 0 to ${whole(n - 1)}. `, h("a", { href: "index.html" }, "All atoms")));
        return;
      }
      const turn = ++shown;
      const shard = await need(`atoms-${Math.floor(atom / about.shard)}`);
      if (turn !== shown) return;  // the reader has gone on meanwhile
      const facts = shard[atom % about.shard];
      document.title = `Atom ${atom} ${table.token[atom]} · ${about.name}`;
      place.replaceChildren(...page(facts));
      scrollTo(0, 0);
    }

    function page(facts) {
      const { atom, label } = facts;
      const input = h("input", { type: "number", min: 0, max: n - 1, value: atom, id: "goto", "aria-label": "Number of an atom" });
      const steps = h("div", { class: "step" },
        h("a", { href: "index.html" }, "← all atoms"),
        atom > 0 ? h("a", { href: `#atom=${atom - 1}`, rel: "prev" }, "previous") : null,
        atom < n - 1 ? h("a", { href: `#atom=${atom + 1}`, rel: "next" }, "next") : null,
        h("form", { class: "push", onsubmit: (event) => { event.preventDefault(); go(input.value); } }, h("label", { for: "goto" }, "atom"), input));
      const tile = (name, value, note) => h("div", {}, h("dt", {}, name), h("dd", {}, value), h("p", {}, note));
      const tiles = h("dl", { class: "tiles" },
        tile("fires at", percent(facts.density), `${whole(facts.tokens)} of ${whole(about.tokens)} tokens`),
        tile("size", number(facts.mean_size), `mean; ${number(facts.max_size)} at most`),
        tile("negative", percent(facts.negative), "of its coefficients: there the code says NOT"),
        tile("energy", percent(facts.energy), "of all codes' squared coefficients"),
        facts.score ? tile("label F1", facts.score[2].toFixed(2), `precision ${percent(facts.score[0])}, recall ${percent(facts.score[1])}; ${facts.shuffled ? facts.shuffled[2].toFixed(3) : "–"} for another atom's label`) : null);
      const title = label ? quote(label.quote) : quote(labelOf(table, atom));
      const minus = label && label.cosine < 0 ? [h("span", { class: "not" }, "NOT"), " "] : [];
      const origin = label
        ? `Atom ${atom} came from ${label.place} of what the dictionary was built from. Its cosine to that activation is ${label.cosine.toFixed(3)}.`
        : `Atom ${atom} has no label. The quotation is where it fires most.`;
      const inside = [];
      if (!facts.tokens) inside.push(panel("It did not fire", null, h("p", {}, "No token of the text that was read has this atom in its code.")));
      if (facts.top.length) inside.push(panel("Where it fires most", "Largest positive coefficients.", contexts(facts.top)));
      if (facts.bottom.length) inside.push(panel(h("span", {}, h("span", { class: "not" }, "NOT"), " Where it is most negative"), "There the model's activation points away from the atom.", contexts(facts.bottom)));
      if (facts.tokens) inside.push(panel("Coefficients", "How many of its coefficients are in each range; ranges double outwards.", histogram(facts.histogram, about.edges)));
      if (facts.promoted.length) inside.push(panel("Next tokens", "Along the direct path to the logits; later layers are left out.", h("h3", {}, "made more likely"), chips(facts.promoted), h("h3", {}, "made less likely"), chips(facts.suppressed)));
      if (facts.firing_with.length) inside.push(panel("Fires together with", null, pairs(table, ["atom", "share", "× chance"], facts.firing_with.map(([other, share, lift]) => [other, percent(share), number(lift)]))));
      if (facts.nearest.length) inside.push(panel("Nearest directions", null, pairs(table, ["atom", "cosine"], facts.nearest.map(([other, cosine]) => [other, cosine.toFixed(2).replace("-", "−")]))));
      if (facts.quantiles.length) {
        const range = panel("Across its range", "Firings drawn at random, from the lowest coefficients to the highest.",
          h("div", { class: "grid" }, facts.quantiles.map((group, i) => h("div", {}, h("h3", {}, `part ${i + 1} of ${facts.quantiles.length}`), contexts(group)))));
        range.classList.add("wide");
        inside.push(range);
      }
      return [steps, h("h1", {}, ...minus, title), h("p", { class: "lead" }, origin), tiles, h("div", { class: "grid" }, inside)];
    }

    addEventListener("hashchange", draw);
    addEventListener("keydown", (event) => {
      if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
      const atom = Number(hashValues().get("atom") ?? 0);
      if (event.key === "ArrowLeft" && atom > 0) go(atom - 1);
      if (event.key === "ArrowRight" && atom < n - 1) go(atom + 1);
    });
    await draw();
  }

  // The page of decomposed texts

  async function textsPage() {
    const [table, texts] = await Promise.all([need("table"), need("texts")]);
    const [select, warning, tokens, chosen, legend] = ["text", "warning", "tokens", "token", "legend"].map((id) => document.getElementById(id));
    texts.forEach((text, i) => select.append(h("option", { value: i }, text.text.length > 90 ? `${text.text.slice(0, 90)}…` : text.text)));
    let current = texts[0];

    function odd(token) {  // 0 for an ordinary token, 1 for one that the dictionary hardly explains
      return token.unusual === null ? Math.min(1, Math.max(0, 1 - token.explained)) : Math.max(0, (token.unusual - 0.8) / 0.2);
    }

    function drawText() {
      current = texts[select.value];
      const known = current.tokens.some((token) => token.unusual !== null);
      warning.replaceChildren(...(current.warning ? [h("p", { class: "note warn" }, current.warning)] : []));
      legend.replaceChildren(h("span", { class: "swatch", "aria-hidden": "true" }), known ? " Red: explained worse than most of the dictionary's own text." : " Red: little of the activation is explained.");
      tokens.replaceChildren(...current.tokens.flatMap((token, i) => {
        const button = h("button", { type: "button", role: "option", "aria-selected": "false", tabindex: "-1", "data-token": i, style: { "--odd": odd(token).toFixed(2) },
          title: `${percent(token.explained)} explained`, onclick: () => choose(i) }, h("bdi", {}, token.token));
        return token.breaks ? [button, h("br")] : [button];
      }));
      choose(Math.min(Number(hashValues().get("token") ?? 0) || 0, current.tokens.length - 1), false);
    }

    function choose(i, focus = true) {
      const buttons = [...tokens.querySelectorAll("button")];
      buttons.forEach((button, j) => { button.setAttribute("aria-selected", String(i === j)); button.tabIndex = i === j ? 0 : -1; });
      if (focus) buttons[i].focus();
      setHash({ text: select.value, token: i });
      const token = current.tokens[i];
      const unusual = token.unusual === null ? "" : token.unusual > 0.95
        ? ` That is less than for ${Math.floor(100 * token.unusual)}% of the dictionary's own text: its atoms say little here.`
        : ` That is an ordinary amount: codes explain more of ${Math.round(100 * token.unusual)}% of the dictionary's own text.`;
      const explained = `${percent(Math.max(0, token.explained))} of the activation is explained by these atoms, ${percent(Math.min(1, 1 - token.explained))} is not.${unusual}`;
      const largest = Math.max(...token.atoms.map(([, , share]) => Math.abs(share)), 1e-9);
      chosen.replaceChildren(
        h("h2", {}, h("span", { class: "quote" }, h("mark", {}, h("bdi", {}, token.token))), h("small", {}, ` token ${i + 1} of ${current.tokens.length}`)),
        h("p", {}, explained),
        h("div", { class: "line head", "aria-hidden": "true" }, h("span", { class: "quote" }, "came from"), h("span", {}, "atom"), h("span", {}, "coefficient"), h("span", {}, "share")),
        h("ol", { class: "parts" }, token.atoms.map(([atom, coefficient, share]) => h("li", {},
          h("div", { class: "line" },
            coefficient < 0 ? h("span", { class: "not", title: "The activation points away from this atom" }, "NOT") : null,
            quote(labelOf(table, atom)), h("a", { class: "value", href: link(atom), "aria-label": `atom ${atom}` }, String(atom)),
            h("span", { class: `value size ${coefficient < 0 ? "neg" : "pos"}`, title: "coefficient" }, signed(coefficient)),
            h("span", { class: "value share", title: "Share of what is explained; one below 0 takes away from the others" }, share < 0 ? `−${percent(-share)}` : percent(share))),
          h("div", { class: `meter${coefficient < 0 ? " minus" : ""}`, "aria-hidden": "true" }, h("i", { style: { width: `${Math.max(0, 100 * share / largest)}%` } }))))),
        token.more ? h("p", {}, `and ${token.more} more, smaller atoms`) : "");
    }

    tokens.addEventListener("keydown", (event) => {
      const i = Number(event.target.closest("button")?.dataset.token ?? 0), last = current.tokens.length - 1;
      const moves = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: last };
      if (!(event.key in moves)) return;
      event.preventDefault();
      choose(Math.max(0, Math.min(last, moves[event.key])));
    });
    select.addEventListener("change", () => { setHash({ text: select.value, token: 0 }); drawText(); });
    const before = Number(hashValues().get("text") ?? 0);
    select.value = before >= 0 && before < texts.length ? before : 0;
    drawText();
  }

  // The page of comparisons

  async function comparePage() {
    const comparisons = await need("comparisons");
    document.getElementById("comparisons").replaceChildren(...comparisons.map((one) => one.kind === "differences" ? differences(one) : similarities(one)));
  }

  function similarities({ name, measure, matrices }) {
    const heat = ({ title, rows, columns, values }) => [h("h3", {}, title), h("div", { class: "scroller free" }, h("table", { class: "heat" },
      h("thead", {}, h("tr", {}, h("td"), columns.map((column) => h("th", { scope: "col" }, h("bdi", {}, column))))),
      h("tbody", {}, rows.map((row, i) => h("tr", {}, h("th", { scope: "row" }, h("bdi", {}, row)),
        values[i].map((value) => h("td", { style: { "--v": Math.min(1, Math.max(0, value)) } }, value.toFixed(3))))))))];
    return panel(name, `Similarity by ${measure}; 1 is alike.`, ...matrices.flatMap(heat));
  }

  function differences({ name, rows, of }) {
    const place = { both: "both", one: "the second only", null: "–" };
    return panel(name, `Atoms of the second model that are most foreign to the first: ${whole(rows.length)} of ${whole(of)}.`, h("div", { class: "scroller free" }, h("table", {},
      h("thead", {}, h("tr", {}, ["atom", "excess", "q", "tokens"].map((heading) => h("th", { class: "n", scope: "col" }, heading)), ["label in", "came from", "most foreign at"].map((heading) => h("th", { scope: "col" }, heading)))),
      h("tbody", {}, rows.map((row) => h("tr", {},
        h("td", { class: "n" }, String(row.atom)), h("td", { class: `n ${row.excess < 0 ? "" : "neg"}` }, signed(row.excess)), h("td", { class: "n" }, row.q.toFixed(2)), h("td", { class: "n" }, whole(row.tokens)),
        h("td", {}, place[row.shared === null ? "null" : row.shared ? "both" : "one"]),
        h("td", {}, row.label ? quote(row.label, 20) : "–"), h("td", {}, row.example ? quote(row.example, 20) : "–")))))));
  }

  // Light and dark

  function theme() {
    const root = document.documentElement;
    const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.getElementById("theme").addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      try { localStorage.setItem("itda-theme", root.dataset.theme); } catch { /* not kept, then */ }
    });
  }

  try { const kept = localStorage.getItem("itda-theme"); if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept; } catch { /* the system's, then */ }

  document.addEventListener("DOMContentLoaded", () => {
    theme();
    const pages = { index: indexPage, atom: atomPage, texts: textsPage, compare: comparePage };
    pages[document.body.dataset.page]?.().catch((error) => {
      document.getElementById("main").prepend(h("p", { class: "note warn", role: "alert" }, `This page cannot be drawn: ${error.message}`));
    });
  });

  return { receive };
})();
