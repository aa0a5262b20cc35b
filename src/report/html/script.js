"use strict";
// What the page can do beyond showing itself: values under a pointer, filtering, sorting and saving. No libraries, no network.
(() => {
  const byId = (id) => document.getElementById(id);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  all("[data-script]").forEach((element) => { element.hidden = false; });

  // Values: an SVG title waits a second before it shows, and never does under a finger.
  const tip = byId("tip");
  for (const mark of all("svg .mark")) {
    const title = mark.querySelector("title");
    mark.dataset.tip = title.textContent;
    title.remove();
  }
  const show = (event) => {
    const mark = event.target.closest ? event.target.closest("svg .mark") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const left = Math.min(event.clientX + 12, document.documentElement.clientWidth - tip.offsetWidth - 4);
    const above = event.clientY - tip.offsetHeight - 12;
    tip.style.left = `${Math.max(left, 4)}px`;
    tip.style.top = `${above > 0 ? above : event.clientY + 16}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // The table of all rows, where there is one.
  const table = document.querySelector("table.overview");
  const rows = table ? all("tbody tr", table) : [];
  const filter = byId("filter");
  const chips = all(".chips input");

  // A case is written out once, in the first of its rows that stand together.
  const mend = () => {
    let before = null;
    for (const row of all("tbody tr", table).filter((row) => !row.hidden)) {
      row.classList.toggle("again", row.dataset.case === before);
      before = row.dataset.case;
    }
  };
  const sift = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const precisions = new Set(chips.filter((chip) => chip.checked).map((chip) => chip.value));
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !precisions.has(row.dataset.precision) || !words.every((word) => text.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden);
    const cases = new Set(shown.map((row) => row.dataset.case));
    all("article").forEach((article) => { article.hidden = !cases.has(article.id.replace("case-", "")); });
    byId("shown").textContent = `${shown.length} of ${rows.length} rows`;
    mend();
    lead(shown.filter((row) => row.dataset.dot).map((row) => Number(row.dataset.dot)));
  };
  // The chart of all cases: the dots of the rows that are shown, and the line of those that nothing beats at both.
  const marks = all("figure.all .mark");
  const lead = (dots) => {
    const place = (at) => {
      const circle = marks[at].querySelector("circle");
      return { at, x: Number(circle.getAttribute("cx")), y: Number(circle.getAttribute("cy")) };
    };
    const best = [];
    // Up is less, in an SVG.
    for (const dot of dots.map(place).sort((a, b) => a.x - b.x || a.y - b.y)) {
      if (!best.length || dot.y < best[best.length - 1].y) best.push(dot);
    }
    const onLine = new Set(best.map((dot) => dot.at));
    marks.forEach((mark, at) => {
      mark.toggleAttribute("hidden", !dots.includes(at));
      all("text", mark).forEach((name) => name.toggleAttribute("hidden", !onLine.has(at)));
    });
    all(".front tbody tr").forEach((row, at) => { row.hidden = !onLine.has(at); });
    const steps = best.flatMap((dot, at) => (at ? [`${dot.x},${best[at - 1].y}`] : []).concat(`${dot.x},${dot.y}`));
    all("figure.all polyline[stroke-dasharray]").forEach((line) => line.setAttribute("points", steps.join(" ")));
  };
  const sort = (button) => {
    const head = button.closest("th");
    const first = button.dataset.first || "ascending";
    const second = first === "ascending" ? "descending" : "ascending";
    // The third click gives the order of the file back.
    const order = { [first]: second, [second]: null }[head.getAttribute("aria-sort")];
    const wanted = order === undefined ? first : order;
    all("th[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
    if (wanted) head.setAttribute("aria-sort", wanted);
    const value = (row) => {
      const cell = all("[data-k]", row).find((cell) => cell.dataset.k === button.dataset.sort);
      if (!cell) return null;
      if ("v" in cell.dataset) return Number(cell.dataset.v);
      return cell.tagName === "TD" && !cell.classList.contains("name") ? null : cell.textContent;
    };
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      // What has no value comes last either way.
      if (x === null || y === null) return (x === null) - (y === null);
      const sign = wanted === "ascending" ? 1 : -1;
      return sign * (typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true }));
    };
    table.tBodies[0].append(...(wanted ? [...rows].sort(compare) : rows));
    mend();
  };
  if (table) {
    filter.addEventListener("input", sift);
    chips.forEach((chip) => chip.addEventListener("change", sift));
    all("th button", table).forEach((button) => button.addEventListener("click", () => sort(button)));
    // A link into a case that the filter hides shows it again.
    const reveal = () => {
      const target = location.hash && byId(location.hash.slice(1));
      const article = target && target.closest("article");
      if (!article || !article.hidden) return;
      filter.value = "";
      chips.forEach((chip) => { chip.checked = true; });
      sift();
      target.scrollIntoView();
    };
    addEventListener("hashchange", reveal);
    // A reload may keep what was typed.
    sift();
  }

  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  // As RFC 4180 has it; a head has its unit behind it.
  const csv = (table) => {
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const cell = (cell) => [...cell.childNodes].map((node) => node.textContent.trim()).filter(Boolean).join(", ");
    const shown = all("tr", table).filter((row) => !row.hidden);
    return shown.map((row) => [...row.cells].map((one) => quoted(cell(one))).join(",") + "\n").join("");
  };
  byId("save-json").addEventListener("click", () => save("quantbench.json", "application/json", byId("data").textContent));
  byId("save-csv").addEventListener("click", () => save("quantbench.csv", "text/csv", csv(document.querySelector("table"))));
})();
