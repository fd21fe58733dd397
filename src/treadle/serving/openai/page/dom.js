// Elements by id, and new ones. Texts are only ever set as text: nothing that a model writes becomes HTML.

export const byId = (id) => document.getElementById(id);

/** Return a new element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function show(element, isShown) {
  element.hidden = !isShown;
}

/** Show a message, or hide the element where there is none. */
export function say(element, message) {
  element.textContent = message;
  show(element, Boolean(message));
}
