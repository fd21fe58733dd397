// What stands beside a token that the pointer or the keyboard is on: its weights, and what they were made from.

import { BASE, baseShare, colour, line } from "./colours.js";
import { byId, make, show } from "./dom.js";

const MARGIN = 8; // pixels to the window's edges and to the token

/** Show a token's numbers beside its element. */
export function inspect(element, token) {
  const box = byId("inspector");
  const where = `${token.isPrompt ? "prompt" : "answer"}, token ${token.index + 1}`;
  box.replaceChildren(
    make("p", { className: "quiet" }, make("code", { textContent: JSON.stringify(token.text) }), ` ${where}`),
    token.names.length ? table(token) : "",
    note(token),
  );
  show(box, true);
  place(box, element.getClientRects()[0] ?? element.getBoundingClientRect());
}

export function hideInspector() {
  show(byId("inspector"), false);
}

function table({ names, places, weights, cosines, scores }) {
  const heads = ["adapter", "weight", ...(cosines ? ["cosine", "score"] : [])];
  const head = make("tr", {}, ...heads.map((text) => make("th", { textContent: text, scope: "col" })));
  const rows = names.map((name, i) => {
    const numbers = [written(weights[i], 2), ...(cosines ? [written(cosines[i], 3), written(scores[i], 2)] : [])];
    const label = make("th", { scope: "row" }, swatch(places[i]), name);
    return make("tr", {}, label, ...numbers.map((textContent) => make("td", { textContent })));
  });
  const share = make("td", { textContent: written(baseShare(weights), 2) }); // not compared: no cosine, no score
  rows.push(make("tr", {}, make("th", { scope: "row" }, swatch(BASE), "base"), share));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

function written(value, digits) {
  if (value === null) return ""; // of an adapter without samples
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
}

function note({ weights, cosines }) {
  const isBase = weights.every((weight) => weight === 0);
  if (isBase) return make("p", { className: "quiet", textContent: "No adapter acts: the base model." });
  return cosines ? "" : make("p", { className: "quiet", textContent: "Given weights: the text is not compared." });
}

/** Return a sample of an adapter's colour and line, or of the base's. */
export function swatch(index) {
  const element = make("span", { className: "swatch", ariaHidden: "true" });
  element.style.setProperty("--colour", colour(index));
  element.style.setProperty("--line", line(index));
  return element;
}

/** Put the box below the token, or above it where there is no room; within the window. */
function place(box, token) {
  const { width, height } = box.getBoundingClientRect();
  const left = Math.min(token.left, document.documentElement.clientWidth - width - MARGIN);
  const isBelow = token.bottom + MARGIN + height < innerHeight;
  const top = isBelow ? token.bottom + MARGIN : token.top - MARGIN - height;
  box.style.left = `${Math.max(MARGIN, left)}px`;
  box.style.top = `${Math.max(MARGIN, top)}px`;
}
