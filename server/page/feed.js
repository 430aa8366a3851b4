// What the engine tells of its steps: the stream of events, what is kept of the last minutes, and where in it we look.

import { ask, events } from "./api.js";
import { Lives } from "./lives.js";

const KEPT_SECONDS = 180, MOST_KEPT = 4800;
const RETRY_MS = [250, 500, 1000, 2000, 4000];
const SINGLE_STEPS = 100; // that are told of one by one after a pause

export const KINDS = ["empty", "prefill", "decode", "accepted", "rejected", "padding", "pause"];
const PREFILL = 1, DECODE = 2, ACCEPTED = 3, REJECTED = 4, PADDING = 5, PAUSE = 6;

/** Fields of a row of the batch, by their places. */
export const ROW = { row: 0, id: 1, state: 2, prompt: 3, tokens: 4, most: 5, computed: 6, scheduled: 7, drafted: 8, accepted: 9, cached: 10, preemptions: 11, age: 12 };
export const WAIT = { id: 0, reason: 1, tokens: 2, blocks: 3, preemptions: 4, gaveWayTo: 5, age: 6 };

function kindOf(row) {
  switch (row[ROW.state]) {
    case "prefill": return PREFILL;
    case "padding": return PADDING;
    case "pause": return PAUSE;
    default: return row[ROW.drafted] === 0 ? DECODE : row[ROW.accepted] > 0 ? ACCEPTED : REJECTED;
  }
}

export class Feed extends EventTarget {
  constructor() {
    super();
    this.numKept = 0;
    this.entries = []; // what is kept, the oldest first; the step itself stays JSON, which takes a tenth of the memory
    this.lives = new Lives();
    this.limits = null;
    this.numEngines = 0;
    this.isAlive = false;
    this.state = "off"; // or "connecting", "live", "refused"
    this.problem = "";
    this.paused = null; // the entry that is looked at, while the view stands still
    this.experts = null;
    this.tables = new Map(); // block tables by request
    this.lastId = "";
    this.controller = null;
    this.parsed = [null, null];
  }

  /** Begin to watch, or end it. */
  watch(isOn) {
    if (isOn === (this.controller !== null)) return;
    if (!isOn) {
      this.controller.abort();
      this.controller = null;
      this.tell("off");
      return;
    }
    this.controller = new AbortController();
    this.follow(this.controller.signal);
  }

  async follow(signal) {
    for (let failures = 0; !signal.aborted;) {
      this.tell(this.entries.length ? this.state : "connecting");
      try {
        const answer = await ask("v1/engine/events", { signal, headers: this.lastId ? { "last-event-id": this.lastId } : {} });
        failures = 0;
        this.tell("live");
        for await (const event of events(answer)) this.take(event);
        this.problem = "The server ended the stream.";
      } catch (error) {
        if (signal.aborted) return;
        this.problem = error.message;
        if (error.status === 401 || error.status === 404) {
          this.tell("refused");
          this.controller = null;
          return;
        }
      }
      this.isAlive = false;
      this.tell("connecting");
      await new Promise((done) => { setTimeout(done, RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]); });
    }
  }

  tell(state) {
    this.state = state;
    this.dispatchEvent(new Event("change"));
  }

  take({ event, data, id }) {
    if (id) this.lastId = id;
    if (event === "snapshot") {
      const snapshot = JSON.parse(data);
      this.limits = snapshot.limits ?? this.limits;
      this.isAlive = snapshot.limits !== null;
      if (this.numEngines !== snapshot.num_engines) this.begin(snapshot);
    } else if (event === "lost") {
      this.isAlive = false;
      this.lives.lose(JSON.parse(data).at);
    } else if (event === "step") {
      const told = JSON.parse(data);
      this.isAlive = true;
      this.keep(told, data);
    }
    this.dispatchEvent(new Event("change"));
  }

  /** Another engine: its steps count from 0, and nothing is in its cache. */
  begin({ num_engines: numEngines }) {
    this.numEngines = numEngines;
    this.experts = null;
    this.tables.clear();
  }

  keep({ at, engine, step }, raw) {
    const rows = new Uint8Array(step.batch.reduce((most, row) => Math.max(most, row[ROW.row] + 1), 0));
    for (const row of step.batch) rows[row[ROW.row]] = kindOf(row);
    const parts = step.parts, accepted = step.num_accepted_tokens_per_pos;
    this.entries.push({
      at, engine, raw, rows,
      place: this.numKept++,
      number: step.number,
      numSteps: step.num_steps,
      seconds: step.seconds,
      numTokens: step.num_tokens,
      numOutput: step.num_output_tokens,
      parts: parts && Float32Array.of(parts.schedule, parts.build, parts.forward, parts.sample, parts.propose, parts.update, parts.send),
      running: step.batch.length,
      waiting: step.num_waiting,
      owned: step.num_owned_blocks,
      blocks: step.num_blocks,
      drafted: step.num_draft_tokens,
      accepted: accepted.reduce((sum, count) => sum + count, 0),
      perPosition: accepted,
      proposals: step.batch.filter((row) => row[ROW.drafted]).map((row) => [row[ROW.drafted], row[ROW.accepted]]),
      queries: step.num_prefix_queries,
      hits: step.num_prefix_hits,
    });
    this.lives.note(at, step);
    for (const [id, table] of Object.entries(step.tables ?? {})) {
      this.tables.delete(id);
      this.tables.set(id, table);
    }
    while (this.tables.size > 400) this.tables.delete(this.tables.keys().next().value);
    if (step.experts) this.addExperts(step.experts);
    let old = Math.max(this.entries.length - MOST_KEPT, 0);
    while (this.entries[old].at < at - KEPT_SECONDS) old += 1;
    if (old > 200 || (old && this.entries.length > MOST_KEPT)) this.entries.splice(0, old);
  }

  /** The loads of some seconds: older ones fade. */
  addExperts(counts) {
    this.experts ??= counts.map((layer) => layer.map(() => 0));
    if (counts.some((layer) => layer.some((count) => count))) {
      counts.forEach((layer, l) => layer.forEach((count, e) => { this.experts[l][e] = 0.8 * this.experts[l][e] + count; }));
    }
  }

  // -- where we look -----------------------------------------------------------------------------------------------

  /** The place of the entry that is looked at; -1 if there is none. */
  get at() {
    if (!this.paused) return this.entries.length - 1;
    return Math.max(this.paused.place - this.entries[0].place, 0);
  }

  /** The step of an entry in full. */
  step(entry) {
    if (this.parsed[0] !== entry) this.parsed = [entry, JSON.parse(entry.raw).step];
    return this.parsed[1];
  }

  pause() {
    if (this.paused || !this.entries.length) return;
    this.paused = this.entries.at(-1);
    ask("v1/engine/steps", { body: { num_steps: SINGLE_STEPS } }).catch(() => {});
    this.dispatchEvent(new Event("change"));
  }

  resume() {
    this.paused = null;
    this.dispatchEvent(new Event("change"));
  }

  /** Look at the entry at this place. */
  look(at) {
    if (!this.entries.length) return;
    this.pause();
    this.paused = this.entries[Math.min(Math.max(at, 0), this.entries.length - 1)];
    this.dispatchEvent(new Event("change"));
  }

  /** Look at what was at this time. */
  lookAt(time) {
    const at = this.entries.findIndex((entry) => entry.at >= time);
    if (at >= 0) this.look(at);
  }

  /** Sums over the entries of the last seconds before the one that is looked at. */
  recent(seconds = 1) {
    const sums = { seconds: 0, steps: 0, tokens: 0, output: 0, drafted: 0, accepted: 0, queries: 0, hits: 0, parts: new Float64Array(7), measured: 0 };
    const last = this.entries[this.at];
    for (let at = this.at; at >= 0 && this.entries[at].at > last.at - seconds; at -= 1) {
      const entry = this.entries[at];
      sums.seconds += entry.seconds;
      sums.steps += entry.numSteps;
      sums.tokens += entry.numTokens;
      sums.output += entry.numOutput;
      sums.drafted += entry.drafted;
      sums.accepted += entry.accepted;
      sums.queries += entry.queries;
      sums.hits += entry.hits;
      if (entry.parts) {
        sums.measured += 1;
        entry.parts.forEach((part, index) => { sums.parts[index] += part; });
      }
    }
    return sums;
  }
}
