// The page as a whole: which view is shown, the theme, the key, and how the server is.

import { get, key } from "./api.js";
import { bytes, number, say } from "./dom.js";
import { EngineView } from "./engine.js";
import { Feed } from "./feed.js";
import { LoadView } from "./load.js";
import { forget, isDark } from "./palette.js";
import { PlanView } from "./plan.js";
import { Playground } from "./playground.js";

const $ = (id) => document.getElementById(id);
const feed = new Feed();
const kinds = { playground: Playground, engine: EngineView, load: LoadView, plan: PlanView };
const views = {}; // those that were looked at
let info = null; // of the server

// -- views -------------------------------------------------------------------------------------------------------------

function show() {
  const name = Object.hasOwn(kinds, location.hash.slice(1)) ? location.hash.slice(1) : "playground";
  if (!views[name]) {
    views[name] = new kinds[name]($(name), feed);
    if (info) tell();
  }
  for (const each of Object.keys(kinds)) $(each).hidden = each !== name;
  for (const [each, view] of Object.entries(views)) view.shown(each === name && !document.hidden);
  for (const link of document.querySelectorAll("header nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  // The engine tells of its steps only while somebody looks.
  feed.watch(["engine", "load"].includes(name) && !document.hidden);
}

addEventListener("hashchange", show);
document.addEventListener("visibilitychange", show);

// -- theme -------------------------------------------------------------------------------------------------------------

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  forget();
  dispatchEvent(new Event("shoal-theme"));
  $("theme").textContent = isDark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
}

$("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  localStorage.setItem("shoal-theme", theme);
  setTheme(theme);
});
setTheme(localStorage.getItem("shoal-theme"));

// -- the key -----------------------------------------------------------------------------------------------------------

$("key").value = key.get();
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  $("key-form").parentElement.open = false;
});

// -- the server ----------------------------------------------------------------------------------------------------------

function tell() {
  dispatchEvent(new CustomEvent("shoal-info", { detail: info }));
}

async function look() {
  const dot = $("state");
  try {
    info = await get("server_info");
    dot.className = "dot up";
    say($("status"), `${info.model} · ${number(info.num_parameters / 1e6)} M parameters · ${info.backend} · ${bytes(info.kv_cache_bytes)} of KV cache`);
    tell();
    return true;
  } catch (error) {
    dot.className = "dot down";
    say($("status"), error.status === 401 ? "This server asks for a key" : error.status === 503 ? "The engine is starting" : error.status ? error.message : "The server does not answer");
    if (error.status === 401) $("key-form").parentElement.open = true;
    return false;
  }
}

let timer = 0;
async function keepLooking() {
  clearTimeout(timer);
  const isUp = await look();
  timer = setTimeout(keepLooking, isUp ? 15_000 : 1500);
}

addEventListener("shoal-key", () => {
  keepLooking();
  feed.watch(false);
  show();
});
show();
keepLooking();
