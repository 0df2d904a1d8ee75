/** The notebooks' code on the GPU, as programs: no Jupyter is needed there, and what they show is dropped. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { inFolder } from "../support/folders.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { notebookProgram } from "../support/notebooks.ts";
import { ended, ROOT } from "../support/programs.ts";
import { testOn } from "../support/test_device.ts";

/** Runs a notebook's program and returns what it prints. */
async function run(name: string): Promise<string> {
  const printed = await inFolder(async (folder) => {
    const path = join(folder, `${name}.ts`);
    const code = notebookProgram(name).replaceAll("Deno.jupyter.display(", "Promise.resolve(");
    await Deno.writeTextFile(path, code);
    const permissions = ["--no-prompt", "--allow-read", "--allow-ffi", "--allow-env", "--allow-sys=cpus"];
    const { code: exitCode, stdout, stderr } = await ended(
      new Deno.Command("deno", {
        args: ["run", "--no-check", "--config", join(ROOT, "deno.json"), ...permissions, path],
        cwd: join(ROOT, "examples"),
        env: { NO_COLOR: "1" },
      }),
    );
    assert.equal(exitCode, 0, stdout + stderr);
    return stdout;
  });
  console.log(printed); // the times are what a reader of the log wants to see
  return printed;
}

testOn(TEST_GPU, "01_first_image draws the same picture twice", async () => {
  assert.match(await run("01_first_image"), /seed 42 again: equal/);
});

testOn(TEST_GPU, "02_the_ladder climbs to its last rung", async () => {
  const printed = await run("02_the_ladder");
  assert.doesNotMatch(printed, /No GPU/);
  for (const name of ["00_baseline_fp32", "04_channels_last", "06_float8", "07_tuning"]) {
    assert.match(printed, new RegExp(`^${name} +\\d+ ms`, "m"));
  }
});

testOn(TEST_GPU, "03_write_a_kernel: one kernel is faster than two, and draws the same picture", async () => {
  const printed = await run("03_write_a_kernel");
  assert.equal(printed.match(/largest error .*\(the kernel\)/g)?.length, 3);
  const [two, one] = ["one after another", "in one"].map((name) =>
    Number(new RegExp(`${name}: ([0-9.]+) us`).exec(printed)?.[1])
  );
  assert.ok(one < two, `${one} us instead of ${two}`);
  assert.match(printed, /20 calls of our operator/);
});

testOn(TEST_GPU, "04_kontext_edit encodes and decodes a picture", async () => {
  assert.match(await run("04_kontext_edit"), /256 x 256 is encoded as 1024 x 1024/);
});
