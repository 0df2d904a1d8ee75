/** Recipe 08_export on the CUDA device, and as a user runs it: one process exports, the next one starts from that. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { exportSuite } from "../support/export_suite.ts";
import { inFolder } from "../support/folders.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { namesIn, runTask } from "../support/programs.ts";
import { testOn } from "../support/test_device.ts";

exportSuite(TEST_GPU);

testOn(
  TEST_GPU,
  "08_export: a new process compiles and measures nothing, and draws the same bytes",
  () =>
    inFolder(async (folder) => {
      const cache = join(folder, "cache");
      const generate = async (output: string, ...args: string[]) => {
        const path = join(folder, output);
        const common = ["--device", "cuda", "--cache-dir", cache, "--output-file", path, "--verbose"];
        const { code, stderr } = await runTask("generate", ...common, ...args);
        assert.equal(code, 0, stderr);
        return { stderr, png: await Deno.readFile(path) };
      };
      /** Forgets all that was compiled and measured, but for the package. */
      const forget = async () => {
        for (const name of namesIn(cache)) if (name !== "exported") await Deno.remove(join(cache, name));
      };
      const made = await generate("a.png", "--compile_export_mode", "export_aoti");
      assert.match(made.stderr, /exported 0\.\d+ GB to .*exported\/tiny-/);
      assert.ok(namesIn(cache).length > 20, "kernels were compiled");

      await forget();
      const started = await generate("b.png", "--use-cached-model");
      assert.doesNotMatch(started.stderr, /no exported model|exported 0/);
      assert.match(started.stderr, /compiled by an earlier process/);
      assert.deepEqual(namesIn(cache), ["exported"], "something was compiled or measured");
      assert.deepEqual(started.png, made.png);

      const [name] = namesIn(join(cache, "exported"));
      const path = join(cache, "exported", name);
      const bytes = await Deno.readFile(path);
      bytes[bytes.length >> 1] ^= 1;
      await Deno.writeFile(path, bytes);
      const rebuilt = await generate("c.png", "--use-cached-model");
      assert.match(rebuilt.stderr, /no exported model is used: .* is damaged: .*; building it\n/);
      assert.match(rebuilt.stderr, /exported 0\.\d+ GB to/);
      assert.deepEqual(rebuilt.png, made.png);
    }),
);
