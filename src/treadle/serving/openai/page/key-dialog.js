// Asks for the API key, which is kept for this tab only.

import { key } from "./api.js";
import { byId, say, show } from "./dom.js";

let asked = null; // the question that is open: several requests may wait for one answer

/** Ask for a key, with what was wrong with the last one; resolves to whether one was given. */
export function askKey(problem = "") {
  asked ??= ask(problem).finally(() => {
    asked = null;
  });
  return asked;
}

function ask(problem) {
  const [dialog, field] = [byId("key-dialog"), byId("key")];
  say(byId("key-problem"), problem);
  byId("key-cancel").textContent = key.get() && !problem ? "Keep the key in use" : "Go on without a key";
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const isGiven = dialog.returnValue === "given";
      if (isGiven) key.set(field.value.trim());
      field.value = "";
      show(byId("key-button"), true);
      resolve(isGiven);
    }, { once: true });
  });
}

/** Let the dialog's buttons work; `onNew()` is called when a person gives another key unasked. */
export function listenForKey(onNew) {
  const dialog = byId("key-dialog");
  dialog.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const isPossible = /^[\x21-\x7e]+$/.test(byId("key").value.trim()); // others cannot even be sent
    if (isPossible) dialog.close("given");
    else say(byId("key-problem"), "A key has letters, digits and signs of ASCII, and no spaces.");
  });
  byId("key-cancel").addEventListener("click", () => dialog.close(""));
  byId("key-button").addEventListener("click", async () => (await askKey()) && onNew());
  show(byId("key-button"), Boolean(key.get()));
}
