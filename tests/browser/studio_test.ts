/// <reference lib="dom" />

/**
 * The studio in a browser: Debian's Chromium without a window, driven by Playwright. `deno task test:browser`; without
 * Chromium the tests are skipped.
 */
import assert from "node:assert/strict";
import type { Browser, BrowserContext, Page } from "playwright-core";
import { taskCommand } from "../support/programs.ts";

const CHROMIUM = "/usr/bin/chromium";
/** The task may listen on this one only; another studio may have it. */
const TASK_PORT = 7860;

function missing(): string | undefined {
  try {
    Deno.statSync(CHROMIUM);
    return undefined;
  } catch {
    return `${CHROMIUM} is missing: apt-get install chromium`;
  }
}

const skipped = missing();
if (skipped !== undefined) console.warn(`tests of the studio's page are skipped: ${skipped}`);

interface Opened {
  readonly browser: Browser;
  readonly url: string;
  /** A tab, ready; what its page logs or throws fails the test. */
  readonly tab: (context?: BrowserContext) => Promise<Page>;
}

/** Runs a studio of its own, as the task does but for the port, and a browser. */
async function withStudio(body: (opened: Opened) => Promise<void>): Promise<void> {
  // At import Playwright looks whether this is WSL, at a file for which Deno wants all permissions; this puts that off.
  Deno.env.set("__IS_WSL_TEST__", "1");
  const { chromium } = await import("playwright-core");
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr as Deno.NetAddr;
  listener.close();
  const program = taskCommand(
    "studio",
    ["--port", String(port)],
    {},
    (flag) => flag.replace(`:${TASK_PORT}`, `:${port}`),
  )
    .spawn();
  const url = `http://127.0.0.1:${port}/`;
  const problems: string[] = [];
  let browser: Browser | undefined;
  try {
    const reader = program.stdout.getReader();
    const { value } = await reader.read();
    assert.equal(new TextDecoder().decode(value), `${url}\n`);
    reader.releaseLock();
    browser = await chromium.launch({ executablePath: CHROMIUM, args: ["--no-sandbox", "--disable-gpu"] });
    const opened = browser;
    const own = await opened.newContext({ viewport: { width: 1280, height: 900 } });
    await body({
      browser: opened,
      url,
      tab: async (context = own) => {
        const page = await context.newPage();
        page.setDefaultTimeout(30_000);
        page.on("pageerror", (error) => problems.push(String(error)));
        page.on("console", (message) => {
          // A refused request is logged by the browser itself.
          if (message.type() === "error" && !/status of 400/.test(message.text())) {
            problems.push(message.text());
          }
        });
        await page.goto(url);
        await page.waitForSelector("html[data-ready]");
        await page.fill("#width", "64");
        await page.fill("#height", "64");
        return page;
      },
    });
  } finally {
    await browser?.close();
    program.kill("SIGTERM");
    const stderr = new Response(program.stderr).text();
    await program.stdout.cancel();
    await program.status;
    assert.equal(await stderr, "", "the studio has complained");
  }
  assert.deepEqual(problems, []);
}

const status = (page: Page, pattern: RegExp) =>
  page.waitForFunction(
    (source) => new RegExp(source).test(document.querySelector("#status")!.textContent!),
    pattern.source,
  );

/** Pixels of a side's canvas that are neither transparent nor all the same. */
const colours = (page: Page, side: number) =>
  page.evaluate((id) => {
    const canvas = document.querySelector<HTMLCanvasElement>(id)!;
    const { data } = canvas.getContext("2d")!.getImageData(0, 0, canvas.width, canvas.height);
    const seen = new Set<number>();
    for (let i = 0; i < data.length; i += 4) {
      if (data[i + 3] === 255) seen.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
    }
    return { width: canvas.width, colours: seen.size };
  }, `#picture-${side}`);

const boxed = (name: string, body: (opened: Opened) => Promise<void>) =>
  Deno.test({ name, ignore: skipped !== undefined, fn: () => withStudio(body) });

boxed("generate: the picture emerges, and stays after a reload", async ({ tab }) => {
  const page = await tab();
  await page.fill("#prompt", "a red apple");
  await page.fill("#steps", "12");
  await page.click("#draw");
  await status(page, /^step [3-9] of 12$/);
  const emerging = await colours(page, 0);
  assert.equal(emerging.width, 8, "a pixel for each latent");
  assert.ok(emerging.colours > 20);
  await status(page, /^Drawn, seed 42$/);
  const drawn = await colours(page, 0);
  assert.ok(drawn.width === 64 && drawn.colours > 100);
  assert.match(
    await page.innerText("#times"),
    /Text encoders\s+[\d.]+ ms[^]*All 12 steps[^]*Decoder\s+[\d.]+ ms/,
  );
  await page.reload();
  await page.waitForSelector("html[data-ready]");
  await status(page, /^Drawn .*, seed 42$/);
  assert.deepEqual(await colours(page, 0), drawn);
  assert.equal(await page.inputValue("#prompt"), "a red apple");
  assert.match(await page.innerText("#history"), /a red apple\s+seed 42/);

  await page.fill("#prompt", "a green pear");
  await page.click("#draw");
  await status(page, /^Drawn, seed/);
  assert.equal(await page.locator("#history button").count(), 2);
  await page.click("#history li:nth-child(2) button");
  assert.equal(await page.inputValue("#prompt"), "a red apple");
  await status(page, /^Drawn .*, seed 42$/);
  assert.deepEqual(await colours(page, 0), drawn);
  await page.click("#forget");
  await page.waitForSelector("#past", { state: "hidden" });
  await page.reload();
  await page.waitForSelector("html[data-ready]");
  assert.equal(await page.locator("#history button").count(), 0);
});

boxed("compare: two configurations, a slider between them, times and PSNR of both", async ({ tab }) => {
  const page = await tab();
  await page.check("#compare");
  await page.uncheck("#recipes-0 input[value='01_bfloat16']");
  await page.click("#draw");
  await status(page, /^Drawn, seed/);
  assert.match(await page.innerText("#closeness"), /^PSNR \d+\.\d dB, largest error \d+\/255/);
  assert.match(await page.innerText("#times"), /A\s+B\s+Text encoders\s+[\d.]+ ms\s+[\d.]+ ms/);
  for (const side of [0, 1]) assert.ok((await colours(page, side)).colours > 100, `side ${side}`);
  const clip = () => page.evaluate(() => getComputedStyle(document.querySelector("#picture-1")!).clipPath);
  assert.match(await clip(), /50%/);
  await page.focus("#split");
  await page.keyboard.press("Home");
  assert.doesNotMatch(await clip(), /50%/);
  await page.keyboard.press("ArrowRight");
  assert.match(await clip(), /\b1%/);
  // Equal choices give equal pictures.
  await page.check("#recipes-0 input[value='01_bfloat16']");
  for (const name of ["02_compile", "03_fuse_qkv"]) await page.uncheck(`#recipes-0 input[value='${name}']`);
  assert.ok(!await page.isChecked("#recipes-0 input[value='07_tuning']"), "which builds on 02_compile");
  await page.click("#draw");
  await page.waitForFunction(() => /equal/.test(document.querySelector("#closeness")!.textContent!));
  await page.check("#recipes-1 input[value='07_tuning']");
  assert.ok(await page.isChecked("#recipes-1 input[value='02_compile']"), "it is brought along");
});

boxed("cancel: Stop, Escape and a closed tab stop the job, and the next one begins", async ({ tab }) => {
  const page = await tab();
  await page.fill("#steps", "1000");
  await page.click("#draw");
  await status(page, /^step \d+ of 1000$/);
  await page.click("#stop");
  await status(page, /^Stopped$/);
  assert.ok(await page.isEnabled("#draw") && await page.isDisabled("#stop"));
  await page.click("#draw");
  await status(page, /^step \d+ of 1000$/);
  await page.keyboard.press("Escape");
  await status(page, /^Stopped$/);
  await page.click("#draw");
  await status(page, /^step \d+ of 1000$/);
  const other = await tab();
  await other.fill("#steps", "2");
  await page.close();
  const start = performance.now();
  await other.click("#draw");
  await status(other, /^Drawn/);
  assert.ok(performance.now() - start < 10_000, "not after 1000 steps");
  assert.equal(await other.locator("#history button").count(), 1, "what was stopped is no history");
});

boxed("two tabs at once: the second waits, and may leave", async ({ tab }) => {
  const [first, second, third] = [await tab(), await tab(), await tab()];
  await first.fill("#steps", "1000");
  await first.click("#draw");
  await status(first, /^step/);
  for (const [page, pattern] of [[second, /^Waiting, 1 before/], [third, /^Waiting, 2 before/]] as const) {
    await page.fill("#steps", "2");
    await page.click("#draw");
    await status(page, pattern);
  }
  await second.click("#stop");
  await status(second, /^Stopped$/);
  await status(third, /^Waiting, 1 before/);
  await first.click("#stop");
  await status(third, /^Drawn/);
});

boxed("a bad value: said at its field, nothing is drawn, and a good one goes on", async ({ tab }) => {
  const page = await tab();
  for (
    const [field, bad, good] of [["seed", "abc", "7"], ["width", "0", "64"], ["height", "", "64"], [
      "steps",
      "1.5",
      "2",
    ], ["prompt", "  ", "a pear"]]
  ) {
    await page.fill(`#${field}`, bad);
    await page.click("#draw");
    await page.waitForSelector(`#${field}[aria-invalid='true']`);
    assert.match(await page.innerText("#error"), new RegExp(`^${field}`));
    assert.equal(await page.evaluate(() => document.activeElement!.id), field);
    await page.fill(`#${field}`, good);
  }
  await page.fill("#width", "8"); // which the pipeline refuses
  await page.click("#draw");
  await page.waitForSelector("#width[aria-invalid='true']");
  assert.match(await page.innerText("#error"), /width is 8: give 16 or more/);
  await page.fill("#width", "64");
  await page.click("#draw");
  await status(page, /^Drawn, seed 7$/);
  assert.equal(await page.innerText("#error"), "");
});

boxed("keyboard only: all that matters is reached by Tab, and drawing by a key", async ({ tab }) => {
  const page = await tab();
  await page.reload(); // so that the focus is where it is at first
  await page.waitForSelector("html[data-ready]");
  const reached: string[] = [];
  for (let i = 0; i < 30 && !reached.includes("draw"); i++) {
    await page.keyboard.press("Tab");
    reached.push(
      await page.evaluate(() =>
        document.activeElement!.id || document.activeElement!.getAttribute("value") || ""
      ),
    );
    const outlined = await page.evaluate(() => getComputedStyle(document.activeElement!).outlineStyle);
    assert.notEqual(outlined, "none", `${reached.at(-1)} does not show that it has the focus`);
  }
  for (const id of ["prompt", "model", "width", "height", "seed", "steps", "02_compile", "compare", "draw"]) {
    assert.ok(reached.includes(id), `${id} is not reached: ${reached}`);
  }
  await page.keyboard.press("Enter");
  await status(page, /^Drawn/);
  await page.focus("#prompt");
  await page.keyboard.press("Control+a");
  await page.keyboard.type("a blue bird");
  await page.keyboard.press("Control+Enter");
  await page.waitForFunction(() => document.querySelectorAll("#history button").length === 2);
  assert.match(await page.innerText("#history"), /^a blue bird/);
  await page.focus("#history li:nth-child(2) button");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() =>
    document.querySelector<HTMLTextAreaElement>("#prompt")!.value !== "a blue bird"
  );
});

boxed(
  "a narrow window: nothing sticks out, and the picture is in view while it emerges",
  async ({ browser, tab }) => {
    const page = await tab(
      await browser.newContext({ viewport: { width: 320, height: 640 }, colorScheme: "dark" }),
    );
    await page.check("#compare");
    await page.fill("#steps", "300");
    await page.click("#draw");
    await status(page, /^A: step/);
    await page.locator("#status").waitFor({ state: "visible" });
    const top = await page.evaluate(() => document.querySelector("#stage")!.getBoundingClientRect().top);
    assert.ok(top >= 0 && top < 640, `the picture begins at ${top}`);
    await page.click("#stop");
    await page.fill("#steps", "2");
    await page.click("#draw");
    await status(page, /^Drawn/);
    const { scroll, client } = await page.evaluate(() => ({
      scroll: document.documentElement.scrollWidth,
      client: document.documentElement.clientWidth,
    }));
    assert.ok(scroll <= client, `${scroll} wide in a window of ${client}`);
  },
);

boxed(
  "foreign pages get nothing: neither by a request nor by a name of their own",
  async ({ browser, url }) => {
    const context = await browser.newContext();
    const page = await context.newPage();
    await page.route(
      "http://evil.example/",
      (route) => route.fulfill({ contentType: "text/html", body: "<p>hello" }),
    );
    await page.goto("http://evil.example/");
    const tried = await page.evaluate(async (url) => {
      const results: string[] = [];
      for (const mode of ["cors", "no-cors"] as const) {
        for (const type of ["application/json", "text/plain"]) {
          try {
            const init = { method: "POST", mode, headers: { "content-type": type }, body: "{}" };
            const response = await fetch(`${url}api/draw`, init);
            results.push(`${response.type} ${response.status} ${await response.text()}`);
          } catch {
            results.push("refused");
          }
        }
      }
      return results;
    }, url);
    for (const result of tried) {
      assert.ok(["refused", "opaque 0 "].includes(result), result);
    }
    // As after DNS rebinding: another name that leads here.
    const { port } = new URL(url);
    const rebound = await Deno.connect({ hostname: "127.0.0.1", port: Number(port) });
    const lines = ["GET /api/offer HTTP/1.1", `Host: evil.example:${port}`, "Connection: close", "", ""];
    await rebound.write(new TextEncoder().encode(lines.join("\r\n")));
    const answer = await new Response(rebound.readable).text();
    assert.match(answer, /^HTTP\/1.1 403 /);
    await context.close();
  },
);
