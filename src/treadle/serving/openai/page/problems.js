// What the server refuses, said at the field that it is about.

import { byId, say } from "./dom.js";

const FIELDS = { prompt: "prompt", messages: "prompt", "treadle.fixed": "adapters", "treadle.adapters": "adapters" };

/** Say each problem of a message at its field; return the rest of the message, or which fields are marked. */
export function placeProblems(message) {
  const [head, ...listed] = message.split("\n  - ");
  const problems = listed.length ? listed : [head];
  const rest = problems.filter((problem) => !place(problem));
  if (rest.length) return rest.join("\n");
  return "The server refuses this: see the marked fields.";
}

function place(problem) {
  const [, name, words] = /^([\w.]+)[^:]*: (.*)$/s.exec(problem) ?? [];
  if (!name) return false;
  const group = name.split(".").slice(0, 2).join(".");
  const id = FIELDS[group] ?? (name.startsWith("treadle.") ? group.replace("treadle.", "routing-") : `sampling-${name}`);
  const field = byId(id);
  if (!field) return false;
  mark(field, id === "adapters" ? problem : words);
  return true;
}

/** Say what is wrong at a field, and open the group that it is in. */
export function mark(field, words) {
  field.setAttribute("aria-invalid", "true");
  const closed = field.closest("details");
  if (closed) closed.open = true;
  say(byId(`${field.id}-problem`), words);
}

/** Forget what was said at a field. */
export function clearProblem(field) {
  field.removeAttribute("aria-invalid");
  say(byId(`${field.id}-problem`), "");
}

export const marked = () => [...document.querySelectorAll("[aria-invalid]")];
