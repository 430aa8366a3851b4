// How the page speaks with the server that it came from.

const KEY = "shoal-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => { sessionStorage.setItem(KEY, value); dispatchEvent(new Event("shoal-key")); },
};

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Asks the server; what it refuses is thrown in its words. */
export async function ask(path, { method, body, signal, headers = {} } = {}) {
  const all = { ...headers };
  if (key.get()) all.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) all["content-type"] = "application/json";
  const answer = await fetch(new URL(path, document.baseURI), {
    method: method ?? (body === undefined ? "GET" : "POST"),
    headers: all,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
  });
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new ApiError(answer.status, told.error?.message ?? `${answer.status} ${answer.statusText}`);
  }
  return answer;
}

export async function get(path, options) {
  const answer = await ask(path, options);
  return answer.json();
}

/** The server-sent events of an answer, as they come. */
export async function* events(answer) {
  const decoder = new TextDecoder();
  let rest = "";
  for (let reader = answer.body.getReader(), part; !(part = await reader.read()).done;) {
    const blocks = (rest + decoder.decode(part.value, { stream: true })).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const found = { event: "message", data: "", id: undefined };
      for (const line of block.split("\n")) {
        const at = line.indexOf(": ");
        if (at > 0) found[line.slice(0, at)] = line.slice(at + 2);
      }
      if (found.data) yield found;
    }
  }
}
