// One arm's answer: its tokens in the colours of their blends, their weights as a chart, and how it went.

import { ServerError } from "./api.js";
import { BASE, baseShare, colour, LEAST, leading, line, mix } from "./colours.js";
import { byId, make, say, show } from "./dom.js";
import { placeProblems } from "./problems.js";
import { hideInspector, inspect, swatch } from "./inspector.js";
import { WeightsChart } from "./weights-chart.js";

const STEPS = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };

const CHANGE = 0.01; // of a weight: less is no change to draw

export class Column {
  constructor(adapters) {
    this.adapters = adapters; // names of all, whose order gives the colours
    this.root = byId("column").content.firstElementChild.cloneNode(true);
    const part = (selector) => this.root.querySelector(selector);
    [this.title, this.meta, this.error] = [part("h2"), part(".meta"), part(".error")];
    [this.text, this.legend, this.canvas] = [part(".text"), part(".legend"), part("canvas")];
    [this.prompt, this.note] = [part("details"), part(".note")];
    this.tokens = [];
    this.current = 0; // index of the token that the keyboard is on
    this.#listen();
  }

  /** Ask for an answer and show it as it comes; return "done", "stopped" or "failed". */
  async run(client, { path, body }, label, signal) {
    this.title.textContent = label;
    this.text.setAttribute("aria-label", `${label}: the text. Arrow keys go from token to token.`);
    this.text.setAttribute("aria-busy", "true");
    this.started = performance.now();
    const clock = setInterval(() => this.#tell(), 200);
    this.#tell();
    let outcome = "done";
    try {
      for await (const document of client.stream(path, body, signal)) this.#read(document);
    } catch (error) {
      outcome = error.name === "AbortError" ? "stopped" : "failed";
      if (outcome === "failed") say(this.error, placeProblems(error.message));
      if (outcome === "failed" && !(error instanceof ServerError)) console.error(error);
    }
    clearInterval(clock);
    this.text.setAttribute("aria-busy", "false");
    this.#sumUp(outcome);
    return outcome;
  }

  restyle() {
    this.chart?.restyle();
  }

  close() {
    hideInspector();
    this.chart?.chart.destroy();
    this.root.remove();
  }

  get numAnswered() {
    return this.tokens.filter((token) => !token.isPrompt).length;
  }

  /** Say how far the answer is. */
  #tell(end = null) {
    const seconds = ((performance.now() - this.started) / 1000).toFixed(1);
    const count = this.numAnswered;
    const progress = count || end !== null ? `${count} ${count === 1 ? "token" : "tokens"}` : "waiting for the first token";
    this.meta.textContent = `${progress} · ${seconds} s${end ?? ""}`;
  }

  #read(document) {
    const [choice] = document.choices;
    this.reason = choice?.finish_reason ?? this.reason;
    if (!choice?.treadle) return;
    const trace = choice.treadle;
    if (!this.tokens.length) this.#begin(trace);
    trace.tokens.forEach((text, i) => {
      const isPrompt = i < (trace.prompt_tokens ?? 0);
      const [weights, cosines, scores] = [trace.weights[i], trace.cosines[i], trace.scores[i]];
      this.#add({ text, isPrompt, weights, cosines, scores });
    });
  }

  /** The first tokens tell which adapters take part. */
  #begin({ adapters, prompt_tokens: promptTokens }) {
    this.names = adapters;
    this.places = adapters.map((name) => this.adapters.indexOf(name));
    show(this.prompt, promptTokens);
    this.prompt.firstElementChild.textContent = `Prompt · ${promptTokens} tokens`;
    this.chart ??= new WeightsChart(this.canvas, (index) => this.#point(index));
    this.chart.start(this.names, this.places);
    this.chart.promptTokens = promptTokens ?? 0;
  }

  #add(values) {
    const index = this.tokens.length;
    const element = make("span", { textContent: values.text, className: values.isPrompt ? "token read" : "token" });
    element.dataset.index = index;
    element.tabIndex = -1;
    element.style.setProperty("--blend", mix(values.weights, this.places));
    const lead = leading(values.weights);
    if (lead >= 0) {
      element.style.setProperty("--colour", colour(this.places[lead]));
      element.style.setProperty("--line", line(this.places[lead]));
    }
    this.tokens.push({ ...values, index, element, names: this.names, places: this.places });
    (values.isPrompt ? this.prompt : this.text).append(element);
    this.chart.add(values.weights);
    const first = this.tokens[0].weights;
    if (values.weights.some((weight, i) => Math.abs(weight - first[i]) > CHANGE)) show(this.canvas.parentElement, true);
    if (!values.isPrompt && this.numAnswered === 1) this.#moveStop(index);
  }

  /** Say how long it took, and each adapter's mean weight over the answer, and the base's. */
  #sumUp(outcome) {
    const isCut = outcome === "done" && this.reason === "length";
    this.#tell(isCut ? " · cut: max tokens" : outcome === "done" ? "" : ` · ${outcome}`);
    const answer = this.tokens.filter((token) => !token.isPrompt);
    const isBlank = outcome === "done" && !answer.some((token) => token.text.trim());
    say(this.note, isBlank ? "The model ended its answer at once. Try other words, or another way to send it." : "");
    if (!answer.length) return;
    const mean = (valueOf) => answer.reduce((sum, token) => sum + valueOf(token.weights), 0) / answer.length;
    const acting = this.names
      .map((name, i) => ({ name, place: this.places[i], share: mean((weights) => weights[i]) }))
      .filter(({ share }) => share >= LEAST);
    const base = { name: "base", place: BASE, share: mean(baseShare) };
    if (acting.length && base.share >= LEAST) acting.push(base);
    const entries = acting.map(({ name, share }) => `${name} ${Math.round(100 * share)} %`);
    const items = acting.map(({ place }, entry) => make("li", {}, swatch(place), entries[entry]));
    const words = acting.length ? "Mean over the answer:" : "No adapter acts.";
    this.legend.replaceChildren(make("li", { className: "quiet", textContent: words }), ...items);
    if (acting.length) {
      const numBase = answer.filter(({ weights }) => baseShare(weights) >= Math.max(...weights)).length;
      const leads = `The base leads ${numBase} of ${answer.length} tokens.`;
      this.legend.append(make("li", { className: "quiet", textContent: leads }));
    }
    const summary = acting.length ? `${words} ${entries.join(", ")}.` : words;
    this.canvas.setAttribute("aria-label", `Weights of the adapters over ${this.tokens.length} tokens. ${summary}`);
  }

  #listen() {
    const tokenOf = (event) => this.tokens[event.target.dataset?.index];
    this.text.addEventListener("mouseover", (event) => tokenOf(event) && this.#look(tokenOf(event)));
    this.text.addEventListener("mouseleave", () => this.#lookAway());
    this.text.addEventListener("focusin", (event) => tokenOf(event) && this.#step(tokenOf(event).index));
    this.text.addEventListener("focusout", () => this.#lookAway());
    this.text.addEventListener("keydown", (event) => this.#onKey(event));
    this.canvas.addEventListener("mouseleave", () => this.#lookAway());
  }

  #onKey(event) {
    if (event.key === "Escape") this.#lookAway();
    const step = STEPS[event.key];
    if (!step || !this.tokens.length) return;
    event.preventDefault();
    let next = this.current;
    do next = Math.min(this.tokens.length - 1, Math.max(0, next + step));
    while (!this.tokens[next].text && next > 0 && next < this.tokens.length - 1); // nothing to see there
    if (this.tokens[next].isPrompt) this.prompt.open = true;
    this.tokens[next].element.focus();
  }

  /** Put the keyboard on a token: of all, it alone is reached by Tab. */
  #step(index) {
    this.#moveStop(index);
    this.#look(this.tokens[index]);
  }

  #moveStop(index) {
    this.tokens[this.current].element.tabIndex = -1;
    this.current = index;
    this.tokens[index].element.tabIndex = 0;
  }

  #look(token) {
    this.#lookAway();
    token.element.classList.add("picked");
    token.element.setAttribute("aria-describedby", "inspector");
    this.chart.pick(token.index);
    inspect(token.element.checkVisibility() ? token.element : this.canvas, token); // the prompt may be folded
  }

  #lookAway() {
    const picked = this.text.querySelector(".picked");
    picked?.classList.remove("picked");
    picked?.removeAttribute("aria-describedby");
    this.chart?.pick(-1);
    hideInspector();
  }

  /** The pointer is over a place of the chart. */
  #point(index) {
    if (this.tokens[index] && index !== this.chart.picked) this.#look(this.tokens[index]);
  }
}
