// Four charts from /api/v1/charts; the numbers are the API's. Single analyses where all of the period fit, else steps.
"use strict";
addEventListener("DOMContentLoaded", async () => {
  const box = document.getElementById("charts");
  const { points, steps, groups, step_s: step } = await (await fetch(box.dataset.source)).json();
  if (!points.length && !steps.length) {
    box.hidden = true;
    document.getElementById("nothing").hidden = false;
    return;
  }
  points.sort((a, b) => Date.parse(a.finished_at) - Date.parse(b.finished_at));
  const times = points.map((point) => Date.parse(point.finished_at) / 1000);
  let drawn = [];
  const done = steps.reduce((sum, one) => sum + one.analyses, 0);
  const all = done <= points.length; // every analysis of the period is a point of its own
  const per = step === 3600 ? "hour" : step === 86400 ? "day" : "6 hours";
  const say = (id, words) => (document.getElementById(`${id}-hint`).textContent = `${words}: ${document.getElementById(`${id}-hint`).textContent}`);
  say("kept", all ? "per analysis" : `mean of every ${per}`);
  say("time", all ? "per analysis" : `the newest ${points.length.toLocaleString()} of ${done.toLocaleString()} analyses`);
  say("drift", `mean of every ${per}`);
  const at = (one) => Date.parse(one.at) / 1000;
  const share = (part, whole) => (whole ? part / whole : null);

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

  function chart(id, data, series, { scale, format, paths, gap, dots }) {
    const place = document.getElementById(id);
    const axis = { stroke: token("--muted"), grid: { stroke: token("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
    const first = data[0][0], last = data[0].at(-1);
    const alone = gap || 3600; // where there is nothing beside it
    const range = first === last ? [first - alone, last + alone] : [first - (last - first) * 0.03, last + (last - first) * 0.03];
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
          width: paths || dots ? 0 : 2,
          paths,
          points: paths ? { show: false } : { show: dots || undefined, size: dots ? 4 : 6, fill: token(`--chart-${1 + (index % 6)}`) },
          spanGaps: true,
          value: (_, value) => format(value),
        })),
      ],
    }, data, place));
  }

  function drawAll() {
    drawn.forEach((one) => one.destroy());
    drawn = [];
    const read = steps.filter((one) => one.tokens_in);
    const kept = all ? [times, points.map((p) => p.tokens_kept), points.map((p) => p.slices_kept)]
      : [read.map(at), read.map((one) => share(one.tokens_kept, one.tokens_in)), read.map((one) => share(one.inputs_kept, one.inputs))];
    if (kept[0].length) chart("kept", kept, ["tokens kept", "slices read"], { gap: all ? 0 : step, dots: all, scale: { range: [0, 1] }, format: percent });

    const cost = {};
    for (const point of points) for (const [step, s] of Object.entries(point.timings_s)) cost[step] = (cost[step] || 0) + s;
    const dearest = Object.keys(cost).sort((a, b) => cost[b] - cost[a]).slice(0, 4);
    if (points.length) chart("time", [times, points.map((p) => p.total_s), ...dearest.map((step) => points.map((p) => p.timings_s[step] ?? null))],
      ["all", ...dearest.map((step) => step.replace("_", " "))], { dots: true, scale: { range: (_, low, high) => [0, high * 1.1 || 1] }, format: seconds });

    const counts = new Map();
    for (let time = at(steps[0]); time <= at(steps.at(-1)); time += step) counts.set(time, 0);
    for (const one of steps) counts.set(at(one), one.analyses);
    chart("throughput", [[...counts.keys()], [...counts.values()]], [`per ${per}`],
      { gap: step, scale: { range: (_, low, high) => [0, Math.max(2, Math.ceil(high * 1.15))] }, format: (n) => (n == null ? "–" : Number.isInteger(n) ? String(n) : ""), paths: uPlot.paths.bars({ size: [0.7, 60] }) });

    const moments = [...new Set(groups.map(at))].sort((a, b) => a - b);
    const lines = new Map();
    for (const one of groups) {
      const name = [one.scanner, one.protocol].filter(Boolean).join(", ") || "unnamed scanner";
      if (!lines.has(name)) lines.set(name, { analyses: 0, line: moments.map(() => null) });
      const group = lines.get(name);
      group.analyses += one.analyses;
      group.line[moments.indexOf(at(one))] = share(one.tokens_kept, one.tokens_in);
    }
    const busiest = [...lines].sort(([, a], [, b]) => b.analyses - a.analyses).slice(0, 6);
    if (busiest.length) chart("drift", [moments, ...busiest.map(([, group]) => group.line)], busiest.map(([name]) => name), { gap: step, scale: { range: [0, 1] }, format: percent });
    else document.getElementById("drift").textContent = "No scanner and protocol to show here.";
  }

  drawAll();
  addEventListener("themechange", drawAll);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 150); });
});
