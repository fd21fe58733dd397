// The arms: who may answer a prompt, and what is asked of the server for each.

const FIXED_KEEPS = ["combine"]; // of the routing options, what fixed weights still use

/** Return [{group, arms: [[id, label]]}] of a server's adapters. */
export function armGroups(adapters) {
  return [
    {
      group: "Blends",
      arms: [
        ["auto", "Token-level routing"],
        ["prompt", "Prompt-level routing"],
        ["fixed", "Fixed weights"],
      ],
    },
    { group: "Alone", arms: [...adapters.map((name) => [`one:${name}`, `${name} alone`]), ["base", "Base model"]] },
  ];
}

/** Return the path and the body of the request that an arm is. */
export function requestOf(state, arm, adapters, kind) {
  const treadle = { ...routingOf(state, arm, adapters), trace: true };
  const body = { model: modelOf(arm), treadle, stream: true, ...numbers(state.sampling) };
  if (kind === "chat") {
    const messages = [{ role: "user", content: state.prompt }];
    return { path: "v1/chat/completions", body: { ...body, messages } };
  }
  return { path: "v1/completions", body: { ...body, prompt: state.prompt, echo: true } };
}

function modelOf(arm) {
  if (arm === "base") return "base";
  return arm.startsWith("one:") ? arm.slice("one:".length) : "auto";
}

function routingOf(state, arm, adapters) {
  if (modelOf(arm) !== "auto") return {};
  const present = adapters.filter((name) => !state.off.includes(name));
  if (arm === "fixed") {
    const kept = Object.entries(state.routing).filter(([name]) => FIXED_KEEPS.includes(name));
    return { ...Object.fromEntries(kept), fixed: fixedWeights(state, present) };
  }
  const some = present.length < adapters.length ? { adapters: present } : {};
  const once = arm === "prompt" ? { every: null, prefill: "prompt" } : {};
  return { ...numbers(state.routing), ...some, ...once };
}

/** Return the weight of each adapter that is present; where none was given, an equal share. */
export function fixedWeights(state, present) {
  const share = Number((1 / present.length).toFixed(3));
  return Object.fromEntries(present.map((name) => [name, number(state.fixed[name] ?? share)]));
}

function numbers(fields) {
  return Object.fromEntries(Object.entries(fields).map(([name, text]) => [name, number(text)]));
}

/** Return a field's text as a number where it is one; the server says what is wrong with anything else. */
function number(text) {
  return text !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}
