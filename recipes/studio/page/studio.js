/** The page: a form, a picture that emerges, two of them compared, and what was drawn before. */
import { entries, forgetAll, keep } from "./history.js";

const $ = (id) => document.getElementById(id);
const SIDES = [0, 1];
const NAMES = ["A", "B"];
const FIELDS = ["prompt", "seed", "width", "height", "steps", "model"];
const FORM_KEY = "flux-recipes-form";

/** What there is to choose from. */
const offer = await (await fetch("/api/offer")).json();
/** Stops the job of this page; undefined where there is none. */
let running;
/** URLs of the pictures in the list of history. */
let thumbnails = [];

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

// -- the form --

function recipeBoxes(side) {
  return [...$(`recipes-${side}`).querySelectorAll("input")];
}

function chosenRecipes(side) {
  return recipeBoxes(side).filter((box) => box.checked).map((box) => box.value);
}

function fillForm() {
  $("device").textContent = offer.device;
  $("model").append(...offer.models.map(({ name }) => element("option", { value: name, textContent: name })));
  for (const side of SIDES) {
    for (const { name, exact, usual } of offer.recipes) {
      // B begins with what nothing was done to, so that there is something to compare.
      const checked = side === 0 ? usual : name === "01_bfloat16";
      const box = element("input", { type: "checkbox", value: name, checked });
      box.addEventListener("change", () => keepNeeds(side, box));
      $(`recipes-${side}`).append(
        element("label", {}, box, name, element("small", { textContent: exact ? "" : "lossy" })),
      );
    }
  }
  $("model").addEventListener("change", useModelSize);
  useModelSize();
  $("prompt").value = "A cat playing with a ball of yarn";
  $("seed").value = "42";
}

function useModelSize() {
  const model = offer.models.find(({ name }) => name === $("model").value);
  if (model === undefined) return;
  $("width").value = model.width;
  $("height").value = model.height;
}

/** A recipe brings what it builds on, and goes with it. */
function keepNeeds(side, changed) {
  const boxes = new Map(recipeBoxes(side).map((box) => [box.value, box]));
  const needsOf = (name) => offer.recipes.find((recipe) => recipe.name === name).needs;
  const bring = (name) => {
    for (const needed of needsOf(name)) {
      const box = boxes.get(needed);
      if (box !== undefined && !box.checked) {
        box.checked = true;
        bring(needed);
      }
    }
  };
  const take = (name) => {
    for (const [other, box] of boxes) {
      if (box.checked && needsOf(other).includes(name)) {
        box.checked = false;
        take(other);
      }
    }
  };
  (changed.checked ? bring : take)(changed.value);
}

function showComparing() {
  const comparing = $("compare").checked;
  $("recipes-1").hidden = !comparing;
  $("recipes-0").querySelector("legend").textContent = comparing ? "Recipes of A" : "Recipes";
}

function formState() {
  return {
    ...Object.fromEntries(FIELDS.map((field) => [field, $(field).value])),
    compare: $("compare").checked,
    recipes: SIDES.map(chosenRecipes),
  };
}

function setForm(state) {
  if (offer.models.some(({ name }) => name === state.model)) $("model").value = state.model;
  for (const field of FIELDS) {
    if (field !== "model" && typeof state[field] === "string") $(field).value = state[field];
  }
  $("compare").checked = state.compare === true;
  for (const side of SIDES) {
    const names = state.recipes?.[side];
    if (Array.isArray(names)) {
      for (const box of recipeBoxes(side)) box.checked = names.includes(box.value);
    }
  }
  showComparing();
}

function saveForm() {
  try {
    localStorage.setItem(FORM_KEY, JSON.stringify(formState()));
  } catch {
    // A browser that keeps nothing can draw all the same.
  }
}

function restoreForm() {
  try {
    const state = JSON.parse(localStorage.getItem(FORM_KEY) ?? "null");
    if (state !== null) setForm(state);
  } catch {
    // What an older page has left is not worth an error.
  }
}

/** Says what is wrong, at the field that the message begins with where it names one. */
function showError(message) {
  $("error").textContent = message;
  for (const field of FIELDS) $(field).removeAttribute("aria-invalid");
  const wrong = FIELDS.find((field) => message.startsWith(`${field}:`) || message.startsWith(`${field} `));
  if (wrong !== undefined) {
    $(wrong).setAttribute("aria-invalid", "true");
    $(wrong).focus();
  }
}

// -- the picture --

function showStage({ width, height, sides }) {
  $("result").style.setProperty("--ratio", String(width / height));
  for (const id of ["picture-1", "divider", "split-label"]) $(id).hidden = sides < 2;
  moveSplit();
}

function moveSplit() {
  $("stage").style.setProperty("--split", `${$("split").value}%`);
}

function showPreview({ side, preview, width, height }) {
  const rgb = bytesOf(preview);
  const pixels = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    pixels.data.set(rgb.subarray(3 * i, 3 * i + 3), 4 * i);
    pixels.data[4 * i + 3] = 255;
  }
  const canvas = $(`picture-${side}`);
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

async function showPicture(side, png, label) {
  const bitmap = await createImageBitmap(png);
  const canvas = $(`picture-${side}`);
  Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  canvas.setAttribute("aria-label", label);
}

function clearPictures() {
  for (const side of SIDES) {
    const canvas = $(`picture-${side}`);
    Object.assign(canvas, { width: 1, height: 1 });
    canvas.setAttribute("aria-label", "No picture");
  }
  $("closeness").textContent = "";
  $("times").hidden = true;
  $("notes").replaceChildren();
}

function milliseconds(value) {
  return `${value.toFixed(value < 10 ? 2 : value < 1000 ? 1 : 0)} ms`;
}

function showTimes(pictures) {
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const megabytes = (bytes) => `${(bytes / 1e6).toFixed(0)} MB`;
  const rows = [
    ["Text encoders", ({ milliseconds: { text } }) => milliseconds(text)],
    ["One step, mean", ({ milliseconds: { steps } }) => milliseconds(sum(steps) / steps.length)],
    [`All ${pictures[0].steps} steps`, ({ milliseconds: { steps } }) => milliseconds(sum(steps))],
    ["Decoder", ({ milliseconds: { decode } }) => milliseconds(decode)],
    ["Together", ({ milliseconds: { text, steps, decode } }) => milliseconds(text + sum(steps) + decode)],
    ["Weights", ({ memory }) => megabytes(memory.weights)],
    ["Activations", ({ memory }) => megabytes(memory.peak)],
  ];
  const heading = pictures.length === 1 ? ["", ""] : ["", ...NAMES];
  const row = (cells, name) =>
    element("tr", {}, ...cells.map((cell, i) => element(i === 0 ? "th" : name, {}, cell)));
  const body = rows.map(([what, value]) => row([what, ...pictures.map(value)], "td"));
  if (pictures.length === 2) $("times").replaceChildren(element("thead", {}, row(heading, "th")));
  else $("times").replaceChildren();
  $("times").append(element("tbody", {}, ...body));
  $("times").hidden = false;
}

function showCloseness(comparison, pictures) {
  const lossy = pictures.some(({ exact }) => !exact) ? " A lossy recipe trades quality for time." : "";
  if (comparison === undefined) return;
  $("closeness").textContent = comparison.equal
    ? "A and B are equal, to the last bit."
    : `PSNR ${comparison.psnr.toFixed(1)} dB, largest error ${comparison.largestError}/255.${lossy}`;
}

/** An entry of the history, or what was drawn just now. */
async function showEntry({ request, pictures, comparison }) {
  clearPictures();
  showStage({ ...pictures[0], sides: pictures.length });
  for (const [side, { png, recipes }] of pictures.entries()) {
    await showPicture(side, png, `${request.prompt}, with ${recipes.join(", ")}`);
  }
  showTimes(pictures);
  showCloseness(comparison, pictures);
}

// -- drawing --

async function* eventsOf(response) {
  let rest = "";
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

function setRunning(controller) {
  running = controller;
  $("draw").disabled = controller !== undefined;
  $("stop").disabled = controller === undefined;
  $("progress").hidden = controller === undefined;
}

async function draw() {
  if (running !== undefined) return;
  const number = (field) => $(field).value.trim() === "" ? 0 : Number($(field).value);
  const configurations = ($("compare").checked ? SIDES : [0]).map(chosenRecipes);
  const request = {
    prompt: $("prompt").value,
    seed: $("seed").value.trim(),
    width: number("width"),
    height: number("height"),
    model: $("model").value,
    configurations,
    ...($("steps").value.trim() === "" && !$("steps").validity.badInput ? {} : { steps: number("steps") }),
  };
  const form = formState();
  showError("");
  const controller = new AbortController();
  setRunning(controller);
  try {
    const response = await fetch("/api/draw", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(request),
      signal: controller.signal,
    });
    if (!response.ok) {
      $("status").textContent = "Not drawn";
      showError((await response.text()).trim());
      return;
    }
    $("result").scrollIntoView({ block: "nearest" }); // in a narrow window it is below the form
    await follow(response, request, form);
  } catch (error) {
    if (controller.signal.aborted) $("status").textContent = "Stopped";
    else {
      $("status").textContent = "Not drawn";
      showError(`The studio does not answer (${error.message}): is its program still running?`);
    }
  } finally {
    setRunning(undefined);
  }
}

async function follow(response, request, form) {
  const sides = request.configurations.length;
  const nameOf = (side) => sides === 1 ? "" : `${NAMES[side]}: `;
  const pictures = [];
  let begun = false;
  for await (const event of eventsOf(response)) {
    if (event.type === "queued") {
      $("status").textContent = event.ahead === 0 ? "Next" : `Waiting, ${event.ahead} before this one`;
    } else if (event.type === "loading") {
      $("status").textContent = `${nameOf(event.side)}loading`;
    } else if (event.type === "note") {
      $("notes").append(element("li", { textContent: event.message }));
    } else if (event.type === "step") {
      if (!begun) {
        const notes = [...$("notes").children];
        clearPictures();
        $("notes").append(...notes);
        begun = true;
      }
      showStage({ ...event, sides });
      showPreview(event);
      $("status").textContent = event.step === event.steps
        ? `${nameOf(event.side)}decoding`
        : `${nameOf(event.side)}step ${event.step} of ${event.steps}`;
      $("progress").value = (event.side + event.step / (event.steps + 1)) / sides;
    } else if (event.type === "picture") {
      const { png, ...rest } = event;
      pictures.push({ ...rest, png: new Blob([bytesOf(png)], { type: "image/png" }) });
      await showPicture(
        event.side,
        pictures.at(-1).png,
        `${request.prompt}, with ${event.recipes.join(", ")}`,
      );
      showTimes(pictures);
    } else if (event.type === "error") {
      $("status").textContent = "Not drawn";
      showError(event.hint === undefined ? event.message : `${event.message} (${event.hint})`);
      return;
    } else if (event.type === "done") {
      showCloseness(event.comparison, pictures);
      await keepEntry({ date: Date.now(), form, request, pictures, comparison: event.comparison });
      $("status").textContent = `Drawn, seed ${pictures[0].seed}`;
      return;
    }
  }
  throw new Error("the connection ended");
}

// -- history --

async function keepEntry(entry) {
  try {
    const id = await keep(entry);
    await listHistory(id);
  } catch (error) {
    $("notes").append(element("li", { textContent: `The browser keeps no history: ${error.message}` }));
  }
}

async function listHistory(current) {
  const all = await entries();
  for (const url of thumbnails) URL.revokeObjectURL(url);
  thumbnails = all.map(({ pictures }) => URL.createObjectURL(pictures[0].png));
  $("past").hidden = all.length === 0;
  $("history").replaceChildren(...all.map((entry, i) => {
    const { request, pictures, comparison } = entry;
    const what = pictures.length === 1
      ? pictures[0].recipes.at(-1)
      : comparison.equal
      ? "A and B equal"
      : `A and B, ${comparison.psnr.toFixed(1)} dB`;
    const button = element(
      "button",
      { type: "button" },
      element("img", { src: thumbnails[i], alt: "" }),
      element("span", { textContent: request.prompt }),
      element("small", { textContent: `seed ${pictures[0].seed}, ${what}` }),
    );
    if (entry.id === current) button.setAttribute("aria-current", "true");
    button.addEventListener("click", async () => {
      if (running !== undefined) return;
      setForm({ ...entry.form, seed: pictures[0].seed });
      saveForm();
      showError("");
      await showEntry(entry);
      $("status").textContent = `Drawn ${new Date(entry.date).toLocaleString()}, seed ${pictures[0].seed}`;
      for (const other of $("history").querySelectorAll("button")) other.removeAttribute("aria-current");
      button.setAttribute("aria-current", "true");
    });
    return element("li", {}, button);
  }));
  return all;
}

// -- events --

$("drawing").addEventListener("submit", (event) => {
  event.preventDefault();
  void draw();
});
$("drawing").addEventListener("input", saveForm);
$("drawing").addEventListener("change", saveForm);
$("compare").addEventListener("change", showComparing);
$("stop").addEventListener("click", () => running?.abort());
$("split").addEventListener("input", moveSplit);
$("forget").addEventListener("click", async () => {
  await forgetAll();
  await listHistory();
  $("prompt").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    void draw();
  }
});

fillForm();
restoreForm();
try {
  const [latest] = await listHistory();
  if (latest !== undefined) {
    await showEntry(latest);
    $("status").textContent = `Drawn ${new Date(latest.date).toLocaleString()}, seed ${
      latest.pictures[0].seed
    }`;
  }
} catch {
  // Without history the page draws all the same; keepEntry says so.
}
document.documentElement.dataset.ready = "true";
