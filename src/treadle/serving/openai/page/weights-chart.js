// The weights over the tokens, and the base's share above them, as a stacked area, drawn by Chart.js.

import { BASE, baseShare, colour, dash } from "./colours.js";

const FILL = "b8"; // how much of the colour an area has, as hexadecimal
const BASE_FILL = "48";

/** A chart of one column; `onPick(index)` is told which token the pointer is over. */
export class WeightsChart {
  constructor(canvas, onPick) {
    this.promptTokens = 0;
    this.picked = -1;
    this.isStale = false;
    this.chart = new Chart(canvas, {
      type: "line",
      data: { labels: [], datasets: [] },
      options: {
        animation: false,
        maintainAspectRatio: false,
        layout: { padding: { top: 14 } }, // for the word at the prompt's end
        interaction: { mode: "index", axis: "x", intersect: false },
        onHover: (_, items) => onPick(items.length ? items[0].index : -1),
        plugins: { legend: { display: false }, tooltip: { enabled: false } },
        scales: { x: axis("token"), y: { ...axis("weight"), stacked: true, min: 0, max: 1 } },
      },
      plugins: [{ id: "marks", afterDatasetsDraw: () => this.#drawMarks() }],
    });
    this.restyle();
  }

  /** Begin anew with adapters, each a name and its place among all. */
  start(names, places) {
    this.chart.data.labels = [];
    const all = [...places, BASE];
    this.chart.data.datasets = [...names, "base"].map((label, i) => ({
      label,
      data: [],
      fill: i ? "-1" : "origin",
      backgroundColor: colour(all[i]) + (all[i] === BASE ? BASE_FILL : FILL),
      borderColor: colour(all[i]),
      borderDash: dash(all[i]),
      borderWidth: all[i] === BASE ? 0 : 1.5,
      pointRadius: 0,
      pointHoverRadius: 0,
    }));
    this.promptTokens = 0;
    this.picked = -1;
    this.chart.options.scales.y.max = 1;
    this.#redraw();
  }

  /** Add one token's weights (N). */
  add(weights) {
    const { labels, datasets } = this.chart.data;
    labels.push(labels.length + 1);
    [...weights, baseShare(weights)].forEach((weight, i) => datasets[i].data.push(weight));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    const { y } = this.chart.options.scales;
    if (total > y.max + 0.01) y.max = Math.ceil(2 * total) / 2; // fixed weights need not sum to 1
    this.#redraw();
  }

  /** Mark a token; -1 = none. */
  pick(index) {
    if (index === this.picked) return;
    this.picked = index;
    this.#redraw();
  }

  /** Take the page's colours, which have changed. */
  restyle() {
    const style = getComputedStyle(this.chart.canvas);
    this.ink = style.color;
    for (const scale of Object.values(this.chart.options.scales)) {
      scale.ticks.color = scale.title.color = style.color;
      scale.grid.color = style.borderTopColor;
      scale.ticks.font = scale.title.font = { family: style.fontFamily, size: 11 };
    }
    this.#redraw();
  }

  /** Draw once a frame at most. */
  #redraw() {
    if (this.isStale) return;
    this.isStale = true;
    requestAnimationFrame(() => {
      this.isStale = false;
      this.chart.update("none");
    });
  }

  /** Draw a line where the prompt ends, and one at the picked token. */
  #drawMarks() {
    if (this.promptTokens) this.#drawMark(this.promptTokens - 0.5, [4, 4], "answer");
    if (this.picked >= 0) this.#drawMark(this.picked, [], "");
  }

  #drawMark(place, pattern, label) {
    const { ctx, chartArea, scales } = this.chart;
    const [before, after] = [Math.floor(place), Math.ceil(place)].map((index) => scales.x.getPixelForValue(index));
    const x = (before + after) / 2;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = this.ink;
    ctx.setLineDash(pattern);
    ctx.beginPath();
    ctx.moveTo(x, chartArea.top);
    ctx.lineTo(x, chartArea.bottom);
    ctx.stroke();
    ctx.font = "11px system-ui, sans-serif";
    const isLeft = x > chartArea.right - 60;
    ctx.textAlign = isLeft ? "right" : "left";
    if (label) ctx.fillText(label, x + (isLeft ? -5 : 5), chartArea.top - 4);
    ctx.restore();
  }
}

function axis(text) {
  return {
    title: { display: true, text },
    ticks: { maxTicksLimit: text === "token" ? 9 : 3, maxRotation: 0 },
    grid: { drawTicks: false },
    border: { display: false },
  };
}
