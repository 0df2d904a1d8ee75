/** `deno task benchmark` as a user runs it. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { readPngText } from "../../recipes/base/image.ts";
import { inFolder } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";
import { checkWrongCalls, namesIn, runTask, taskCommand } from "../support/programs.ts";

/** A small picture of the embedded model, with all that is written in `folder`. */
const small = (folder: string, ...args: string[]) => [
  ...["--cache-dir", join(folder, "cache"), "--output-file", join(folder, "a.png")],
  ...["--height", "32", "--width", "48", ...args],
];

Deno.test("benchmark draws the picture, prints the table and writes a trace", () =>
  inFolder(async (folder) => {
    const args = ["--runs", "2", "--warmups", "1", "--trace-file", join(folder, "t.json.gz"), "--verbose"];
    const { code, stdout, stderr } = await runTask("benchmark", ...small(folder, ...args));
    assert.equal(code, 0, stderr);
    assert.match(stderr, /run_benchmark: matmul: /);
    assert.match(stdout, /^tiny on cpu \(.*\), 01_bfloat16/);
    assert.match(stdout, /48 x 32, steps: 4, seed 42, warm-ups: 1, timed pictures: 2/);
    for (const part of ["whole picture", "text encoders", "one step", "decoder", "post-processing"]) {
      assert.match(stdout, new RegExp(`^  ${part}( +\\d+\\.\\d\\d){5}$`, "m"));
    }
    assert.match(stdout, /^time mean\/var: \d+\.\d+ s, \S+ s\^2$/m);
    assert.match(stdout, /^a step: \S+ TFLOP in Linear layers, \S+ in attention: \S+ TFLOP\/s$/m);
    assert.match(stdout, /memory: weights \d+\.\d+ GB, activations \d+\.\d+ GB at most/);
    assert.doesNotMatch(stdout, /NaN|undefined/);
    assert.deepEqual(namesIn(folder), ["a.png", "cache", "t.json.gz"]);
    const stream = new Blob([await Deno.readFile(join(folder, "t.json.gz"))]).stream();
    const trace = await new Response(stream.pipeThrough(new DecompressionStream("gzip"))).json();
    assert.ok(trace.traceEvents.length > 100);
  }));

Deno.test("benchmark --json prints one object of finite numbers, and draws what generate draws", () =>
  inFolder(async (folder) => {
    const args = ["--runs", "3", "--warmups", "0", "--json", "--num_inference_steps", "2", "--disable_bf16"];
    const seed = ["--seed", "18446744073709551615", "--prompt", "a red apple"];
    const { code, stdout, stderr } = await runTask("benchmark", ...small(folder, ...args, ...seed));
    assert.equal(code, 0, stderr);
    assert.equal(stderr, "");
    const report = JSON.parse(stdout, (key, value) => {
      assert.notEqual(value, null, `${key} was NaN or infinite`);
      return value;
    });
    assert.equal(report.recipes[0], "00_baseline_fp32");
    assert.deepEqual([report.seed, report.runs, report.warmups], ["18446744073709551615", 3, 0]);
    const { milliseconds, step, memory } = report;
    assert.equal(milliseconds.pictures.length, 3);
    assert.equal(milliseconds.first, milliseconds.pictures[0], "without warm-ups it is timed");
    assert.equal(milliseconds.whole.min, Math.min(...milliseconds.pictures));
    assert.equal(milliseconds.steps.length, 2);
    for (const part of ["whole", "text", "step", "decode", "postprocess"]) {
      const { mean, variance, median, min, max } = milliseconds[part];
      assert.ok(min > 0 && min <= median && median <= max && mean <= max && variance >= 0, part);
    }
    const expected = (step.linear + step.attention) / milliseconds.step.median / 1e9;
    assert.ok(Math.abs(step.teraflopsPerSecond / expected - 1) < 1e-9);
    const { milliseconds: floor, rates, share } = step.floor;
    assert.ok(Math.abs(floor * rates.f32 * 1e9 / (step.linear + step.attention) - 1) < 1e-9);
    assert.ok(Math.abs(share * milliseconds.step.median / floor - 1) < 1e-9);
    assert.deepEqual(Object.keys(rates), ["f32"]);
    assert.ok(memory.peak > 0 && memory.reserved >= memory.peak);

    const other = join(folder, "b.png");
    const same = ["--num_inference_steps", "2", "--disable_bf16", ...seed, "--output-file", other];
    assert.equal((await runTask("generate", ...small(folder, ...same))).code, 0);
    const picture = await Deno.readFile(report.path);
    assert.deepEqual(await Deno.readFile(other), picture);
    assert.match(readPngText(picture).parameters, /^a red apple\n.*00_baseline_fp32/);
  }));

Deno.test("benchmark --random-weights makes weights up, and tells each warning once", () =>
  inFolder(async (folder) => {
    const model = ["--ckpt", goldenPath("schnell-like"), "--random-weights"];
    const args = ["--runs", "2", "--warmups", "1", "--json", "--guidance_scale", "2", "--height", "40"];
    const { code, stdout, stderr } = await runTask("benchmark", ...small(folder, ...model, ...args));
    assert.equal(code, 0, stderr);
    assert.equal(JSON.parse(stdout).model, "schnell-like with random weights");
    assert.match(stderr, /^run_benchmark: .*no guidance.*\nrun_benchmark: height 40 .*using 32\n$/);
  }));

Deno.test("benchmark ends wrong calls with one clear line and an exit code", async (test) => {
  const cases: [string[], number, RegExp][] = [
    [["--runs", "0"], 2, /--runs.*'0'.*whole number from 1/],
    [["--warmups", "-1"], 2, /--warmups/],
    [["--image", "photo.png"], 2, /Kontext/],
    [["--device", "hip"], 1, /hip/],
    [["--trace-file", "/nowhere/t.json"], 1, /\/nowhere does not exist/],
    [["--trace-file", ""], 2, /path/],
    [["surplus"], 2, /too many arguments/],
  ];
  await inFolder(async (folder) => {
    await checkWrongCalls(test, "benchmark", cases, small(folder));
    assert.deepEqual(namesIn(folder).filter((name) => name !== "cache"), []);
  });
});

Deno.test("benchmark --help teaches with examples", async () => {
  const { code, stdout } = await runTask("benchmark", "--help");
  assert.equal(code, 0);
  for (const flag of ["--runs", "--warmups", "--trace-file", "--random-weights", "--device", "--json"]) {
    assert.ok(stdout.includes(`${flag} `), flag);
  }
  assert.match(stdout, /--warmups <n>[^-]*\(default: 3\)/);
  assert.match(stdout, /--runs <n>[^-]*\(default: 10\)/);
  assert.match(stdout, /Examples:\n\s+deno task benchmark/);
});

Deno.test("benchmark leaves nothing behind on Ctrl-C", () =>
  inFolder(async (folder) => {
    const child = taskCommand("benchmark", small(folder, "--runs", "10000", "--verbose")).spawn();
    const reader = child.stderr.getReader();
    await reader.read(); // the device is open and the model loaded
    child.kill("SIGINT");
    while (!(await reader.read()).done);
    await child.stdout.cancel();
    assert.ok(!(await child.status).success);
    assert.deepEqual(namesIn(folder).filter((name) => name !== "cache"), []);
  }));
