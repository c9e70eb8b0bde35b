// What tests/test_site.py asks of a page in the browser.
window.probe = {
  // the words of the text, without code and formulas
  text() {
    const main = document.querySelector("main").cloneNode(true);
    main.querySelectorAll("pre, code, .katex, script, style").forEach((e) => e.remove());
    return main.textContent;
  },

  // the words of headings, contents and captions
  heads() {
    return [...document.querySelectorAll("h1, h2, h3, h4, #TOC, .toc-narrow, figcaption")].map((e) => {
      const copy = e.cloneNode(true);
      copy.querySelectorAll(".katex, code").forEach((k) => k.remove());
      return copy.textContent;
    }).join("\n");
  },

  // blocks of code that scroll, folded ones opened
  scrolling() {
    document.querySelectorAll("details").forEach((d) => { d.open = true; });
    const wide = (e) => e.scrollWidth > e.clientWidth + 1;
    return [...document.querySelectorAll("main pre:not(.columns pre)")].filter(wide).map((e) => e.textContent.slice(0, 80));
  },

  // tables that are cut: beyond the window, and in no box that scrolls
  cut() {
    const lost = (table) => {
      const box = table.closest(".sd-table, .cell-output-display") || table;
      const inner = box !== table && box.scrollWidth > box.clientWidth + 1;
      return box.getBoundingClientRect().right > innerWidth + 1 || (inner && !/auto|scroll/.test(getComputedStyle(box).overflowX));
    };
    const shown = [...document.querySelectorAll("main table")].filter((t) => t.checkVisibility());
    return shown.filter(lost).map((t) => t.textContent.slice(0, 60));
  },

  // every text that is seen, in the colours in which it is seen: [contrast as WCAG 2 has it, text, where]
  contrast() {
    const rgba = (c) => { const m = c.match(/[\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
    const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const light = (c) => { const [r, g, b] = c.map((v) => linear(v / 255)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const up = function* (e) { for (; e; e = e.parentElement) yield getComputedStyle(e); };
    const ground = (e) => [...up(e)].map((s) => rgba(s.backgroundColor)).reverse().reduce((b, layer) => over(layer, b), [255, 255, 255, 1]);
    const opacity = (e) => [...up(e)].reduce((o, s) => o * s.opacity, 1);
    const seen = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const e = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
      if (!text || !e.checkVisibility() || !e.getClientRects().length || e.closest(".katex, svg, script, style, .skip-link")) continue;
      const back = ground(e), colour = rgba(getComputedStyle(e).color);
      const front = over([...colour.slice(0, 3), colour[3] * opacity(e)], back);
      const [bright, dim] = [light(front), light(back)].sort((x, y) => y - x);
      seen.push([(bright + 0.05) / (dim + 0.05), text.slice(0, 40), `${e.tagName}.${e.className}`]);
    }
    return seen;
  },
};
