/** The pages that `--report` of the benchmark and the ladder writes. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { Image } from "imagescript";
import { join } from "node:path";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { exporting } from "../../recipes/08_export.ts";
import { readPngText } from "../../recipes/base/image.ts";
import { reportPage, shellLine } from "../../recipes/base/report_page.ts";
import { rungsTo } from "../../recipes/ladder_report.ts";
import { inFolder } from "../support/folders.ts";
import { namesIn, runTask } from "../support/programs.ts";
import { parseXml, type XmlElement } from "../support/xml.ts";

/** A page of ours as XML: its void elements closed, and without the line that XML has not. */
function parsePage(html: string): XmlElement {
  assert.ok(html.startsWith("<!doctype html>\n"));
  return parseXml(
    html.slice("<!doctype html>".length).trim().replaceAll(/<((?:meta|img) [^>]*[^/>])>/g, "<$1/>"),
  );
}

function* elements(element: XmlElement): Generator<XmlElement> {
  yield element;
  for (const child of element.children) yield* elements(child);
}

/** What all pages have to be: whole, without script, without a thing to load. */
function checkSelfContained(page: XmlElement): void {
  const names = [...elements(page)].map(({ name }) => name);
  for (const name of ["script", "link", "iframe", "object", "form"]) assert.ok(!names.includes(name), name);
  for (const { attributes } of elements(page)) {
    for (const [name, value] of Object.entries(attributes)) {
      assert.ok(!name.startsWith("on"), `${name} runs a script`);
      if (["src", "href", "xlink:href", "srcset"].includes(name)) {
        assert.match(value, /^data:image\/png;base64,/);
      }
    }
  }
  const policies = [...elements(page)].filter(({ attributes }) => attributes["http-equiv"]);
  assert.match(policies[0].attributes.content, /^default-src 'none'/);
  const style = [...elements(page)].find(({ name }) => name === "style")!;
  assert.doesNotMatch(style.text, /url\(|@import/);
}

const texts = (page: XmlElement, name: string) =>
  [...elements(page)].filter((element) => element.name === name).map(({ text }) => text);

async function pngs(page: XmlElement): Promise<{ bytes: Uint8Array; alt: string }[]> {
  return await Promise.all(
    [...elements(page)].filter(({ name }) => name === "img").map(async ({ attributes }) => {
      const bytes = Uint8Array.fromBase64(attributes.src.split(",")[1]);
      readPngText(bytes); // checks all chunks
      const { width, height } = await Image.decode(bytes);
      assert.deepEqual([String(width), String(height)], [attributes.width, attributes.height]);
      return { bytes, alt: attributes.alt };
    }),
  );
}

Deno.test("benchmark --report writes one page with ladder, numbers, pictures, environment and commands", () =>
  inFolder(async (folder) => {
    const path = join(folder, "report.html");
    const args = ["--cache-dir", join(folder, "cache"), "--output-file", join(folder, "a.png")]
      .concat(
        "--height",
        "32",
        "--width",
        "48",
        "--num_inference_steps",
        "2",
        "--runs",
        "1",
        "--warmups",
        "0",
      )
      .concat("--prompt", 'it\'s <b>bold</b> & "quoted"', "--report", path);
    const { code, stdout, stderr } = await runTask("benchmark", ...args);
    assert.equal(code, 0, stderr);
    assert.ok(stdout.endsWith(`${path}\n`));
    assert.deepEqual(namesIn(folder), ["a.png", "cache", "report.html"]);
    const page = parsePage(await Deno.readTextFile(path));
    checkSelfContained(page);
    const chart = [...elements(page)].find(({ name }) => name === "svg")!;
    const bars = chart.children.filter(({ name, attributes }) =>
      name === "rect" && attributes.height === "20"
    );
    const rungs = ["00_baseline_fp32", "01_bfloat16", "+ 02_compile", "+ 03_fuse_qkv", "+ 07_tuning"];
    assert.equal(bars.length, rungs.length);
    assert.ok(bars.every(({ attributes }) => Number(attributes.width) > 0));
    const cells = texts(page, "td");
    for (const rung of rungs) assert.ok(cells.includes(rung), rung);
    // The last rung is the benchmark itself, with the numbers that it has printed.
    assert.ok(texts(page, "pre").some((text) => stdout.startsWith(text)));
    assert.ok((await pngs(page)).some(({ alt }) => alt.startsWith("00_baseline_fp32")));
    const environment = texts(page, "th");
    for (const name of ["date", "device", "matmul", "Deno", "flux-recipes", "system"]) {
      assert.ok(environment.includes(name), name);
    }
    assert.ok(cells.some((cell) => cell.includes(Deno.version.deno)));
    const commands = texts(page, "pre").filter((text) => text.startsWith("npx -y deno task "));
    assert.equal(commands.length, 2);
    assert.equal(commands[0], shellLine(["npx", "-y", "deno", "task", "benchmark", ...args]));
    assert.match(commands[1], /generate --prompt 'it'\\''s <b>/);
  }));

Deno.test("ladder --report writes a page with a bar and a row for each rung", () =>
  inFolder(async (folder) => {
    const path = join(folder, "ladder.html");
    const { code, stdout, stderr } = await runTask(
      "ladder",
      ...["--cache-dir", join(folder, "cache"), "--height", "32", "--width", "32", "--json"],
      ...["--num_inference_steps", "1", "--runs", "1", "--warmups", "0", "--report", path],
    );
    assert.equal(code, 0, stderr);
    const printed = JSON.parse(stdout);
    assert.equal(printed.report, path);
    const page = parsePage(await Deno.readTextFile(path));
    checkSelfContained(page);
    const chart = [...elements(page)].find(({ name }) => name === "svg")!;
    assert.equal(chart.children.filter(({ name }) => name === "rect").length, printed.rungs.length + 1);
    const named = (await pngs(page)).flatMap(({ alt }) => alt.split(":")[0].split(", "));
    assert.equal(named.length, printed.rungs.length, "each rung stands below one picture");
    assert.ok(texts(page, "pre").some((text) => text.startsWith("npx -y deno task ladder --cache-dir ")));
  }));

Deno.test("--report ends wrong calls before any work", async (test) => {
  for (const task of ["benchmark", "ladder"]) {
    const cases: [string, number, RegExp][] = [
      ["report.pdf", 2, /HTML/],
      ["", 2, /HTML/],
      ["/nowhere/report.html", 1, /\/nowhere does not exist/],
    ];
    for (const [path, code, message] of cases) {
      await test.step(`${task} --report "${path}"`, async () => {
        const result = await runTask(task, "--report", path);
        assert.equal(result.code, code, result.stderr);
        assert.match(result.stderr, message);
        assert.equal(result.stdout, "");
      });
    }
  }
});

Deno.test("rungsTo ends with the recipes, begins with the baseline, and leaves out what draws the same", () => {
  const names = (recipes: Parameters<typeof rungsTo>[0]) =>
    rungsTo(recipes).map((rung) => rung.map(({ name }) => name));
  assert.deepEqual(names([bfloat16, compile, exporting]), [
    ["00_baseline_fp32"],
    ["01_bfloat16"],
    ["01_bfloat16", "02_compile"],
  ]);
  assert.deepEqual(names([baselineFp32, compile]), [["00_baseline_fp32"], [
    "00_baseline_fp32",
    "02_compile",
  ]]);
});

Deno.test("whatever text is in a page, it stays text", () => {
  const text = fc.oneof(
    fc.string({ unit: "binary" }),
    fc.constantFrom("<script>alert(1)</script>", '"><img src=x>', "</style>"),
  );
  fc.assert(fc.property(text, text, text, (title, cell, line) => {
    const page = parsePage(reportPage({
      title,
      subtitle: cell,
      charts: [],
      table: [["a", title], [[cell, line]]],
      pictures: [],
      printed: line,
      environment: { [cell]: title },
      commands: [{ what: cell, line }],
    }));
    checkSelfContained(page);
    assert.equal([...elements(page)].filter(({ name }) => name === "td").length, 3);
  }));
});

Deno.test("shellLine is what a shell reads as the same words", async () => {
  await fc.assert(
    fc.asyncProperty(fc.array(fc.string(), { maxLength: 4 }), async (words) => {
      // A POSIX shell's rules for what shellLine writes: bare words, and quotes with \' between.
      const line = await Promise.resolve(shellLine(words));
      const read: string[] = [];
      for (const [whole] of line.matchAll(/(?:'[^']*'|\\'|[^\s'\\])+/g)) {
        read.push(whole.replaceAll(/'([^']*)'|\\'/g, (_, quoted) => quoted ?? "'"));
      }
      assert.deepEqual(read, words);
    }),
  );
});
