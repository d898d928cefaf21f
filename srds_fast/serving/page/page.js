// The page of the server: sends a prompt, shows the previews as they come, then the image and what it took.
"use strict";

const at = (id) => document.getElementById(id);
let leaving = null; // ends the request under way

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").className = wrong ? "wrong" : "";
}

function choices(select, values) {
  select.replaceChildren(...values.map((value) => new Option(value, value)));
}

async function begin() {
  const known = await (await fetch("settings.json")).json();
  at("model").textContent = known.models.join(", ");
  choices(at("steps"), known.steps);
  choices(at("size"), ["auto", ...known.sizes]);
  at("previews").max = known.partial_images;
  at("previews").value = known.partial_images;
  at("key-label").hidden = !known.asks_for_key;
}

function show(png, caption, final) {
  const figure = document.createElement("figure");
  const image = new Image();
  const text = document.createElement("figcaption");
  image.src = `data:image/png;base64,${png}`;
  image.alt = caption;
  text.textContent = caption;
  figure.append(image, text);
  figure.className = final ? "final" : "";
  at("images").append(figure);
}

function tell(usage) {
  const rows = [
    ["time", `${usage.seconds.toFixed(2)} s, ${usage.queued_seconds.toFixed(2)} s of it waiting`],
    ["waves", `${usage.waves} batched network calls, ${usage.rows} rows`],
    ["plan", usage.plan],
  ];
  if (usage.fallback) rows.push(["fallback", usage.fallback]);
  if (usage.batch > 1) rows.push(["batch", `${usage.batch} requests shared the call`]);
  at("usage").replaceChildren(...rows.flatMap(([name, value]) => {
    const term = document.createElement("dt");
    const told = document.createElement("dd");
    term.textContent = name;
    told.textContent = value;
    return [term, told];
  }));
}

function request() {
  const asked = { prompt: at("prompt").value, steps: Number(at("steps").value), size: at("size").value, stream: true };
  asked.partial_images = Number(at("previews").value);
  if (at("seed").value !== "") asked.seed = Number(at("seed").value);
  const headers = { "Content-Type": "application/json" };
  if (at("key").value !== "") headers.Authorization = `Bearer ${at("key").value}`;
  leaving = new AbortController();
  const body = JSON.stringify(asked);
  return fetch("v1/images/generations", { method: "POST", headers, body, signal: leaving.signal });
}

// Gives the data of each server-sent event.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice("data: ".length));
    }
  }
}

async function draw() {
  const begun = performance.now();
  const seconds = () => `${((performance.now() - begun) / 1000).toFixed(2)} s`;
  say("Drawing.");
  at("images").replaceChildren();
  at("usage").replaceChildren();
  const response = await request();
  if (!response.ok) throw new Error((await response.json()).error.message);
  let complete = false;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    complete = event.type === "image_generation.completed";
    const name = complete ? "image" : `preview ${event.partial_image_index + 1}`;
    show(event.b64_json, `${name}, ${seconds()}`, complete);
    if (complete) tell(event.usage);
  }
  if (!complete) throw new Error("The connection was closed before the image came.");
  say(`Done in ${seconds()}.`);
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("draw").disabled = true;
  at("stop").disabled = false;
  try {
    await draw();
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  } finally {
    at("draw").disabled = false;
    at("stop").disabled = true;
  }
});
at("stop").addEventListener("click", () => leaving.abort());
begin().catch((error) => say(error.message, true));
