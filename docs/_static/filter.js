// KOALA-V on a small noisy regression, in the reader's browser: the interactive picture of docs/filter.md.
"use strict";

/** Numbers in [0, 1), the same for the same seed. */
function generator(seed) {
  return () => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    return seed / 4294967296;
  };
}

/** Loss, R, s and gain of every step. Per-sample loss: half the squared error of a linear model in ten weights. */
function koalaV({ lr, sigma, q, alpha, noise, steps = 200, batch = 16, weights = 10, seed = 1 }) {
  const uniform = generator(seed);
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  const target = Array.from({ length: weights }, normal);
  const x = new Array(weights).fill(0);
  const curves = { loss: [], R: [], s: [], gain: [] };
  let s = sigma, R = 1;
  for (let step = 0; step < steps; step++) {
    s += q; // predict
    const g = new Array(weights).fill(0);
    let L = 0, squares = 0;
    for (let j = 0; j < batch; j++) {
      const a = x.map(normal);
      const error = a.reduce((sum, value, i) => sum + value * (x[i] - target[i]), 0) - noise * normal();
      a.forEach((value, i) => { g[i] += value * error / batch; });
      L += error * error / 2 / batch;
      squares += error ** 4 / 4 / batch;
    }
    R = alpha * R + (1 - alpha) * squares; // measure
    const gg = g.reduce((sum, value) => sum + value * value, 0);
    const S = s * gg + R;
    g.forEach((value, i) => { x[i] -= lr * s / S * L * value; }); // update
    curves.loss.push(L);
    curves.R.push(R);
    curves.s.push(s);
    curves.gain.push(s * gg / S);
    s *= R / S; // s - s^2 |g|^2 / S, without the cancellation
  }
  return curves;
}

/** One curve as an SVG figure; on a logarithmic axis unless it is a share of 1. */
function panel(title, values, linear) {
  const width = 280, height = 150, left = 46, right = 8, top = 22, bottom = 20;
  const finite = values.filter((value) => Number.isFinite(value) && value > 0);
  let low = linear ? 0 : Math.floor(Math.log10(Math.min(...finite, 1)));
  let high = linear ? 1 : Math.ceil(Math.log10(Math.max(...finite, 1)));
  if (low === high) high += 1;
  const y = (value) => top + (height - top - bottom) * (1 - (value - low) / (high - low));
  const at = (value) => y(linear ? value : Math.log10(value));
  const points = values
    .map((value, i) => [left + (width - left - right) * i / (values.length - 1), at(value)])
    .filter((point) => Number.isFinite(point[1]))
    .map((point) => point.map((number) => number.toFixed(1)).join(","));
  const label = (value) => (linear ? String(value) : value === 0 ? "1" : `1e${value}`);
  return `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${title} by step">
    <text x="${left}" y="14">${title}</text>
    <text x="${left - 6}" y="${y(high) + 4}" text-anchor="end">${label(high)}</text>
    <text x="${left - 6}" y="${y(low) + 4}" text-anchor="end">${label(low)}</text>
    <text x="${width - right}" y="${height - 4}" text-anchor="end">step ${values.length}</text>
    <path class="axis" d="M${left},${top}V${height - bottom}H${width - right}"/>
    <polyline points="${points.join(" ")}"/></svg>`;
}

const SLIDERS = { // name: [label, lowest, highest, start], the first two powers of ten
  lr: ["lr", -2, 0.6, 1],
  q: ["q (process noise)", -3, 1, 1],
  sigma: ["sigma (first covariance)", -3, 1, 0.1],
  noise: ["noise of the data", -2, 0.5, 0.3],
};

function show(root) {
  root.innerHTML = Object.entries(SLIDERS).map(([name, [label, low, high, start]]) =>
    `<label>${label} <output></output><input type="range" name="${name}" min="${low}" max="${high}" step="0.05"
      value="${Math.log10(start)}"></label>`).join("") + '<div class="panels"></div>';
  const draw = () => {
    const options = { alpha: 0.9 };
    for (const input of root.querySelectorAll("input")) {
      options[input.name] = 10 ** Number(input.value);
      input.parentNode.querySelector("output").textContent = options[input.name].toPrecision(2);
    }
    const curves = koalaV(options);
    root.querySelector(".panels").innerHTML = panel("loss", curves.loss) + panel("noise R", curves.R)
      + panel("covariance s", curves.s) + panel("gain", curves.gain, true);
  };
  root.addEventListener("input", draw);
  draw();
}

if (typeof document !== "undefined") {
  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".koala-filter").forEach(show));
} else {
  module.exports = { koalaV };
}
