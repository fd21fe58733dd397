// The page: what a person has chosen, sent to the server once for each arm, and shown side by side.

import { Client } from "./api.js";
import { armGroups, fixedWeights, requestOf } from "./arms.js";
import { Column } from "./column.js";
import { byId, make, say } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { MEANINGS, writeAdapters, writeArms, writeRouting, writeSampling } from "./fields.js";
import { askKey, listenForKey } from "./key-dialog.js";
import { clearProblem, mark, marked } from "./problems.js";
import { empty, fromFragment, SAMPLING, toFragment } from "./state.js";

const client = new Client(askKey);
const server = { adapters: [], schema: { properties: {} }, routing: {}, hasChat: true, isKnown: false };
let state = fromFragment(location.hash);
let columns = [];
let saving = 0; // timer
let running = null; // AbortController of the requests that run

/** Ask the server what it has; the form is written from that. */
async function meet() {
  say(byId("problem"), "");
  try {
    const [models, document, routing] = await Promise.all([
      client.json("v1/models"),
      client.json("openapi.json"),
      bundleRouting(),
    ]);
    server.adapters = models.data.filter((model) => model.parent === "base").map((model) => model.id);
    server.schema = document.components.schemas.RoutingParams;
    server.routing = routing;
    server.hasChat = models.data[0].has_chat_template;
    server.isKnown = true;
    byId("model").textContent = models.data[1]?.parent ? models.data[0].id : models.data[1].id;
    byId("status").textContent = "";
  } catch (error) {
    say(byId("problem"), error.message);
  }
  dropUnknown();
  write();
}

/** Return the bundle's routing options; none where its adapters have no samples, and say what that means. */
async function bundleRouting() {
  try {
    return (await client.json("v1/route", { text: "-" })).routing;
  } catch (error) {
    if (error.status !== 400) throw error;
    say(byId("problem"), error.message);
    return {};
  }
}

/** Forget what a link names that this server does not have, and say so. */
function dropUnknown() {
  if (!server.isKnown) return;
  const known = armGroups(server.adapters).flatMap(({ arms }) => arms.map(([id]) => id));
  const isKnown = (name) => server.adapters.includes(name);
  const gone = [...state.off, ...Object.keys(state.fixed)].filter((name) => !isKnown(name));
  gone.push(...[state.arm, state.other].filter((arm) => arm && !known.includes(arm)));
  for (const [group, options] of [["routing", server.schema.properties], ["sampling", MEANINGS]]) {
    const unknown = Object.keys(state[group]).filter((name) => !Object.hasOwn(options, name));
    unknown.forEach((name) => delete state[group][name]);
    gone.push(...unknown.map((name) => `${group}.${name}`));
  }
  if (!["", "chat", "text"].includes(state.kind)) {
    gone.push(`kind ${state.kind}`);
    state.kind = "";
  }
  state.off = state.off.filter(isKnown);
  state.fixed = Object.fromEntries(Object.entries(state.fixed).filter(([name]) => isKnown(name)));
  if (!known.includes(state.arm)) state.arm = "auto";
  if (!known.includes(state.other)) state.other = "";
  if (gone.length) byId("status").textContent = `Not on this server: ${[...new Set(gone)].join(", ")}.`;
}

/** Return how the prompt is sent: as a chat where the base has a template, unless a person chooses. */
function kindOf() {
  return server.hasChat ? state.kind || "chat" : "text";
}

/** Write the whole form from the state. */
function write() {
  const groups = armGroups(server.adapters);
  if (byId("prompt").value !== state.prompt) byId("prompt").value = state.prompt;
  byId("kind").value = kindOf();
  byId("kind").options[0].disabled = !server.hasChat;
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
    mark(byId("prompt"), "Write a prompt first, or take an example.");
    focusOn(byId("prompt"));
    return;
  }
  running = new AbortController();
  setBusy(true);
  const arms = [state.arm, state.other].filter((arm, i) => i === 0 || arm);
  marked().forEach(clearProblem);
  columns.forEach((column) => column.close());
  columns = arms.map(() => new Column(server.adapters));
  byId("answers").replaceChildren(...columns.map((column) => column.root));
  const isFarDown = byId("answers").getBoundingClientRect().top > innerHeight / 2;
  if (isFarDown) byId("answers").scrollIntoView({ block: "start" });
  const labels = new Map(armGroups(server.adapters).flatMap(({ arms: each }) => each));
  const runs = columns.map((column, i) => {
    const request = requestOf(state, arms[i], server.adapters, kindOf());
    return column.run(client, request, labels.get(arms[i]), running.signal);
  });
  const outcomes = await Promise.all(runs);
  running = null;
  setBusy(false);
  const counts = columns.map((column) => column.numAnswered).join(" and ");
  const tokens = counts === "1" ? "1 token" : `${counts} tokens`;
  const worst = ["failed", "stopped"].find((outcome) => outcomes.includes(outcome));
  if (worst === "failed" && marked().length) focusOn(marked()[0]);
  const isBegun = columns.some((column) => column.numAnswered);
  const failed = isBegun ? `Broken off after ${tokens}` : "Not answered";
  const words = { failed: `${failed}: see the message in red.`, stopped: `Stopped after ${tokens}.` };
  byId("status").textContent = words[worst] ?? `Done: ${tokens}.`;
}

/** Put the keyboard on a field or the first one of a group, and the view on it and on what is said there. */
function focusOn(field) {
  (field.matches("fieldset") ? field.querySelector("input:enabled") : field)?.focus();
  byId(`${field.id}-problem`).scrollIntoView({ block: "nearest" });
}

/** Swap the buttons; the keyboard goes along with them. */
function setBusy(isBusy) {
  const [usable, other] = isBusy ? [byId("stop"), byId("send")] : [byId("send"), byId("stop")];
  const isFocused = document.activeElement === other;
  usable.disabled = false;
  if (isFocused) usable.focus({ preventScroll: true }); // the answers are what one sees
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
  state.kind = example.kind ?? "";
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
  byId("form").addEventListener("input", (event) => {
    const field = event.target.closest("[aria-invalid]");
    if (field) clearProblem(field);
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("share").addEventListener("click", share);
  byId("reset").addEventListener("click", () => {
    state = { ...empty(), prompt: state.prompt, arm: state.arm, other: state.other };
    marked().forEach(clearProblem);
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
