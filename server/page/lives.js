// The lives of requests, as the events tell them: when each waited and why, was computed, was preempted, and ended.

const MOST = 400; // that are remembered

export class Lives {
  constructor() {
    this.all = new Map(); // by id, in the order in which they were first heard of
    this.open = new Set(); // ids of those that have not ended
    this.last = 0;
  }

  /** Take in an event. */
  note(at, step) {
    const heard = new Set(), since = this.last && at - this.last < 5 ? this.last : at - step.seconds;
    const left = new Set(step.left);
    for (const row of step.batch) {
      const life = this.of(row[1], at, row[12]);
      [life.row, life.prompt, life.tokens, life.most, life.cached] = [row[0], row[3], row[4], row[5], row[10]];
      this.extend(life, row[2], since, at);
      heard.add(row[1]);
    }
    for (const [id, reason, , blocks, preemptions, gaveWayTo, age] of step.waiting) {
      const life = this.of(id, at, age);
      this.extend(life, preemptions ? `again-${reason}` : `wait-${reason}`, since, at, { blocks, by: gaveWayTo });
      heard.add(id);
    }
    for (const [id, by] of Object.entries(step.preempted)) this.all.get(id)?.preemptions.push({ at, by });
    const isWhole = step.num_waiting <= step.waiting.length;
    for (const id of this.open) {
      if (left.has(id) || (isWhole && !heard.has(id))) {
        this.all.get(id).ended = at;
        this.open.delete(id);
      }
    }
    for (const [id] of this.all) {
      if (this.all.size <= MOST) break;
      this.all.delete(id);
      this.open.delete(id);
    }
    this.last = at;
  }

  /** The engine died: all wait for the next one. */
  lose(at) {
    for (const id of this.open) this.extend(this.all.get(id), "lost", this.last, at);
    this.last = at;
  }

  of(id, at, age) {
    let life = this.all.get(id);
    if (!life) {
      life = { id, arrived: at - age, ended: null, segments: [], preemptions: [], row: null, prompt: 0, tokens: 0, most: 0, cached: 0 };
      this.all.set(id, life);
      this.open.add(id);
    }
    if (life.ended) { // it goes on in another engine
      life.ended = null;
      this.open.add(id);
    }
    return life;
  }

  extend(life, state, since, at, more) {
    const segment = life.segments.at(-1), from = segment ? segment.to : Math.max(life.arrived, Math.min(since, at));
    if (segment?.state === state) segment.to = at;
    else life.segments.push({ state, from, to: at, ...more });
  }
}
