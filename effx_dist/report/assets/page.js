"use strict";
// Draws the charts of the page from the JSON in script#effx-data. Text from the records only ever goes into the
// page as text (textContent, fillText), never as markup.
(() => {
  const data = JSON.parse(document.getElementById("effx-data").textContent);
  const root = document.getElementById("charts");
  const INFOBATCH = "effx/infobatch/", CHECKPOINT = "effx/checkpoint/", ALIGNMENT = "effx/cautious/alignment";
  const HANDLED = new Set(["train/loss", "eval/loss", "epoch"]);
  let xAxis = "step", stretch = "whole run";
  let live = []; // what the present drawing holds on to

  window.addEventListener("error", (event) => fail(event.message));

  function fail(message) {
    const line = element("p", "", `The charts could not be drawn: ${message}`);
    line.id = "js-error";
    root.before(line);
  }

  // ---- the page's parts ----

  function element(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function section(title, hint) {
    const node = root.appendChild(element("section"));
    const heading = node.appendChild(element("div", "heading"));
    heading.append(element("h2", "", title), element("p", "", hint ?? ""));
    return { heading, grid: node.appendChild(element("div", "grid")) };
  }

  function panel(grid, title, size, hint) {
    const node = grid.appendChild(element("div", `chart ${size ?? ""}`));
    if (hint) node.append(element("span", "hint", hint));
    const host = element("div", "plot");
    host.dataset.chart = title;
    node.append(element("h3", "", title), host);
    return host;
  }

  // choices: value -> label; redraws the page with the one that is picked
  function toggle(bar, choices, present, pick) {
    const node = bar.appendChild(element("div", "toggle"));
    for (const [value, label] of Object.entries(choices)) {
      const button = node.appendChild(element("button", "", label));
      button.setAttribute("aria-pressed", String(value === present));
      button.addEventListener("click", () => { pick(value); draw(); });
    }
  }

  // ---- numbers ----

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const finite = (value) => (typeof value === "number" ? value : null); // "NaN" and "Infinity" are strings
  const significant = (value) => (value == null ? "–" : String(Number(value.toPrecision(5))));
  const compact = (value) =>
    Math.abs(value) >= 1e4
      ? new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 3 }).format(value)
      : Math.abs(value) > 0 && Math.abs(value) < 1e-3 ? value.toExponential() : String(Number(value.toPrecision(6)));
  const percent = (value) => `${Number((100 * value).toPrecision(4))} %`;
  const times = (value) => `${Number(value.toPrecision(4))}x`;
  const seconds = (value) => (Math.abs(value) < 1 ? `${Number((1e3 * value).toPrecision(3))} ms` : `${Number(value.toPrecision(4))} s`);

  function bytes(value) {
    const units = ["B", "kB", "MB", "GB", "TB", "PB"];
    while (Math.abs(value) >= 1000 && units.length > 1) { value /= 1000; units.shift(); }
    return `${Number(value.toPrecision(3))} ${units[0]}`;
  }

  // The mean over a window centred on each point (no lag), narrower towards the two ends.
  function runningMean(values, window) {
    const sums = [0], counts = [0];
    values.forEach((value, i) => { sums.push(sums[i] + (value ?? 0)); counts.push(counts[i] + (value != null)); });
    return values.map((value, i) => {
      const half = Math.min(i, values.length - 1 - i, (window - 1) / 2);
      const count = counts[i + half + 1] - counts[i - half];
      return value == null || !count ? null : (sums[i + half + 1] - sums[i - half]) / count;
    });
  }

  // A series against the chosen axis; on the samples axis only what has a place there.
  function points(series) {
    if (!series) return null;
    const rows = series[xAxis].map((x, i) => [finite(x), finite(series.value[i])]).filter(([x]) => x != null);
    return rows.some(([, y]) => y != null) ? [rows.map(([x]) => x), rows.map(([, y]) => y)] : null;
  }

  // ---- charts ----

  const WHOLE = Array.from({ length: 15 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();

  function axes(formatX, formatY) {
    const common = { stroke: colour("muted"), font: "12px system-ui, 'DejaVu Sans', sans-serif" };
    const grid = { stroke: colour("grid"), width: 1 }, ticks = { show: false };
    const width = (_, labels) => 14 + 7 * Math.max(3, ...(labels ?? []).map((label) => String(label ?? "").length));
    return [
      { ...common, grid: { show: false }, ticks, size: 30, incrs: WHOLE, values: (_, at) => at.map(formatX) },
      { ...common, grid, ticks, size: width, values: (_, at) => at.map((y) => (y == null ? "" : formatY(y))) },
    ];
  }

  function plot(host, options, table) {
    const size = () => ({ width: Math.max(host.clientWidth, 120), height: options.height ?? 200 });
    const chart = new uPlot({
      ...options, ...size(), padding: [12, 24, 0, 0],
      legend: { markers: { width: 0, fill: (self, i) => self.series[i].stroke(self, i) } },
      cursor: { y: false, points: { size: 7 }, drag: { x: true, y: false, setScale: true } },
    }, table, host);
    const observer = new ResizeObserver(() => chart.setSize(size()));
    observer.observe(host);
    live.push(() => { observer.disconnect(); chart.destroy(); });
  }

  // The range of the x axis with some room at both ends; uPlot itself would put a single point at one end.
  function spread(xs, room) {
    return (_, low, high) => (xs.length < 2 ? [(xs[0] ?? 0) - 1, (xs[0] ?? 0) + 1] : [low - room, high + room]);
  }

  // curves: [{label, xy: [xs, ys], colour, raw (thin, behind, not in the legend), stepped}]
  function lines(host, curves, { height, format = significant, formatAxis = compact, range, xLabel, marks } = {}) {
    const series = curves.map((curve) => ({
      label: curve.label, stroke: curve.raw ? colour(curve.colour) + "48" : colour(curve.colour),
      width: curve.raw ? 1 : 2, class: curve.raw ? "raw" : undefined, value: (_, y) => (y == null ? "–" : format(y)),
      paths: curve.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
      points: curve.raw ? { show: false } : curve.xy[0].length <= 60 ? { show: true, size: 5, fill: colour(curve.colour) } : {},
    }));
    const label = xLabel ?? (xAxis === "step" ? "step" : "samples");
    const table = uPlot.join(curves.map((curve) => curve.xy));
    plot(host, {
      height, series: [{ label, value: (_, x) => (x == null ? "–" : x.toLocaleString("en")) }, ...series],
      scales: { x: { time: false, range: spread(table[0], 0) }, y: { range } },
      axes: axes(compact, formatAxis), hooks: { drawClear: [(chart) => drawMarks(chart, marks ?? [])] },
    }, table);
  }

  function drawMarks(chart, marks) {
    const { ctx, bbox } = chart;
    ctx.save();
    ctx.strokeStyle = colour("third");
    ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    for (const x of marks) {
      if (x < chart.scales.x.min || x > chart.scales.x.max) continue;
      const left = Math.round(chart.valToPos(x, "x", true));
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  // columns: [{label, values, colour, line}], one bar (or point of a line) a name
  function bars(host, names, columns, { format, xLabel, height }) {
    const at = names.map((_, i) => i);
    const series = columns.map((column) => ({
      label: column.label, stroke: colour(column.colour), width: column.line ? 2 : 0, value: (_, y) => (y == null ? "–" : format(y)),
      ...(column.line
        ? { points: { show: names.length <= 60, size: 5, fill: colour(column.colour) } }
        : { fill: colour(column.colour), paths: uPlot.paths.bars({ size: [0.66, 56] }), points: { show: false } }),
    }));
    plot(host, {
      height, series: [{ label: xLabel, value: (_, x) => names[x] ?? "–" }, ...series],
      scales: {
        x: { time: false, range: spread(at, 0.6) },
        y: columns.some((column) => !column.line) ? { range: (_, low, high) => [0, high > 0 ? high * 1.12 : 1] } : {},
      },
      axes: axes((x) => names[x] ?? "", format),
    }, [at, ...columns.map((column) => column.values.map(finite))]);
  }

  const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

  function shade(fraction) {
    const place = Math.min(Math.max(fraction, 0), 1) * (VIRIDIS.length - 1), low = Math.min(Math.floor(place), VIRIDIS.length - 2);
    return `rgb(${VIRIDIS[low].map((from, i) => Math.round(from + (VIRIDIS[low + 1][i] - from) * (place - low))).join(",")})`;
  }

  // rows: [{label, cells: Map(step -> value)}]
  function heatmap(host, rows, steps) {
    const values = rows.flatMap((row) => [...row.cells.values()]);
    const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const canvas = host.appendChild(element("canvas", "heatmap")), tip = element("div", "tip");
    const rowHeight = Math.min(Math.max(440 / rows.length, 2), 18), foot = 22;
    const layout = () => {
      const left = Math.min(210, host.clientWidth / 3);
      return { left, cell: (host.clientWidth - left) / steps.length };
    };
    const paint = () => {
      const { left, cell } = layout(), scale = devicePixelRatio, ctx = canvas.getContext("2d");
      canvas.width = host.clientWidth * scale;
      canvas.height = (rows.length * rowHeight + foot) * scale;
      canvas.style.height = `${rows.length * rowHeight + foot}px`;
      ctx.scale(scale, scale);
      rows.forEach((row, y) => steps.forEach((step, x) => {
        if (!row.cells.has(step)) return;
        ctx.fillStyle = shade((row.cells.get(step) - low) / (high - low || 1));
        ctx.fillRect(left + x * cell, y * rowHeight, Math.ceil(cell * scale) / scale, Math.ceil(rowHeight * scale) / scale);
      }));
      ctx.fillStyle = colour("muted");
      ctx.font = "11px system-ui, 'DejaVu Sans', sans-serif";
      ctx.textBaseline = "middle";
      ctx.textAlign = "right";
      const every = Math.ceil(11 / rowHeight);
      rows.forEach((row, y) => y % every || ctx.fillText(shortened(ctx, row.label, left - 8), left - 8, (y + 0.5) * rowHeight));
      ctx.textAlign = "center";
      const ticks = new Set([0, 0.25, 0.5, 0.75, 1].map((part) => Math.round(part * (steps.length - 1))));
      for (const x of ticks) {
        const label = compact(steps[x]), half = ctx.measureText(label).width / 2 + 1;
        const centre = Math.min(Math.max(left + (x + 0.5) * cell, half), host.clientWidth - half);
        ctx.fillText(label, centre, rows.length * rowHeight + 13);
      }
    };
    canvas.addEventListener("mousemove", (event) => {
      const { left, cell } = layout(), row = rows[Math.floor(event.offsetY / rowHeight)];
      const step = steps[Math.floor((event.offsetX - left) / cell)];
      if (!row || step === undefined) return tip.remove();
      tip.textContent = `${row.label}, step ${step}: ${significant(row.cells.get(step))}`;
      tip.style.left = `${Math.min(Math.max(event.offsetX, 120), host.clientWidth - 120)}px`;
      tip.style.top = `${event.offsetY}px`;
      host.append(tip);
    });
    canvas.addEventListener("mouseleave", () => tip.remove());
    const observer = new ResizeObserver(paint);
    observer.observe(host);
    paint();
    live.push(() => observer.disconnect());
    host.after(colourScale(low, high));
  }

  // The end of a parameter's name tells more than its beginning.
  function shortened(ctx, text, width) {
    if (ctx.measureText(text).width <= width) return text;
    let start = 1;
    while (start < text.length && ctx.measureText(`…${text.slice(start)}`).width > width) start++;
    return `…${text.slice(start)}`;
  }

  function colourScale(low, high) {
    const node = element("div", "scale"), canvas = element("canvas");
    canvas.width = 160;
    canvas.height = 1;
    const ctx = canvas.getContext("2d");
    for (let x = 0; x < 160; x++) { ctx.fillStyle = shade(x / 159); ctx.fillRect(x, 0, 1, 1); }
    node.append(element("span", "", low.toFixed(3)), canvas, element("span", "", high.toFixed(3)));
    return node;
  }

  // ---- sections ----

  // The run and the baseline; a long noisy curve is drawn thin behind its running mean.
  function withBaseline(name, colourName) {
    const curves = [];
    for (const [role, at] of [["baseline", "other"], ["run", colourName ?? "run"]]) {
      const series = data[role]?.series[name], xy = points(series);
      if (!xy) continue;
      const fine = (series.mean && points(series.mean)) ?? xy; // a thinned series brings the means of its stretches
      const window = 2 * Math.floor(fine[0].length / 100) + 1;
      const label = role === "run" && !data.baseline ? name.split("/").pop() : role;
      if (window > 1) curves.push({ label, xy, colour: at, raw: true });
      curves.push({ label, xy: window > 1 ? [fine[0], runningMean(fine[1], window)] : xy, colour: at, window, isThinned: fine !== xy });
    }
    return curves;
  }

  // The first steps of a run hide everything after them; the second half alone shows what is between two runs.
  function shown(curves) {
    if (stretch === "whole run") return curves;
    const middle = Math.max(...curves.map(({ xy: [xs] }) => xs.at(-1))) / 2;
    return curves.map((curve) => {
      const start = curve.xy[0].findIndex((x) => x >= middle);
      return { ...curve, xy: start < 0 ? [[], []] : curve.xy.map((column) => column.slice(start)) };
    });
  }

  function smoothingHint(curves) {
    const window = Math.max(...curves.map((curve) => curve.window ?? 1));
    if (curves.some((curve) => curve.isThinned)) return "running mean; lowest and highest records behind";
    return window > 1 ? `mean of ${window} records; single records behind` : "";
  }

  function resumeMarks() {
    const series = data.run.series["train/loss"];
    return data.run.events
      .filter((event) => event.event === "resume" && typeof event.fields.step === "number")
      .map(({ fields: { step } }) => {
        if (xAxis === "step" || !series) return step;
        const at = series.step.findLastIndex((other) => other <= step);
        return series.samples[at] ?? Infinity;
      });
  }

  function drawLoss() {
    const [train, held] = ["train/loss", "eval/loss"].map((name) => shown(withBaseline(name)));
    if (!train.length && !held.length) return;
    const marks = resumeMarks();
    const { heading, grid } = section("Loss", `Drag to zoom, double-click to reset.${marks.length ? " Dashed: resumed." : ""}`);
    const hasSamples = Object.values(data.run.series).some((series) => series.samples.some((x) => x != null));
    const bar = heading.appendChild(element("div", "toggles"));
    toggle(bar, { "whole run": "whole run", "second half": "second half" }, stretch, (value) => { stretch = value; });
    if (hasSamples) {
      toggle(bar, { step: "by step", samples: "by samples processed" }, xAxis, (value) => { xAxis = value; });
    }
    const both = train.length && held.length;
    if (train.length) lines(panel(grid, "Training loss", both ? "" : "wide", smoothingHint(train)), train, { height: 280, marks });
    if (held.length) lines(panel(grid, "Held-out loss", both ? "" : "wide"), held, { height: 280, marks });
  }

  function drawInfoBatch() {
    const epochs = data.run.epochs, saved = points(data.run.series[INFOBATCH + "samples_saved"]);
    const byStep = ["kept_fraction", "threshold"].map((name) => points(data.run.series[INFOBATCH + name]));
    if (!epochs.length && !saved && !byStep.some(Boolean)) return;
    const { grid } = section("Sample pruning (InfoBatch)");
    const names = epochs.map((epoch) => String(epoch.epoch));
    [["Kept fraction", "kept_fraction", "bar", percent], ["Threshold", "threshold", "run", significant]].forEach(([title, key, at, format], i) => {
      const values = epochs.map((epoch) => finite(epoch[key]));
      if (values.some((value) => value != null)) {
        const column = { label: title.toLowerCase(), values, colour: at, line: key === "threshold" };
        bars(panel(grid, `${title} per epoch`, "third"), names, [column], { format, xLabel: "epoch" });
      } else if (byStep[i]) {
        lines(panel(grid, title, "third"), [{ label: title.toLowerCase(), xy: byStep[i], colour: "run", stepped: true }], {
          format, formatAxis: format, range: i === 0 ? [0, 1.05] : undefined,
        });
      }
    });
    if (saved) lines(panel(grid, "Samples saved so far", "third"), [{ label: "saved", xy: saved, colour: "third" }]);
  }

  function drawCautious() {
    const rows = Object.entries(data.run.series)
      .filter(([name]) => name.startsWith(ALIGNMENT + "/"))
      .map(([name, series]) => ({
        label: name.slice(ALIGNMENT.length + 1),
        cells: new Map(series.step.map((step, i) => [step, finite(series.value[i])]).filter(([, value]) => value != null)),
      }))
      .filter((row) => row.cells.size);
    const mean = withBaseline(ALIGNMENT);
    if (!mean.length && !rows.length) return;
    const { grid } = section("Cautious updates", "Share of an update that agrees in sign with its gradient.");
    if (mean.length) lines(panel(grid, "Alignment, mean over parameters", "wide", smoothingHint(mean)), mean);
    if (!rows.length) return;
    const steps = [...new Set(rows.flatMap((row) => [...row.cells.keys()]))].sort((a, b) => a - b);
    heatmap(panel(grid, "Alignment by parameter and step", "wide"), rows, steps);
  }

  function drawCheckpoints() {
    const saves = data.run.saves, names = saves.map((save) => compact(save.step));
    const has = (key) => saves.some((save) => finite(save[key]) != null);
    const column = (key, label, at, line) => ({ label, values: saves.map((save) => save[key]), colour: at, line });
    const wanted = [
      ["Stored bytes per save", [column("stored_bytes", "stored", "bar")], bytes],
      ["Compression ratio", [column("ratio", "this save", "bar"), column("run_ratio", "whole run", "other", true)], times],
      ["Training blocked per save", [column("blocked_s", "blocked", "bar")], seconds],
    ].filter(([, columns]) => columns.some(({ values }) => values.some((value) => finite(value) != null)));
    if (!wanted.length) return;
    const { grid } = section("Checkpoints", has("error") ? "The largest relative error of each stands in the table." : "");
    for (const [title, columns, format] of wanted) {
      bars(panel(grid, title, "third"), names, columns, { format, xLabel: "step" });
    }
  }

  function drawOthers() {
    const isOther = (name) => !HANDLED.has(name) && ![INFOBATCH, CHECKPOINT, ALIGNMENT].some((known) => name.startsWith(known));
    const others = Object.keys(data.run.series).filter(isOther).map((name) => [name, withBaseline(name)]).filter(([, curves]) => curves.length);
    if (!others.length) return;
    const { grid } = section("Other metrics", others.length > 24 ? `24 of ${others.length}.` : "");
    for (const [name, curves] of others.slice(0, 24)) lines(panel(grid, name, "third"), curves, { height: 170 });
  }

  function draw() {
    const scroll = window.scrollY;
    live.splice(0).forEach((release) => release());
    root.replaceChildren();
    [drawLoss, drawInfoBatch, drawCautious, drawCheckpoints, drawOthers].forEach((part) => part());
    window.scrollTo(0, scroll);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
  document.body.dataset.drawn = "yes";
})();
