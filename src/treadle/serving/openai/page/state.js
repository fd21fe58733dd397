// What the page asks for, and the same as the address's fragment. The API key is never part of it.

export const SAMPLING = { max_tokens: "128", temperature: "0" };

export const empty = () => ({
  prompt: "",
  arm: "auto",
  other: "base",
  kind: "",
  off: [],
  fixed: {},
  routing: {},
  sampling: { ...SAMPLING },
});

const PLAIN = ["prompt", "arm", "other", "kind"];
const GROUPS = ["fixed", "routing", "sampling"];

/** Return the fragment of a state; what is as at first is left out. */
export function toFragment(state) {
  const first = empty();
  const found = new URLSearchParams();
  PLAIN.filter((name) => state[name] !== first[name]).forEach((name) => found.set(name, state[name]));
  state.off.forEach((name) => found.append("off", name));
  for (const group of GROUPS) {
    for (const [name, value] of Object.entries(state[group])) {
      if (value !== first[group][name]) found.set(`${group}.${name}`, value);
    }
  }
  return found.toString();
}

/** Return the state of a fragment. */
export function fromFragment(text) {
  const state = empty();
  for (const [name, value] of new URLSearchParams(text.replace(/^#/, ""))) {
    const [group, ...rest] = name.split(".");
    if (PLAIN.includes(name)) state[name] = value;
    else if (name === "off") state.off.push(value);
    else if (GROUPS.includes(group) && rest.length) state[group][rest.join(".")] = value;
  }
  return state;
}
