/** The studio without a browser: who gets an answer, the queue, what is drawn, and the preview. */
import assert from "node:assert/strict";
import { openDevice } from "../../ffi/open.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { EMBEDDED_MODEL } from "../../recipes/base/command_line.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { readPngText } from "../../recipes/base/image.ts";
import { LatentPreview } from "../../recipes/base/latent_preview.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline, type Picture } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { psnr } from "../../recipes/base/psnr.ts";
import { Engine } from "../../recipes/studio/engine.ts";
import { JobQueue } from "../../recipes/studio/queue.ts";
import { type Drawing, parseDrawing, type StudioEvent } from "../../recipes/studio/request.ts";
import { type Studio, studioHandler } from "../../recipes/studio/server.ts";
import { checkWrongCalls, runTask } from "../support/programs.ts";

const PORT = 7860;
const HERE = `http://127.0.0.1:${PORT}`;
const APPLE: Drawing = {
  prompt: "a red apple",
  seed: "7",
  width: 64,
  height: 48,
  steps: 2,
  model: "tiny",
  configurations: [["01_bfloat16"]],
};

/** A studio whose jobs end when the test says so. */
class FakeStudio implements Studio {
  readonly jobs: {
    drawing: Drawing;
    signal: AbortSignal;
    finish: () => void;
    fail: (error: Error) => void;
  }[] = [];

  offer() {
    return { device: "fake", models: [], recipes: [] };
  }

  draw(drawing: Drawing, signal: AbortSignal, tell: (event: StudioEvent) => void): Promise<void> {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    signal.addEventListener("abort", () => reject(signal.reason));
    tell({ type: "loading", side: 0 });
    this.jobs.push({ drawing, signal, finish: resolve, fail: reject });
    return promise;
  }
}

function serving(studio: Studio = new FakeStudio(), notes: string[] = []) {
  const handler = studioHandler(studio, PORT, (message) => notes.push(message));
  return (path: string, { headers = {}, ...init }: RequestInit = {}) =>
    handler(new Request(HERE + path, { ...init, headers: { host: `127.0.0.1:${PORT}`, ...headers } }));
}

const post = (body: unknown, headers: Record<string, string> = {}): RequestInit => ({
  method: "POST",
  headers: { "content-type": "application/json", ...headers },
  body: JSON.stringify(body),
});

/** Lets everything that is ready happen. */
const settle = () => new Promise((resolve) => setTimeout(resolve, 0));

async function eventsOf(response: Response): Promise<StudioEvent[]> {
  return (await response.text()).trim().split("\n").map((line) => JSON.parse(line));
}

Deno.test("the page and its files are served with headers that keep others out", async () => {
  const ask = serving();
  for (
    const [path, type] of [["/", "text/html"], ["/studio.js", "text/javascript"], [
      "/history.js",
      "text/javascript",
    ], [
      "/studio.css",
      "text/css",
    ]]
  ) {
    const response = await ask(path);
    assert.equal(response.status, 200, path);
    assert.ok(response.headers.get("content-type")!.startsWith(type), path);
    assert.match(
      response.headers.get("content-security-policy")!,
      /default-src 'none'.*frame-ancestors 'none'/,
    );
    assert.equal(response.headers.get("access-control-allow-origin"), null);
    assert.equal(response.headers.get("x-content-type-options"), "nosniff");
    assert.ok((await response.text()).length > 500);
  }
  for (const path of ["/deno.json", "/../deno.json", "/studio.js/", "/api", "/api/draw/x", "//"]) {
    assert.equal((await ask(path)).status, 404, path);
  }
  assert.equal((await ask("/", { method: "POST" })).status, 405);
  assert.equal((await ask("/api/draw")).status, 405);
});

Deno.test("foreign hosts and origins are refused, and start no job", async () => {
  const studio = new FakeStudio();
  const ask = serving(studio);
  const foreign: Record<string, string>[] = [
    { host: `evil.example:${PORT}` }, // a name that points to 127.0.0.1: DNS rebinding
    { host: "127.0.0.1" },
    { host: `127.0.0.1:${PORT + 1}` },
    { host: `127.0.0.1.evil.example:${PORT}` },
    { host: "" },
    { origin: "http://evil.example" },
    { origin: `https://127.0.0.1:${PORT}` },
    { origin: `http://127.0.0.1:${PORT + 1}` },
    { origin: `http://localhost:${PORT}` }, // not the host that was asked
    { origin: "null" },
    { "sec-fetch-site": "cross-site" },
    { "sec-fetch-site": "same-site", "sec-fetch-mode": "cors" },
  ];
  for (const headers of foreign) {
    for (const [path, init] of [["/", {}], ["/api/offer", {}], ["/api/draw", post(APPLE)]] as const) {
      const response = await ask(path, {
        ...init,
        headers: { ...init.headers as Record<string, string>, ...headers },
      });
      assert.equal(response.status, 403, `${path} ${JSON.stringify(headers)}`);
      await response.body?.cancel();
    }
  }
  assert.equal(studio.jobs.length, 0);
  const own: Record<string, string>[] = [
    {},
    { origin: HERE, "sec-fetch-site": "same-origin" },
    { host: `localhost:${PORT}`, origin: `http://localhost:${PORT}` },
    { "sec-fetch-site": "none" },
    { "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document" }, // a link to it
  ];
  for (const headers of own) assert.equal((await ask("/", { headers })).status, 200, JSON.stringify(headers));
});

Deno.test("a request that makes no sense is refused in words that name the field", async () => {
  const studio = new FakeStudio();
  const ask = serving(studio);
  const { prompt: _, ...promptless } = APPLE;
  const cases: [unknown, RegExp][] = [
    [{ ...APPLE, prompt: " " }, /^prompt: is empty/],
    [{ ...APPLE, prompt: "x".repeat(4001) }, /^prompt: /],
    [promptless, /^prompt: /],
    [{ ...APPLE, seed: "abc" }, /^seed: is no whole number/],
    [{ ...APPLE, seed: 7 }, /^seed: /],
    [{ ...APPLE, width: 0 }, /^width: give a whole number from 1 to 8192/],
    [{ ...APPLE, height: 99999 }, /^height: give a whole number/],
    [{ ...APPLE, height: 1.5 }, /^height: /],
    [{ ...APPLE, steps: null }, /^steps: /],
    [{ ...APPLE, configurations: [] }, /^configurations: /],
    [{ ...APPLE, configurations: [[], [], []] }, /^configurations: /],
    [{ ...APPLE, ckpt: "/etc" }, /ckpt/],
    ["a picture", /^the request: /],
    [{ ...APPLE, prompt: "x".repeat(70_000) }, /more than 65536 bytes/],
  ];
  for (const [body, message] of cases) {
    const response = await ask("/api/draw", post(body));
    assert.equal(response.status, 400, JSON.stringify(body)?.slice(0, 80));
    assert.match(await response.text(), message);
  }
  assert.equal((await ask("/api/draw", { ...post(APPLE), body: "{" })).status, 400);
  assert.equal((await ask("/api/draw", post(APPLE, { "content-type": "text/plain" }))).status, 415);
  assert.equal(studio.jobs.length, 0);
});

Deno.test("jobs run one after another, and are told how many are before them", async () => {
  const studio = new FakeStudio();
  const ask = serving(studio);
  const first = await ask("/api/draw", post(APPLE));
  const second = await ask("/api/draw", post({ ...APPLE, prompt: "a pear" }));
  await settle();
  assert.deepEqual(studio.jobs.map(({ drawing }) => drawing.prompt), ["a red apple"]);
  studio.jobs[0].finish();
  assert.deepEqual(await eventsOf(first), [{ type: "queued", ahead: 0 }, { type: "loading", side: 0 }]);
  await settle();
  assert.deepEqual(studio.jobs.map(({ drawing }) => drawing.prompt), ["a red apple", "a pear"]);
  studio.jobs[1].finish();
  assert.deepEqual((await eventsOf(second))[0], { type: "queued", ahead: 1 });
});

Deno.test("who goes away stops a job that runs, and leaves the queue", async () => {
  const studio = new FakeStudio();
  const ask = serving(studio);
  const [running, waiting, last] = await Promise.all(
    ["1", "2", "3"].map((seed) => ask("/api/draw", post({ ...APPLE, seed }))),
  );
  await settle();
  await waiting.body!.cancel();
  await running.body!.cancel();
  assert.ok(studio.jobs[0].signal.aborted);
  await settle();
  assert.deepEqual(studio.jobs.map(({ drawing }) => drawing.seed), ["1", "3"]);
  studio.jobs[1].finish();
  assert.deepEqual((await eventsOf(last)).slice(0, 3), [
    { type: "queued", ahead: 2 },
    { type: "queued", ahead: 1 },
    { type: "loading", side: 0 },
  ]);
});

Deno.test("an error reaches the page, and a bug ends neither the program nor the queue", async () => {
  const studio = new FakeStudio();
  const notes: string[] = [];
  const ask = serving(studio, notes);
  for (const error of [new UsageError("no such thing", { hint: "try another" }), new TypeError("a bug")]) {
    const response = await ask("/api/draw", post(APPLE));
    await settle();
    studio.jobs.at(-1)!.fail(error);
    const last = (await eventsOf(response)).at(-1)!;
    assert.ok(last.type === "error" && last.message === error.message && last.hint !== undefined);
  }
  assert.equal(notes.length, 1);
  assert.match(notes[0], /TypeError: a bug\n +at /);
});

Deno.test("a full queue refuses, and takes more when it has room again", async () => {
  const queue = new JobQueue(2);
  const never = new AbortController().signal;
  const gates = [0, 1, 2].map(() => Promise.withResolvers<void>());
  const run = (i: number) => queue.run(() => gates[i].promise, never, () => {});
  const jobs = [run(0), run(1), run(2)];
  assert.throws(() => run(0), UsageError);
  gates[0].resolve();
  await jobs[0];
  await settle();
  const later = run(0);
  gates[1].resolve();
  gates[2].resolve();
  await Promise.all([...jobs, later]);
  const gone = AbortSignal.abort(new Error("gone"));
  await assert.rejects(queue.run(() => Promise.resolve(), gone, () => {}), { message: "gone" });
});

async function drawAll(engine: Engine, drawing: Drawing, signal = new AbortController().signal) {
  const events: StudioEvent[] = [];
  await engine.draw(parseDrawing(drawing), signal, (event) => events.push(event));
  return events;
}

Deno.test("the engine draws what the ladder's pipeline draws, and compares two configurations", async () => {
  using engine = new Engine({ device: "cpu" }, () => {});
  const offer = engine.offer();
  assert.deepEqual(offer.models, [{ name: "tiny", width: 256, height: 256 }]);
  assert.ok(offer.recipes.some(({ name, usual }) => name === "02_compile" && usual));
  assert.ok(!offer.recipes.some(({ name }) => name === "04_channels_last"), "which no CPU runs");

  const events = await drawAll(engine, { ...APPLE, configurations: [[], ["01_bfloat16", "02_compile"]] });
  const kinds = events.map((event) => "side" in event ? `${event.type} ${event.side}` : event.type);
  const side = (i: number) => [`loading ${i}`, `step ${i}`, `step ${i}`, `step ${i}`, `picture ${i}`];
  assert.deepEqual(kinds, [...side(0), ...side(1), "done"]);
  const pictures = events.filter((event) => event.type === "picture");
  assert.deepEqual(pictures.map(({ recipes }) => recipes), [["00_baseline_fp32"], [
    "01_bfloat16",
    "02_compile",
  ]]);
  assert.match(
    readPngText(Uint8Array.fromBase64(pictures[0].png)).parameters,
    /^a red apple\nSteps: 2,.*Seed: 7,/,
  );
  for (const { milliseconds, memory } of pictures) {
    assert.ok(
      milliseconds.text > 0 && milliseconds.decode > 0 && milliseconds.steps.length === 2 && memory.peak > 0,
    );
  }
  const rgb = async (png: string) => {
    const { Image } = await import("imagescript");
    return (await Image.decode(Uint8Array.fromBase64(png))).bitmap.filter((_, i) => i % 4 < 3);
  };
  const [a, b] = await Promise.all(pictures.map(async ({ png }) => new Uint8Array(await rgb(png))));
  const done = events.at(-1)!;
  assert.ok(done.type === "done" && done.comparison !== undefined && !done.comparison.equal);
  assert.ok(Math.abs(done.comparison.psnr! - psnr(b, a)) < 1e-9);

  using device = await openDevice("cpu");
  using model = await Model.load(EMBEDDED_MODEL, device);
  const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), bfloat16));
  const { images } = await pipeline.generate({
    prompt: "a red apple",
    seed: 7,
    width: 64,
    height: 48,
    numInferenceSteps: 2,
  });
  const [same] = (await drawAll(engine, APPLE)).filter((event) => event.type === "picture");
  assert.deepEqual(new Uint8Array(await rgb(same.png)), images[0].rgb);
});

Deno.test("the engine stops at once, and refuses what makes no sense", async () => {
  using engine = new Engine({ device: "cpu" }, () => {});
  const controller = new AbortController();
  const events: StudioEvent[] = [];
  const stopped = engine.draw({ ...APPLE, steps: 1000 }, controller.signal, (event) => {
    events.push(event);
    if (event.type === "step" && event.step === 2) controller.abort(new Error("gone"));
  });
  await assert.rejects(stopped, { message: "gone" });
  assert.equal(events.filter(({ type }) => type === "step").length, 3);
  const cases: [Partial<Drawing>, RegExp][] = [
    [{ model: "../tiny" }, /there is no model \.\.\/tiny/],
    [{ configurations: [["99_magic"]] }, /there is no recipe 99_magic/],
    [{ configurations: [["01_bfloat16", "04_channels_last"]] }, /does not run on cpu/],
    [{ configurations: [["06_float8"]] }, /06_float8 needs 01_bfloat16/],
    [{ configurations: [["00_baseline_fp32", "01_bfloat16"]] }, /00_baseline_fp32|01_bfloat16/],
    [{ seed: "99999999999999999999" }, /seed/],
    [{ width: 8 }, /width is 8: give 16 or more/],
  ];
  for (const [changed, message] of cases) {
    await assert.rejects(drawAll(engine, { ...APPLE, ...changed }), (error) => {
      assert.ok(error instanceof UsageError, String(error));
      assert.match(error.message, message);
      return true;
    });
  }
  const seeds = await Promise.all([1, 2].map(() => drawAll(engine, { ...APPLE, seed: "", steps: 1 })));
  const [one, two] = seeds.map((events) => events.find((event) => event.type === "picture")!.seed);
  assert.notEqual(one, two, "no seed is one at random");
});

Deno.test("the preview shows the picture that comes, and gets closer with each that was drawn", async () => {
  using device = await openDevice("cpu");
  using model = await Model.load(EMBEDDED_MODEL, device);
  const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), bfloat16));
  const preview = LatentPreview.fit(pipeline, 256, 256);
  const drawn = async (prompt: string) => {
    let latents = new Float32Array();
    const { images } = await pipeline.generate({
      prompt,
      seed: 1,
      onProgress: (event) => {
        const tensor = event.latents();
        latents = new Float32Array(tensor.size);
        void device.download(tensor, new Uint8Array(latents.buffer));
      },
    });
    return { latents, picture: images[0] };
  };
  /** The picture, as large as its latents are. */
  const shrunk = ({ width, height, rgb }: Picture) =>
    Uint8Array.from({ length: width * height * 3 / 64 }, (_, i) => {
      const [x, y] = [Math.floor(i / 3) % (width / 8), Math.floor(i / 3 / (width / 8))];
      let sum = 0;
      for (let j = 0; j < 64; j++) sum += rgb[((y * 8 + (j >> 3)) * width + x * 8 + j % 8) * 3 + i % 3];
      return Math.round(sum / 64);
    });
  const apple = await drawn("a red apple on a blue background");
  const expected = shrunk(apple.picture);
  const closeness = () => {
    const { width, height, rgb } = preview.render(apple.latents, 32, 32);
    assert.deepEqual([width, height], [32, 32]);
    return psnr(rgb, expected);
  };
  const mean = expected.reduce((sum, value) => sum + value, 0) / expected.length;
  const grey = psnr(new Uint8Array(expected.length).fill(mean), expected);
  const before = closeness();
  assert.ok(before > grey + 6, `${before} dB; grey alone has ${grey}`);
  for (const prompt of ["a green tree", "a yellow banana on a black background"]) {
    const { latents, picture } = await drawn(prompt);
    preview.learn(latents, picture);
  }
  const after = closeness();
  assert.ok(after > before + 1, `${after} dB after ${before}`);
  assert.throws(() => preview.render(apple.latents, 32, 31), { name: "ShapeError" });
  assert.throws(() => preview.learn(apple.latents.subarray(1), apple.picture), { name: "ShapeError" });
});

Deno.test("studio ends wrong calls with one clear line and an exit code", async (test) => {
  const cases: [string[], number, RegExp][] = [
    [["--port", "0"], 2, /--port.*whole number from 1/],
    [["--port", "7861"], 1, /cannot listen on 127\.0\.0\.1:7861.*\n.*--allow-net=127\.0\.0\.1:7861/],
    [["--ckpt", "/nowhere"], 1, /no such model folder/],
    [["surplus"], 2, /too many arguments/],
  ];
  await checkWrongCalls(test, "studio", cases);
  const { code, stdout } = await runTask("studio", "--help");
  assert.equal(code, 0);
  assert.match(stdout, /Examples:\n\s+deno task studio/);
});
