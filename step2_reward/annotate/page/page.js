"use strict";

// One pair after the other. The page moves on when the answer is on disk, and asks again until it is.
const RETRY = 1000; // milliseconds
const address = new URL(location.href);
const token = address.searchParams.get("token");
let rater = address.searchParams.get("rater");
let shown = null; // id of the pair on the page
let strength = null;
let isBusy = false; // an answer is on its way; whatever is pressed meanwhile would be for a pair not yet read

const find = (id) => document.getElementById(id);
const buttons = document.querySelectorAll("[data-key]");
const isDecided = () => shown === null; // nothing is left to answer

function say(text, isAlarm = false) {
  find("status").textContent = text;
  find("status").classList.toggle("alarm", isAlarm);
}

// What the server answers; null when it refuses. A click has a name, so that asking again counts it once.
async function post(action, fields) {
  const click = Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");
  const body = JSON.stringify({ token, rater, click, ...fields });
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body };
  for (;;) {
    let problem = "the program that serves this page does not answer";
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
  for (const button of buttons) button.disabled = value || (isDecided() && button.dataset.key !== "u");
}

// Texts of models are text: they are never read as markup.
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
  find("pair").hidden = isDecided();
  find("finished").hidden = !isDecided();
  find("finished").textContent = `All ${state.total} pairs are answered, ${state.skipped} of them skipped. Thank you!`;
  if (!isSame) setStrength(null);
  if (!isDecided() && !isSame) {
    for (const part of ["prompt", "left", "right"]) fill(find(part), state.pair[part]);
    for (const side of ["left", "right"]) find(`${side}-cut`).hidden = !state.pair[`${side}Cut`];
    scrollTo(0, 0);
    find("prompt").scrollTop = find("prompt").scrollHeight; // the last message of a long conversation
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
  if (isDecided()) return;
  if ("123".includes(key)) setStrength(strength === Number(key) ? null : Number(key));
  if (key === "a") act("answer", { pair: shown, side: "left", strength });
  if (key === "b") act("answer", { pair: shown, side: "right", strength });
  if (key === "t") act("answer", { pair: shown, side: "tie" });
  if (key === "s") act("answer", { pair: shown, side: "skip" });
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    button.blur(); // so that the space bar scrolls, and does not press it again
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

// Another tab may have gone on.
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
