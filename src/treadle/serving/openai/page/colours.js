// Which colour and line an adapter has. The colours are Okabe and Ito's, which colour-blind people can tell apart; the
// line under a token says it without any colour. The base is grey and has no line.

const COLOURS = ["#2186cf", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#7f7f7f"];
const LINES = ["solid", "dashed", "dotted", "double"];
const DASHES = { solid: [], dashed: [7, 4], dotted: [2, 3], double: [12, 3, 2, 3] };
const NEUTRAL = "#929ca6"; // visible on light and dark cards

export const LEAST = 0.005; // weights below do not colour
export const BASE = -1; // the base's place among the adapters

export const colour = (index) => (index === BASE ? NEUTRAL : COLOURS[index % COLOURS.length]);
export const line = (index) =>
  index === BASE ? "none" : LINES[(index + Math.floor(index / COLOURS.length)) % LINES.length];
export const dash = (index) => DASHES[line(index)] ?? [];

/** Return the base's share: what the adapters' weights leave of 1. */
export const baseShare = (weights) => Math.max(0, 1 - weights.reduce((sum, weight) => sum + weight, 0));

/** Return the CSS colour of a blend: weights[i] of the adapter places[i]; less than 1 in all lets the page through. */
export function mix(weights, places) {
  let mixed = "transparent";
  let total = 0;
  weights.forEach((weight, i) => {
    if (weight < LEAST) return;
    const share = (100 * weight) / (total + weight);
    mixed = total ? `color-mix(in oklab, ${mixed}, ${colour(places[i])} ${share.toFixed(1)}%)` : colour(places[i]);
    total += weight;
  });
  return total < 0.995 && total ? `color-mix(in oklab, ${mixed} ${(100 * total).toFixed(1)}%, transparent)` : mixed;
}

/** Return the place of the largest weight; -1 where several are as large, or the base has as large a share. */
export function leading(weights) {
  const largest = Math.max(...weights);
  const isTie = weights.filter((weight) => weight > largest - LEAST).length > 1;
  return largest < LEAST || largest <= baseShare(weights) || isTie ? -1 : weights.indexOf(largest);
}
