// The form's generated parts: adapters with their weights, and the options of routing and sampling.

import { byId, make } from "./dom.js";
import { swatch } from "./inspector.js";

/** What the options of sampling mean. */
export const MEANINGS = {
  max_tokens: "tokens of the answer at most",
  temperature: "0 = the likeliest token each time",
  top_p: "sample from the smallest set of tokens with this probability mass",
  top_k: "sample from this many most probable tokens; 0 = all",
  seed: "repeats an answer",
};

/** Write the list of adapters; `state` is changed and `changed()` called when a person does something. */
export function writeAdapters(state, adapters, weights, changed) {
  const isFixed = [state.arm, state.other].includes("fixed");
  const isBlend = [state.arm, state.other].some((arm) => ["auto", "prompt", "fixed"].includes(arm));
  byId("adapters").disabled = !isBlend;
  const isNone = adapters.length > 0 && adapters.every((name) => state.off.includes(name));
  const hint = isFixed ? "Those that take part, and their fixed weights." : "Those that take part.";
  byId("adapters-hint").textContent = isNone ? "None takes part: the base model answers alone." : hint;
  byId("adapter-list").replaceChildren(
    ...adapters.map((name, index) => {
      const box = make("input", { type: "checkbox", checked: !state.off.includes(name), name });
      box.addEventListener("change", () => {
        state.off = box.checked ? state.off.filter((other) => other !== name) : [...state.off, name];
        changed();
        byId("adapter-list").querySelector(`[name="${CSS.escape(name)}"]`).focus(); // the list was written anew
      });
      const label = make("label", {}, box, swatch(index), make("span", { textContent: name }));
      return make("li", {}, label, isFixed ? weightField(state, name, weights, changed) : "");
    }),
  );
}

function weightField(state, name, weights, changed) {
  const field = make("input", { type: "number", min: 0, max: 100, step: 0.05, ariaLabel: `weight of ${name}` });
  field.value = weights[name] ?? 0;
  field.disabled = state.off.includes(name);
  field.addEventListener("change", () => {
    state.fixed[name] = field.value;
    changed();
  });
  return field;
}

/** Write a field for each option of routing that the server's schema has, with the bundle's value as placeholder. */
export function writeRouting(state, schema, bundle, changed) {
  const properties = Object.entries(schema.properties).filter(([name]) => name !== "fixed");
  const fields = properties.map(([name, property]) => {
    const choices = property.type === "boolean" ? ["true", "false"] : property.enum?.filter((each) => each !== "fixed");
    return fieldOf("routing", name, property.description, choices, String(bundle[name] ?? "none"));
  });
  byId("routing-fields").replaceChildren(...fields);
  follow("routing", state, {}, changed);
}

export function writeSampling(state, first, changed) {
  const fields = Object.entries(MEANINGS).map(([name, meaning]) => fieldOf("sampling", name, meaning, null, ""));
  byId("sampling-fields").replaceChildren(...fields);
  follow("sampling", state, first, changed);
}

function fieldOf(group, name, meaning, choices, usual) {
  const id = `${group}-${name}`;
  const options = choices?.map((each) => make("option", { value: each, textContent: each }));
  const field = choices
    ? make("select", {}, make("option", { value: "", textContent: `bundle: ${usual}` }), ...options)
    : make("input", { type: "text", inputMode: "decimal", placeholder: usual });
  Object.assign(field, { id, name });
  field.setAttribute("aria-describedby", `${id}-problem ${id}-meaning`);
  const label = make("label", { htmlFor: id, textContent: name.replaceAll("_", " ") });
  const problem = make("p", { className: "error", id: `${id}-problem`, role: "alert", hidden: true });
  return make("div", { className: "field" }, label, field, problem, make("p", { className: "quiet", id: `${id}-meaning` }, meaning));
}

/** Keep a group of fields and the state the same, and say how many differ from what they are at first. */
function follow(group, state, first, changed) {
  const box = byId(group);
  for (const field of byId(`${group}-fields`).querySelectorAll("input, select")) {
    field.value = state[group][field.name] ?? "";
    field.addEventListener("input", () => {
      if (field.value.trim()) state[group][field.name] = field.value.trim();
      else delete state[group][field.name];
      count();
      changed();
    });
  }
  const count = () => {
    const names = new Set([...Object.keys(state[group]), ...Object.keys(first)]);
    const changes = [...names].filter((name) => state[group][name] !== first[name]).length;
    box.querySelector("[data-count]").textContent = changes ? `· ${changes} changed` : "";
  };
  count();
}

/** Fill a select with groups of arms. */
export function writeArms(select, groups, chosen, none) {
  const options = groups.map(({ group, arms }) =>
    make("optgroup", { label: group }, ...arms.map(([value, textContent]) => make("option", { value, textContent }))),
  );
  select.replaceChildren(...(none ? [make("option", { value: "", textContent: none })] : []), ...options);
  select.value = chosen;
}
