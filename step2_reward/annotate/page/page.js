"use strict";

// Shows one pair after the other. The next pair comes when the answer is on disk; requests are retried until then.
const RETRY = 1000; // milliseconds
const address = new URL(location.href);
const token = address.searchParams.get("token");
let rater = address.searchParams.get("rater");
let shown = null; // id of the pair on the page
let strength = null;
let isBusy = false; // while an answer is being sent; keys pressed meanwhile would count for the next pair

const find = (id) => document.getElementById(id);
const buttons = document.querySelectorAll("[data-key]");
const isFinished = () => shown === null; // all pairs are answered

function say(text, isAlarm = false) {
  find("status").textContent = text;
  find("status").classList.toggle("alarm", isAlarm);
}

// Returns the server's reply, or null when it refuses. Each click has an id, so that a retry counts once.
async function post(action, fields) {
  const click = Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");
  const body = JSON.stringify({ token, rater, click, ...fields });
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body };
  for (;;) {
    let problem = "the server does not respond";
    try {
      const reply = await fetch(action, request);
      if (reply.ok) return await reply.json();
      problem = await reply.text();
      if (reply.status < 500) {
        say(problem, true);
        return null;
      }
    } catch {
      // no connection
    }
    say(`Not saved yet: ${problem}. Trying again; keep this page open.`, true);
    await new Promise((resolve) => setTimeout(resolve, RETRY));
  }
}

async function act(action, fields = {}) {
  if (isBusy) return;
  setBusy(true);
  const state = await post(action, fields);
  setBusy(false);
  if (state) show(state);
  else if (document.querySelector("footer").hidden) find("sign-in").hidden = false;
}

function setBusy(value) {
  isBusy = value;
  for (const button of buttons) button.disabled = value || (isFinished() && button.dataset.key !== "u");
}

// Model texts are inserted as text, never as markup.
function fill(box, turns) {
  box.replaceChildren();
  for (const { role, text } of turns) {
    if (role) box.append(Object.assign(document.createElement("h3"), { textContent: role }));
    box.append(Object.assign(document.createElement("p"), { textContent: text, dir: "auto" }));
  }
}

function show(state) {
  const isSame = shown !== null && shown === state.pair?.id;
  shown = state.pair?.id ?? null;
  rater = state.rater;
  address.searchParams.set("rater", rater);
  history.replaceState(null, "", address);
  find("rater").textContent = rater;
  find("count").textContent = `${state.done} of ${state.total}`;
  Object.assign(find("progress"), { max: state.total, value: state.done });
  find("sign-in").hidden = true;
  document.querySelector("footer").hidden = false;
  find("pair").hidden = isFinished();
  find("finished").hidden = !isFinished();
  find("finished").textContent = `All ${state.total} pairs are answered, ${state.skipped} of them skipped. Thank you!`;
  if (!isSame) setStrength(null);
  if (!isFinished() && !isSame) {
    for (const part of ["prompt", "left", "right"]) fill(find(part), state.pair[part]);
    for (const side of ["left", "right"]) find(`${side}-cut`).hidden = !state.pair[`${side}Cut`];
    scrollTo(0, 0);
    find("prompt").scrollTop = find("prompt").scrollHeight; // show the last message of a long conversation
  }
  setBusy(false);
  say(state.notice);
}

function setStrength(value) {
  strength = value;
  for (const number of [1, 2, 3]) {
    document.querySelector(`[data-key="${number}"]`).setAttribute("aria-pressed", String(strength === number));
  }
}

function press(key) {
  if (isBusy || !rater || find("sign-in").hidden === false) return;
  if (key === "u") act("undo");
  if (isFinished()) return;
  if ("123".includes(key)) setStrength(strength === Number(key) ? null : Number(key));
  if (key === "a") act("answer", { pair: shown, side: "left", strength });
  if (key === "b") act("answer", { pair: shown, side: "right", strength });
  if (key === "t") act("answer", { pair: shown, side: "tie" });
  if (key === "s") act("answer", { pair: shown, side: "skip" });
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    button.blur(); // so that the space bar scrolls instead of pressing it again
    press(button.dataset.key);
  });
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const arrows = { ArrowLeft: "a", ArrowRight: "b" };
  const letter = event.key > "\x7f" ? event.code.replace("Key", "") : event.key; // keyboards without A to Z
  const key = arrows[event.key] ?? letter.toLowerCase();
  if (document.querySelector(`[data-key="${CSS.escape(key)}"]`) && event.target !== find("name")) {
    event.preventDefault();
    press(key);
  }
});

// Refresh: another tab may have answered more pairs.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && rater && find("sign-in").hidden) act("next");
});

find("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = find("name").value;
  act("next");
});

if (rater) {
  act("next");
} else {
  find("sign-in").hidden = false;
  find("name").focus();
}
