// The page: what a person has chosen, sent to the server once for each arm, and shown side by side.

import { Client } from "./api.js";
import { armGroups, fixedWeights, requestOf } from "./arms.js";
import { Column } from "./column.js";
import { byId, make, say } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { writeAdapters, writeArms, writeRouting, writeSampling } from "./fields.js";
import { askKey, listenForKey } from "./key-dialog.js";
import { empty, fromFragment, SAMPLING, toFragment } from "./state.js";

const client = new Client(askKey);
const server = { adapters: [], schema: { properties: {} }, routing: {}, isKnown: false };
let state = fromFragment(location.hash);
let columns = [];
let saving = 0; // timer
let running = null; // AbortController of the requests that run

/** Ask the server what it has; the form is written from that. */
async function meet() {
  say(byId("problem"), "");
  try {
    const [models, document, route] = await Promise.all([
      client.json("v1/models"),
      client.json("openapi.json"),
      client.json("v1/route", { text: "-" }), // for the bundle's routing
    ]);
    server.adapters = models.data.filter((model) => model.parent === "base").map((model) => model.id);
    server.schema = document.components.schemas.RoutingParams;
    server.routing = route.routing;
    server.isKnown = true;
    byId("model").textContent = models.data[1]?.parent ? models.data[0].id : models.data[1].id;
    byId("status").textContent = "";
  } catch (error) {
    say(byId("problem"), error.message);
  }
  dropUnknown();
  write();
}

/** Forget what a link names that this server does not have, and say so. */
function dropUnknown() {
  if (!server.isKnown) return;
  const known = armGroups(server.adapters).flatMap(({ arms }) => arms.map(([id]) => id));
  const isKnown = (name) => server.adapters.includes(name);
  const gone = [...state.off, ...Object.keys(state.fixed)].filter((name) => !isKnown(name));
  gone.push(...[state.arm, state.other].filter((arm) => arm && !known.includes(arm)));
  state.off = state.off.filter(isKnown);
  state.fixed = Object.fromEntries(Object.entries(state.fixed).filter(([name]) => isKnown(name)));
  if (!known.includes(state.arm)) state.arm = "auto";
  if (!known.includes(state.other)) state.other = "";
  if (gone.length) byId("status").textContent = `Not on this server: ${[...new Set(gone)].join(", ")}.`;
}

/** Write the whole form from the state. */
function write() {
  const groups = armGroups(server.adapters);
  if (byId("prompt").value !== state.prompt) byId("prompt").value = state.prompt;
  byId("kind").value = state.kind;
  writeArms(byId("arm"), groups, state.arm);
  writeArms(byId("other"), groups, state.other, "nothing");
  writeRouting(state, server.schema, server.routing, remember);
  writeSampling(state, SAMPLING, remember);
  refresh();
}

/** Write what depends on other fields, and keep the state in the address. */
function refresh() {
  const present = server.adapters.filter((name) => !state.off.includes(name));
  writeAdapters(state, server.adapters, fixedWeights(state, present), refresh);
  remember();
}

/** Keep the state in the address, soon: browsers limit how often it may change. */
function remember() {
  if (!server.isKnown) return; // a link is not cut to what is known so far
  clearTimeout(saving);
  saving = setTimeout(save, 250);
}

function save() {
  clearTimeout(saving);
  history.replaceState(null, "", `#${toFragment(state)}`);
}

/** Ask all arms; the prompt stays where it is, whatever happens. */
async function send() {
  if (running) return;
  if (!server.isKnown) await meet();
  if (!server.isKnown) return;
  if (!state.prompt.trim()) {
    byId("status").textContent = "Write a prompt first.";
    byId("prompt").focus();
    return;
  }
  running = new AbortController();
  setBusy(true);
  const arms = [state.arm, state.other].filter((arm, i) => i === 0 || arm);
  columns.forEach((column) => column.close());
  columns = arms.map(() => new Column(server.adapters));
  byId("answers").replaceChildren(...columns.map((column) => column.root));
  const labels = new Map(armGroups(server.adapters).flatMap(({ arms: each }) => each));
  const runs = columns.map((column, i) => {
    const request = requestOf(state, arms[i], server.adapters);
    return column.run(client, request, labels.get(arms[i]), running.signal);
  });
  const outcomes = await Promise.all(runs);
  running = null;
  setBusy(false);
  const tokens = columns.map((column) => column.numAnswered).join(" and ");
  const worst = ["failed", "stopped"].find((outcome) => outcomes.includes(outcome));
  const words = { failed: "Failed: see the message below.", stopped: `Stopped after ${tokens} tokens.` };
  byId("status").textContent = words[worst] ?? `Done: ${tokens} tokens.`;
}

/** Swap the buttons; the keyboard goes along with them. */
function setBusy(isBusy) {
  const [usable, other] = isBusy ? [byId("stop"), byId("send")] : [byId("send"), byId("stop")];
  const isFocused = document.activeElement === other;
  usable.disabled = false;
  if (isFocused) usable.focus();
  other.disabled = true;
  byId("status").textContent = isBusy ? "Generating …" : "";
}

async function share() {
  save();
  try {
    await navigator.clipboard.writeText(location.href);
    byId("status").textContent = "The link is copied. It holds prompt and options, and no key.";
  } catch {
    byId("status").textContent = "The link is in the address bar. It holds prompt and options, and no key.";
  }
}

/** Take an example; the Back button brings the prompt back that was there. */
function take(example) {
  save();
  history.pushState(null, "", location.href);
  state.prompt = example.prompt;
  state.kind = "";
  state.routing = { ...example.routing };
  write();
}

function listen() {
  for (const id of ["prompt", "kind"]) {
    byId(id).addEventListener("input", (event) => {
      state[id] = event.target.value;
      remember();
    });
  }
  for (const id of ["arm", "other"]) {
    byId(id).addEventListener("change", (event) => {
      state[id] = event.target.value;
      refresh();
    });
  }
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("share").addEventListener("click", share);
  byId("reset").addEventListener("click", () => {
    state = { ...empty(), prompt: state.prompt, kind: state.kind, arm: state.arm, other: state.other };
    write();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
  });
  addEventListener("popstate", () => {
    state = fromFragment(location.hash);
    dropUnknown();
    write();
  });
  document.documentElement.addEventListener("theme", () => columns.forEach((column) => column.restyle()));
  byId("examples").append(
    "Examples: ",
    ...EXAMPLES.map((example) => {
      const button = make("button", { type: "button", className: "chip", textContent: example.title });
      button.addEventListener("click", () => take(example));
      return button;
    }),
  );
}

listen();
listenForKey(meet);
write();
await meet();
