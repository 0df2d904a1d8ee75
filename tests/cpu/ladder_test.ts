/** `deno task ladder` as a user runs it, its table and its chart. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { join } from "node:path";
import { FfiError, OutOfMemoryError } from "../../ffi/errors.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { barChart } from "../../recipes/base/bar_chart.ts";
import { createParser } from "../../recipes/base/command_line.ts";
import { partStatistics } from "../../recipes/base/measure.ts";
import type { Recipe } from "../../recipes/base/plan.ts";
import { chartOf, climb, compare, type Measured, type RungResult, tableOf } from "../../recipes/ladder.ts";
import { cumulativeRungs } from "../../recipes/switches.ts";
import { inFolder } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";
import { checkWrongCalls, namesIn, runTask, taskCommand } from "../support/programs.ts";
import { parseXml } from "../support/xml.ts";

/** A rung that took so many milliseconds and drew a picture of one grey. */
function rung(recipes: string[], whole: number, grey: number, exact = true): Measured {
  const times = { whole, text: 1, image: 0, steps: [whole / 4, whole / 2], decode: 2, postprocess: 0.5 };
  return {
    recipes,
    exact,
    milliseconds: partStatistics([times]),
    memory: { weights: 2e9, peak: 1e9, reserved: 3e9 },
    picture: { width: 2, height: 2, rgb: new Uint8Array(12).fill(grey) },
  };
}

const BASELINE = rung(["00_baseline_fp32"], 400, 101);
const REFERENCE = rung(["01_bfloat16"], 200, 100);
const LOSSY = rung(["01_bfloat16", "06_float8"], 50, 110, false);
const NOT_COMPARED = { speedup: undefined, psnr: undefined, largestError: undefined };
const FAILED: RungResult = {
  recipes: ["01_bfloat16", "05_flash_attention"],
  exact: true,
  error: "no library",
};

Deno.test("speed-up and PSNR are against 01_bfloat16, wherever it stands", () => {
  const rungs = [BASELINE, REFERENCE, FAILED, LOSSY];
  const closeness = (difference: number) => 10 * Math.log10(255 ** 2 / difference ** 2);
  assert.deepEqual(compare(rungs), [
    { speedup: 0.5, psnr: closeness(1), largestError: 1 },
    { speedup: 1, psnr: Infinity, largestError: 0 },
    NOT_COMPARED,
    { speedup: 4, psnr: closeness(10), largestError: 10 },
  ]);
  assert.deepEqual(compare([LOSSY, BASELINE])[0], NOT_COMPARED);
});

Deno.test("the table shows each rung by what it adds", () => {
  const [heading, rows] = tableOf([BASELINE, REFERENCE, FAILED, LOSSY]);
  assert.equal(heading.length, 12);
  assert.deepEqual(rows, [
    [
      "00_baseline_fp32",
      "1.00",
      "150.0",
      "2.00",
      "0.50",
      "400.0",
      "0.50",
      "2.0",
      "1.0",
      "48.1",
      "1/255",
      "exact",
    ],
    ["01_bfloat16", "1.00", "75.0", "2.00", "0.50", "200.0", "1.00", "2.0", "1.0", "equal", "0/255", "exact"],
    ["+ 05_flash_attention", ...Array(10).fill("-"), "failed"],
    ["+ 06_float8", "1.00", "18.8", "2.00", "0.50", "50.0", "4.00", "2.0", "1.0", "28.1", "10/255", "lossy"],
  ]);
});

Deno.test("the chart is an SVG whose bars are as long as the times", () => {
  const svg = parseXml(chartOf([BASELINE, REFERENCE, FAILED, LOSSY], "FLUX & <one> GPU"));
  assert.equal(svg.name, "svg");
  assert.equal(svg.attributes.xmlns, "http://www.w3.org/2000/svg");
  const texts = svg.children.filter(({ name }) => name === "text").map(({ text }) => text);
  assert.ok(texts.includes("FLUX & <one> GPU"));
  for (const label of ["00_baseline_fp32", "400.0 ms, 0.50 x", "+ 05_flash_attention", "failed"]) {
    assert.ok(texts.includes(label), label);
  }
  assert.ok(texts.includes("50.0 ms, 4.00 x, lossy"));
  const [ground, ...bars] = svg.children.filter(({ name }) => name === "rect");
  const widths = bars.map(({ attributes }) => Number(attributes.width));
  for (const [i, share] of [1, 0.5, 0, 0.125].entries()) {
    assert.ok(Math.abs(widths[i] / widths[0] - share) < 1e-3, `bar ${i} is ${widths[i]} wide`);
  }
  assert.ok(widths.every((width) => width < Number(ground.attributes.width) / 2 + 100));
  const colours = bars.map(({ attributes }) => attributes.fill);
  assert.ok(colours[0] === colours[1] && colours[3] !== colours[0], "lossy rungs have a colour of their own");
});

Deno.test("any chart is well-formed and stays inside its frame", () => {
  const text = fc.string({ unit: "binary" });
  const value = fc.option(fc.double({ min: 0, max: 1e9, noNaN: true }), { nil: undefined });
  const bar = fc.record({ label: text, value, note: text, accent: fc.boolean() });
  fc.assert(fc.property(text, text, fc.array(bar, { maxLength: 12 }), (title, subtitle, bars) => {
    const svg = parseXml(barChart({ title, subtitle, bars }));
    const size = (name: string) => Number(svg.attributes[name]);
    assert.equal(svg.attributes.viewBox, `0 0 ${size("width")} ${size("height")}`);
    const rects = svg.children.filter(({ name }) => name === "rect");
    assert.equal(rects.length, bars.length + 1);
    for (const { attributes: { x = "0", y = "0", width, height } } of rects) {
      assert.ok(Number(width) >= 0 && Number(x) + Number(width) <= size("width"), `width ${width}`);
      assert.ok(Number(y) + Number(height) <= size("height"), `bottom of ${y}`);
    }
    const texts = svg.children.filter(({ name }) => name === "text");
    assert.equal(texts.length, 2 * bars.length + 2);
  }));
});

Deno.test("parseXml refuses what is not well-formed", () => {
  const wrong = [
    "<a>",
    "<a></b>",
    "<a/><b/>",
    "<a>&</a>",
    "<a>&amp</a>",
    '<a b="1" b="2"/>',
    "<a>\x01</a>",
    "x<a/>",
  ];
  for (const text of wrong) assert.throws(() => parseXml(text), { name: "AssertionError" }, text);
  assert.throws(() => parseXml("<a><</a>"), { name: "AssertionError" });
  assert.equal(parseXml('<a b="&quot;">&lt;<c/></a>').attributes.b, '"');
});

/** A recipe that cannot be applied. */
function failing(name: string, error: Error): Recipe {
  const apply = () => {
    throw error;
  };
  return { name, exact: true, devices: ["cpu"], apply };
}

Deno.test("a rung that fails does not stop the others; a wrong call or a bug stops all", async () => {
  const flags = { ...createParser("p", "d").parse([], { from: "user" }).opts(), warmups: 0, runs: 1 };
  const quick = { ...flags, ckpt: goldenPath("schnell-like"), height: 32, width: 32, num_inference_steps: 1 };
  const climbing = (ladder: Recipe[][], notes: string[] = []) =>
    climb(ladder, quick, (text) => notes.push(text));
  const large = failing("00_baseline_fp32", new OutOfMemoryError("too large"));
  const lacking = failing("05_flash_attention", new FfiError("no library"));

  const notes: string[] = [];
  const { rungs, setting } = await climbing([[large], [bfloat16], [bfloat16, lacking]], notes);
  assert.deepEqual(rungs.map((rung) => "error" in rung ? rung.error : rung.recipes.join()), [
    "too large",
    "01_bfloat16",
    "no library",
  ]);
  assert.deepEqual(notes, ["00_baseline_fp32 failed: too large", "+ 05_flash_attention failed: no library"]);
  assert.equal(setting.model, "schnell-like");
  assert.deepEqual(tableOf(rungs)[1].map((row) => row.at(-1)), ["failed", "exact", "failed"]);

  await assert.rejects(climbing([[lacking], [bfloat16]]), { message: "no library" });
  await assert.rejects(climbing([[large]]), { name: "OutOfMemoryError", message: "too large" });
  await assert.rejects(climbing([[bfloat16], [failing("x", new TypeError("a bug"))]]), { name: "TypeError" });
});

const NAMES = cumulativeRungs("cpu").map((recipes) => recipes.map(({ name }) => name));
const small = (folder: string, ...args: string[]) => [
  ...["--cache-dir", join(folder, "cache"), "--height", "32", "--width", "32", "--num_inference_steps", "2"],
  ...["--runs", "2", "--warmups", "1", ...args],
];

Deno.test("ladder measures all rungs, and prints and draws them", () =>
  inFolder(async (folder) => {
    const chart = join(folder, "chart.svg");
    const result = await runTask("ladder", ...small(folder, "--chart", chart, "--verbose"));
    assert.equal(result.code, 0, result.stderr);
    assert.match(result.stdout, /^tiny on cpu \(.*\), 32 x 32, steps: 2, medians of 2\n/);
    for (const recipes of NAMES) {
      const line = new RegExp(
        `^  (\\+ )?${recipes.at(-1)}( +\\d+(\\.\\d+)?){8} +(equal|\\d+\\.\\d) +\\d+/255 +(exact|lossy)$`,
        "m",
      );
      assert.match(result.stdout, line);
      assert.match(result.stderr, new RegExp(`${recipes.at(-1)}: \\d+(\\.\\d+)? ms a picture`));
    }
    assert.match(result.stdout, /01_bfloat16.* 1\.00 .*equal +0\/255 +exact/);
    const svg = parseXml(await Deno.readTextFile(chart));
    const labels = svg.children.map(({ text }) => text.replace("+ ", ""));
    for (const recipes of NAMES) assert.ok(labels.includes(recipes.at(-1)!));
    assert.deepEqual(namesIn(folder), ["cache", "chart.svg"]);
  }));

Deno.test("ladder --json gives every number, and no NaN", () =>
  inFolder(async (folder) => {
    const { code, stdout, stderr } = await runTask("ladder", ...small(folder, "--json", "--seed", "-1"));
    assert.equal(code, 0, stderr);
    assert.equal(stderr, "");
    const report = JSON.parse(stdout, (key, value) => {
      assert.notEqual(value, null, `${key} was NaN or infinite`);
      return value;
    });
    assert.deepEqual([report.seed, report.runs, report.numInferenceSteps], ["-1", 2, 2]);
    assert.deepEqual(report.rungs.map(({ recipes }: Measured) => recipes), NAMES);
    for (const { recipes, exact, milliseconds, memory, speedup, psnr, equal } of report.rungs) {
      assert.ok(milliseconds.whole.median > 0 && memory.peak > 0 && speedup > 0);
      assert.equal(milliseconds.steps.length, 2);
      assert.ok(equal ? psnr === undefined : psnr > (exact ? 20 : 5), `${recipes}: ${psnr} dB`);
      if (recipes.length === 1) assert.equal(equal, recipes[0] === "01_bfloat16");
    }
    // Each rung has a device of its own: bfloat16's peak is not float32's.
    assert.ok(report.rungs[1].memory.peak < report.rungs[0].memory.peak);
  }));

Deno.test("ladder --markdown prints a table, of random weights too", () =>
  inFolder(async (folder) => {
    const args = ["--markdown", "--ckpt", goldenPath("schnell-like"), "--random-weights", "--height", "40"];
    const { code, stdout, stderr } = await runTask("ladder", ...small(folder, ...args));
    assert.equal(code, 0, stderr);
    assert.match(stdout, /^schnell-like with random weights on cpu/);
    const rows = stdout.split("\n").filter((line) => line.startsWith("|"));
    assert.equal(rows.length, NAMES.length + 2);
    for (const row of rows) assert.equal(row.split("|").length, 14, row);
    assert.equal(stderr, "ladder: height 40 is no multiple of 16: using 32\n", "once, not for each picture");
  }));

Deno.test("ladder ends wrong calls with one clear line and an exit code", async (test) => {
  const cases: [string[], number, RegExp][] = [
    [["--json", "--markdown"], 2, /'--markdown' cannot be used with option '--json'/],
    [["--chart", "chart.png"], 2, /SVG/],
    [["--chart", "/nowhere/chart.svg"], 1, /\/nowhere does not exist/],
    [["--runs", "0"], 2, /--runs/],
    [["--disable_bf16"], 2, /unknown option '--disable_bf16'/],
    [["--ckpt", "/nowhere"], 1, /no such model folder/],
    [["--height", "8"], 2, /height is 8: give 16 or more/],
    [["--device", "hip"], 1, /hip/],
  ];
  await inFolder(async (folder) => {
    await checkWrongCalls(test, "ladder", cases, small(folder));
  });
});

Deno.test("ladder --help teaches with examples", async () => {
  const { code, stdout } = await runTask("ladder", "--help");
  assert.equal(code, 0);
  for (const flag of ["--runs", "--warmups", "--markdown", "--chart", "--json", "--random-weights"]) {
    assert.ok(stdout.includes(`${flag} `), flag);
  }
  assert.match(stdout, /Examples:\n\s+deno task ladder/);
});

Deno.test("ladder leaves nothing behind on Ctrl-C", () =>
  inFolder(async (folder) => {
    const chart = join(folder, "chart.svg");
    const child = taskCommand("ladder", small(folder, "--runs", "1", "--verbose", "--chart", chart)).spawn();
    const reader = child.stderr.getReader();
    await reader.read(); // the first rung is measured
    child.kill("SIGINT");
    while (!(await reader.read()).done);
    await child.stdout.cancel();
    assert.ok(!(await child.status).success);
    assert.deepEqual(namesIn(folder).filter((name) => name !== "cache"), []);
  }));
