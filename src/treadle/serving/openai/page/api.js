// Requests to the server that sent this page: the key, errors as the server words them, and streams.

const KEY = "treadle-key";
const BROKEN_OFF = "The connection to the server broke off. What had come stays, and so does your prompt.";

/** A request that failed. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** Speaks to the server; `askKey(message)` resolves to whether there is another key to try. */
export class Client {
  constructor(askKey) {
    this.askKey = askKey;
  }

  /** Return the JSON of a GET, or of a POST where there is a body. */
  async json(path, body) {
    return (await this.#request(path, body)).json();
  }

  /** Yield the documents of a stream of server-sent events. */
  async *stream(path, body, signal) {
    const response = await this.#request(path, body, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read().catch(brokenOff);
      if (done) throw new ServerError(BROKEN_OFF);
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue; // a comment: the stream lives
        const data = event.slice("data: ".length);
        if (data === "[DONE]") return;
        const document = JSON.parse(data);
        if (document.error) throw new ServerError(document.error.message);
        yield document;
      }
    }
  }

  async #request(path, body, signal) {
    for (;;) {
      const sent = key.get();
      const response = await reach(path, body, sent, signal);
      if (response.ok) return response;
      const error = await errorOf(response);
      if (response.status !== 401) throw error;
      const isAnother = key.get() !== sent; // given meanwhile, for another request
      if (!isAnother && !(await this.askKey(sent ? "The server does not know this key." : ""))) {
        throw new ServerError("The server answers only with a key that it knows. “API key”, at the top, asks again.", 401);
      }
    }
  }
}

function brokenOff(error) {
  throw error.name === "AbortError" ? error : new ServerError(BROKEN_OFF);
}

async function reach(path, body, sent, signal) {
  const headers = { ...(sent && { Authorization: `Bearer ${sent}` }), ...(body && { "Content-Type": "application/json" }) };
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it running? Your prompt is still here.");
  }
}

async function errorOf(response) {
  const text = await response.text();
  let message = `The server answered with status ${response.status}.`;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // not the server's own words: a proxy's, perhaps
  }
  const seconds = response.headers.get("Retry-After");
  const isSaid = /again in/i.test(message);
  return new ServerError(seconds && !isSaid ? `${message} Try again in ${seconds} s.` : message, response.status);
}
