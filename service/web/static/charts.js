// Four charts from /api/v1/charts; the numbers are the API's.
"use strict";
addEventListener("DOMContentLoaded", async () => {
  const box = document.getElementById("charts");
  const { points } = await (await fetch(box.dataset.source)).json();
  if (!points.length) {
    box.hidden = true;
    document.getElementById("nothing").hidden = false;
    return;
  }
  points.sort((a, b) => Date.parse(a.finished_at) - Date.parse(b.finished_at));
  const times = points.map((point) => Date.parse(point.finished_at) / 1000);
  let drawn = [];

  const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const percent = (value) => (value == null ? "–" : `${Math.round(100 * value)} %`);
  const seconds = (value) => (value == null ? "–" : `${value < 10 ? value.toFixed(1) : Math.round(value)} s`);

  // 24 hours, and the date where a day is what tells two ticks apart.
  function clock(_, ticks) {
    const span = ticks.at(-1) - ticks[0];
    const parts = span > 3 * 86400 ? { day: "numeric", month: "short" } : span > 20 * 3600 ? { weekday: "short", hour: "2-digit", minute: "2-digit" }
      : span < 600 ? { hour: "2-digit", minute: "2-digit", second: "2-digit" } : { hour: "2-digit", minute: "2-digit" };
    const format = new Intl.DateTimeFormat(undefined, { ...parts, hourCycle: "h23" });
    return ticks.map((at) => format.format(at * 1000));
  }

  function chart(id, data, series, { scale, format, paths }) {
    const place = document.getElementById(id);
    const axis = { stroke: token("--muted"), grid: { stroke: token("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
    const first = data[0][0], last = data[0].at(-1);
    const range = first === last ? [first - 3600, last + 3600] : [first - (last - first) * 0.03, last + (last - first) * 0.03];
    drawn.push(new uPlot({
      width: place.clientWidth,
      height: 250,
      scales: { x: { range }, y: scale },
      axes: [{ ...axis, values: clock, space: 76 }, { ...axis, size: 58, values: (_, ticks) => ticks.map(format) }],
      legend: { live: true },
      cursor: { points: { size: 7 } },
      series: [
        { value: (_, at) => (at == null ? "–" : new Date(at * 1000).toLocaleString(undefined, { hourCycle: "h23" })) },
        ...series.map((one, index) => ({
          label: one,
          stroke: token(`--chart-${1 + (index % 6)}`),
          fill: paths ? token(`--chart-${1 + (index % 6)}`) : undefined,
          width: paths ? 0 : 2,
          paths,
          points: paths ? { show: false } : { size: 6, fill: token(`--chart-${1 + (index % 6)}`) },
          spanGaps: true,
          value: (_, value) => format(value),
        })),
      ],
    }, data, place));
  }

  function drawAll() {
    drawn.forEach((one) => one.destroy());
    drawn = [];
    chart("kept", [times, points.map((p) => p.tokens_kept), points.map((p) => p.slices_kept)], ["tokens kept", "slices read"],
      { scale: { range: [0, 1] }, format: percent });

    const cost = {};
    for (const point of points) for (const [step, s] of Object.entries(point.timings_s)) cost[step] = (cost[step] || 0) + s;
    const steps = Object.keys(cost).sort((a, b) => cost[b] - cost[a]).slice(0, 4);
    chart("time", [times, points.map((p) => p.total_s), ...steps.map((step) => points.map((p) => p.timings_s[step] ?? null))],
      ["all", ...steps.map((step) => step.replace("_", " "))], { scale: { range: (_, low, high) => [0, high * 1.1 || 1] }, format: seconds });

    const span = times.at(-1) - times[0];
    const bin = span > 20 * 86400 ? 86400 : span > 2 * 86400 ? 6 * 3600 : 3600;
    const counts = new Map();
    const start = Math.floor(times[0] / bin) * bin, end = Math.floor(times.at(-1) / bin) * bin;
    for (let at = start; at <= end; at += bin) counts.set(at, 0);
    for (const time of times) { const at = Math.floor(time / bin) * bin; counts.set(at, counts.get(at) + 1); }
    chart("throughput", [[...counts.keys()], [...counts.values()]], [bin === 3600 ? "per hour" : bin === 86400 ? "per day" : "per 6 hours"],
      { scale: { range: (_, low, high) => [0, Math.max(2, Math.ceil(high * 1.15))] }, format: (n) => (n == null ? "–" : Number.isInteger(n) ? String(n) : ""), paths: uPlot.paths.bars({ size: [0.7, 60] }) });

    const groups = new Map();
    points.forEach((point, index) => {
      const name = point.scanner || point.protocol ? `${point.scanner || point.sender}, ${point.protocol || point.route}` : `${point.sender}, ${point.route}`;
      if (!groups.has(name)) groups.set(name, { last: [], line: points.map(() => null) });
      const group = groups.get(name);
      if (point.tokens_kept == null) return;
      group.last = [...group.last.slice(-9), point.tokens_kept];
      group.line[index] = group.last.reduce((a, b) => a + b) / group.last.length;
    });
    const busiest = [...groups].slice(0, 6);
    chart("drift", [times, ...busiest.map(([, group]) => group.line)], busiest.map(([name]) => name), { scale: { range: [0, 1] }, format: percent });
  }

  drawAll();
  addEventListener("themechange", drawAll);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 150); });
});
