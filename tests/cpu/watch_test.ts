/** `deno task watch`, and what it is made of. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { fileChanges } from "../../recipes/base/file_changes.ts";
import { inFolder } from "../support/folders.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { liveDrawingSuite } from "../support/live_drawing_suite.ts";
import { checkWrongCalls, ROOT, runTask, taskCommand } from "../support/programs.ts";

liveDrawingSuite(TEST_GPU);

Deno.test("fileChanges gives a change once, however an editor writes it", () =>
  inFolder(async (folder) => {
    const path = join(folder, "a.cu");
    Deno.writeTextFileSync(path, "1");
    const changes = fileChanges([folder]);
    Deno.readTextFileSync(path); // no change
    Deno.writeTextFileSync(path, "2");
    assert.deepEqual((await changes.next()).value, [path]);
    // To a temporary file, then renamed.
    Deno.writeTextFileSync(join(folder, "b.tmp"), "3");
    Deno.renameSync(join(folder, "b.tmp"), path);
    assert.ok((await changes.next()).value!.includes(path));
    const next = changes.next();
    const nothing = Symbol();
    assert.equal(
      await Promise.race([next, new Promise((resolve) => setTimeout(resolve, 200, nothing))]),
      nothing,
    );
    Deno.writeTextFileSync(path, "4");
    assert.deepEqual((await next).value, [path]);
    await changes.return();
  }));

const RECIPE = (number: number) => `
  import type { Recipe } from ${JSON.stringify(join(ROOT, "recipes/base/plan.ts"))};
  const apply: Recipe["apply"] = (plan) => ({
    ...plan,
    ops: { ...plan.ops, toPixels: (x) => plan.ops.toPixels(plan.ops.multiply(x, x)) },
  });
  export const mine${number}: Recipe = { name: "mine_${number}", exact: false, devices: ["cpu"], apply };
`;

Deno.test("watch draws again when a recipe of one's own changes, and waits where it is wrong", () =>
  inFolder(async (folder) => {
    const recipe = join(folder, "mine.ts");
    const picture = join(folder, "a.png");
    Deno.writeTextFileSync(recipe, RECIPE(1));
    const args = [
      "--output-file",
      picture,
      "--cache-dir",
      join(folder, "cache"),
      "--height",
      "32",
      "--width",
      "32",
    ];
    const child = taskCommand("watch", [recipe, ...args]).spawn();
    const texts = child.stdout.pipeThrough(new TextDecoderStream())[Symbol.asyncIterator]();
    const errors = child.stderr.pipeThrough(new TextDecoderStream())[Symbol.asyncIterator]();
    /** Reads until the text is there. */
    const until = async (stream: AsyncIterator<string>, pattern: RegExp) => {
      let seen = "";
      while (!pattern.test(seen)) {
        const { value, done } = await stream.next();
        assert.ok(!done, `it has ended after: ${seen}`);
        seen += value;
      }
      return seen;
    };
    try {
      assert.match(
        await until(texts, /\n/),
        new RegExp(`^01_bfloat16, .*, mine_1: ${picture}  \\d+\\.\\d\\d s\\n`),
      );
      assert.ok(Deno.statSync(picture).size > 100);
      Deno.writeTextFileSync(recipe, RECIPE(2));
      assert.match(await until(texts, /\n/), /mine_2: /);
      Deno.writeTextFileSync(recipe, `${RECIPE(3)} what is this`);
      await until(errors, /mine\.ts.*waiting for a change/s);
      Deno.writeTextFileSync(recipe, RECIPE(4));
      assert.match(await until(texts, /\n/), /mine_4: /);
      Deno.writeTextFileSync(recipe, "export {};"); // a wrong call at first, a mistake to mend later
      await until(errors, /exports no recipe[^]*waiting for a change/);
      Deno.writeTextFileSync(recipe, RECIPE(5));
      assert.match(await until(texts, /\n/), /mine_5: /);
    } finally {
      child.kill("SIGKILL"); // not even then the drawing program stays: it holds these streams open
      await child.status;
      while (!(await texts.next()).done);
      while (!(await errors.next()).done);
    }
  }));

Deno.test("watch ends wrong calls with one clear line and an exit code", async (test) => {
  const rung = join(ROOT, "recipes/01_bfloat16.ts");
  const cases: [string[], number, RegExp][] = [
    [[], 2, /give the recipe's file first/],
    [["--device", "cpu"], 2, /give the recipe's file first/],
    [["/nowhere/mine.ts"], 1, /there is no recipe \/nowhere\/mine\.ts/],
    [[rung, "--seed", "x"], 2, /--seed/],
    [[join(ROOT, "recipes/base/plan.ts")], 2, /exports no recipe/],
    [[join(ROOT, "recipes/04_channels_last.ts")], 2, /runs on cuda and hip, not on cpu/],
  ];
  await checkWrongCalls(test, "watch", cases);
  const { code, stdout } = await runTask("watch", "--help");
  assert.equal(code, 0);
  assert.match(stdout, /Examples:\n\s+deno task watch recipes/);
});
