// What tools/site.py adds to smalldocs' pages: a search that takes questions, and small things.
(() => {
  "use strict";
  const root = (document.querySelector('meta[name="smalldocs:offset"]') || { content: "./" }).content;

  // ---- words
  const STOP = new Set(("a an and are as at be but by can could do does for from get had has have how i if in into is it its "
    + "of on or please shall should so some than that the their them then there these they this to use used using want was we "
    + "what when where which while who why will with would you").split(" "));
  // words that help to rank, and find nothing by themselves
  const SOFT = new Set(["own", "not", "no", "all", "one", "make", "made", "run"]);
  const OWN = new Set(["my", "your", "our"]);
  const stem = (w) => {
    if (OWN.has(w)) return "own";
    if (w.includes("_") || w.length < 4) return w;
    w = w.replace(/ies$/, "y").replace(/([^su])s$/, "$1");
    if (w.length > 5) w = w.replace(/(ing|ed)$/, "");
    return w.length > 4 ? w.replace(/e$/, "") : w;
  };
  const words = (text) => {
    const found = [];
    for (const raw of text.match(/[\p{L}\p{N}_]+/gu) || []) {
      const w = raw.toLowerCase();
      found.push(stem(w));
      if (w.includes("_")) w.split("_").filter(Boolean).forEach((p) => found.push(stem(p)));
      else if (/[a-z][A-Z]/.test(raw)) raw.split(/(?<=[a-z])(?=[A-Z])/).forEach((p) => found.push(stem(p.toLowerCase())));
    }
    return found;
  };

  // ---- the index: word -> {entry: weight}; titles weigh more than text, text more than code
  let index = null;
  const build = (entries) => {
    const terms = new Map();
    entries.forEach((entry, i) => {
      const own = new Map();
      const add = (text, weight, most) => {
        const part = new Map();
        words(text).forEach((w) => part.set(w, Math.min(most, (part.get(w) || 0) + weight)));
        part.forEach((v, w) => own.set(w, (own.get(w) || 0) + v));
      };
      const [, page, section, text, code] = entry;
      // a title of one word is about that word, one of six only partly
      const title = words(section || page).filter((w) => !STOP.has(w) && !SOFT.has(w));
      const share = 8 / Math.sqrt(Math.max(1, title.length));
      add(section || page, share, share);
      if (section) add(page, 1.5, 1.5);
      add(text, 1, 3);
      add(code, 0.3, 0.6);
      own.forEach((v, w) => { if (!terms.has(w)) terms.set(w, new Map()); terms.get(w).set(i, v); });
    });
    return { entries, terms };
  };
  let loading = null;
  const load = () => loading || (loading = new Promise((done) => {
    const script = document.createElement("script");
    script.src = root + "search-index.js";
    script.onload = () => { index = build(window.siteSearchIndex); done(); };
    script.onerror = () => { loading = null; done(); };
    document.head.appendChild(script);
  }));

  // ---- words that are nearly the word: only where nothing else is found
  const distance = (a, b, most) => {
    if (Math.abs(a.length - b.length) > most) return most + 1;
    let before = null, last = Array.from({ length: b.length + 1 }, (_, j) => j);
    for (let i = 1; i <= a.length; i++) {
      const row = [i];
      for (let j = 1; j <= b.length; j++) {
        row[j] = Math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] !== b[j - 1]));
        if (before && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j], before[j - 2] + 1);
      }
      before = last; last = row;
    }
    return last[b.length];
  };
  const near = (w) => {
    const most = w.length < 4 ? 0 : w.length < 7 ? 1 : 2;
    let best = most + 1, found = [];
    for (const term of index.terms.keys()) {
      const d = distance(w, term, most);
      if (d < best) { best = d; found = [term]; } else if (d === best && d <= most) found.push(term);
    }
    return found;
  };

  const search = (query, limit = 20) => {
    const raw = (query.match(/[\p{L}\p{N}_]+/gu) || []).map((w) => w.toLowerCase());
    const soft = new Set(raw.map(stem).filter((w) => SOFT.has(w)));
    let hard = raw.filter((w) => !STOP.has(w) && !SOFT.has(stem(w)));
    if (!hard.length) hard = raw;
    const { entries, terms } = index, n = entries.length;
    const matches = (w, last) => {
      const found = [];
      if (terms.has(stem(w))) found.push([stem(w), 1]);
      // the last word may not be typed to its end
      if (last && w.length > 1) for (const t of terms.keys()) if (t !== stem(w) && t.startsWith(w)) found.push([t, 0.4]);
      return found;
    };
    let lists = hard.map((w, k) => matches(w, k === hard.length - 1));
    if (lists.every((l) => !l.length)) lists = hard.map((w) => near(stem(w)).map((t) => [t, 0.5]));
    const scores = new Map();
    lists.forEach((list) => {
      const here = new Map();
      list.forEach(([t, share]) => {
        // the beginning of a rare word is no rarer than the word that was typed
        const places = terms.get(t), rare = Math.log(1 + n / Math.max(places.size, terms.get(list[0][0]).size));
        places.forEach((v, i) => here.set(i, Math.max(here.get(i) || 0, share * rare * v / (v + 2))));
      });
      here.forEach((v, i) => { const s = scores.get(i) || [0, 0]; scores.set(i, [s[0] + v, s[1] + 1]); });
    });
    const phrase = hard.join(" ");
    const joined = (s) => s.toLowerCase().replaceAll("_", " ");
    const ranked = [...scores].map(([i, [sum, count]]) => {
      const [href, page, section, text] = entries[i];
      let score = sum * (count / hard.length) ** 2;
      const name = (section || page).toLowerCase();
      if (name === raw.join(" ")) score *= 2;
      else if (hard.length > 1) {
        // the words side by side, also within a name: batch_size
        score *= (joined(name).includes(phrase) ? 1.5 : 1) * (1 + 0.1 * Math.min(8, joined(text).split(phrase).length - 1));
      }
      const titled = new Set(words(name));
      score *= 1 + 0.25 * [...soft].filter((w) => titled.has(w)).length;
      // where a user starts, and where all options stand
      if (/^(index|first_hour)\.html|config\.html#TrainConfig/.test(href)) score *= 1.25;
      return [score, i];
    });
    ranked.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    return ranked.slice(0, limit).map(([, i]) => entries[i]);
  };
  window.siteSearch = async (query, limit) => { await load(); return index ? search(query, limit) : []; };

  // ---- the list
  const escape = (s) => s.replace(/[&<>"']/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" }[c]));
  const marked = (text, query) => {
    const wanted = new Set((query.match(/[\p{L}\p{N}_]+/gu) || []).map((w) => w.toLowerCase()).filter((w) => !STOP.has(w)).map(stem));
    const hit = (w) => { const s = stem(w.toLowerCase()); return wanted.has(s) || [...wanted].some((q) => q.length > 3 && s.startsWith(q)); };
    const at = [...text.matchAll(/[\p{L}\p{N}_]+/gu)].find((m) => hit(m[0]));
    const start = Math.max(0, (at ? at.index : 0) - 60);
    const part = text.slice(start, start + 200);
    return (start ? "…" : "") + part.split(/([\p{L}\p{N}_]+)/u).map((p) => (hit(p) ? `<mark>${escape(p)}</mark>` : escape(p))).join("");
  };
  const result = ([href, page, section, text, code], k, query) => `<a class="search-result" role="option" id="search-${k}" href="${root}${href}">`
    + `<div class="search-result-title">${escape(section || page)}</div>`
    + (section ? `<div class="search-result-section">${escape(page)}</div>` : "")
    + `<div class="search-result-text">${marked(text || code, query)}</div></a>`;
  document.querySelectorAll(".site-search").forEach((box) => {
    const input = box.querySelector("input"), list = box.querySelector(".site-search-results");
    let active = -1, timer = null;
    const show = (open) => { list.classList.toggle("show", open); input.setAttribute("aria-expanded", String(open)); };
    const run = async () => {
      const query = input.value.trim();
      active = -1;
      input.removeAttribute("aria-activedescendant");
      if (query.length < 2) { show(false); return; }
      const found = await window.siteSearch(query);
      if (query !== input.value.trim()) return;  // typed on meanwhile
      // the bar is dark in both modes, the list is not
      list.dataset.bsTheme = document.documentElement.classList.contains("quarto-dark") ? "dark" : "light";
      list.innerHTML = found.length ? found.map((e, k) => result(e, k, query)).join("") : '<div class="search-none">Nothing found</div>';
      show(true);
    };
    input.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(run, 100); });
    input.addEventListener("focus", () => { load(); if (input.value.trim().length > 1) run(); });
    input.addEventListener("keydown", (event) => {
      const items = [...list.querySelectorAll(".search-result")];
      if (event.key === "Escape") { show(false); input.blur(); return; }
      if (!items.length) return;
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        event.preventDefault();
        const step = event.key === "ArrowDown" ? 1 : -1;
        active = active < 0 ? (step > 0 ? 0 : items.length - 1) : (active + step + items.length) % items.length;
        items.forEach((item, k) => { item.classList.toggle("active", k === active); item.setAttribute("aria-selected", String(k === active)); });
        input.setAttribute("aria-activedescendant", items[active].id);
        items[active].scrollIntoView({ block: "nearest" });
      } else if (event.key === "Enter") {
        event.preventDefault();
        (items[active] || items[0]).click();
      }
    });
    document.addEventListener("click", (event) => { if (!box.contains(event.target)) show(false); });
    document.addEventListener("keydown", (event) => {
      const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
      const asked = (event.key === "/" && !typing) || ((event.metaKey || event.ctrlKey) && event.key === "k");
      if (asked) { event.preventDefault(); input.focus(); }
    });
  });

  // ---- the sidebar on a narrow screen opens where the page stands in it, and closes with Escape
  const sidebar = document.getElementById("quarto-sidebar"), glass = document.getElementById("quarto-sidebar-glass");
  document.querySelectorAll(".quarto-btn-toggle").forEach((button) => {
    const told = () => button.setAttribute("aria-expanded", String(!!sidebar && sidebar.classList.contains("show")));
    told();
    button.addEventListener("click", () => { told(); if (sidebar) { sidebar.scrollLeft = 0; sidebar.scrollTop = 0; } });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && sidebar && sidebar.classList.contains("show")) {
        [sidebar, glass].forEach((part) => part && part.classList.remove("show"));
        told();
        button.focus();
      }
    });
  });
  // on a wide screen the page's own line is in sight
  const here = sidebar && sidebar.querySelector("[aria-current=page]");
  if (here && window.innerWidth > 991) {
    const below = here.getBoundingClientRect().bottom - sidebar.getBoundingClientRect().bottom;
    if (below > -40) sidebar.scrollTop += below + 120;
  }
  // a place of the contents was chosen: the page is wanted, not the list
  document.querySelectorAll(".toc-narrow a").forEach((a) => a.addEventListener("click", () => { a.closest("details").open = false; }));
})();
