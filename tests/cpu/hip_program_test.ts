/**
 * The programs with `--device hip`, as a user runs them, by the shim over stand-ins for CUDA on the CPU: all recipes, the
 * exported model, doctor, and what is said without ROCm.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import { readPngText } from "../../recipes/base/image.ts";
import { missingCompiler } from "../support/fake_cuda.ts";
import { inFolder } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";
import { hipOnCpu } from "../support/hip_shim.ts";
import { namesIn, runTask } from "../support/programs.ts";

const before = Deno.env.get("FLUX_LIB_PATH");
const skip = missingCompiler();
if (skip === undefined) hipOnCpu(); // found by the processes that are started here, too

function programTest(title: string, body: (folder: string) => Promise<void>): void {
  Deno.test({
    name: `--device hip: ${title}${skip === undefined ? "" : ` (skipped: ${skip})`}`,
    ignore: skip !== undefined,
    fn: () => inFolder(body),
  });
}

const SMALL = ["--device", "hip", "--ckpt", goldenPath("dev-like"), "--height", "32", "--width", "32"];
const STEPS = ["--num_inference_steps", "2", "--max_sequence_length", "16"];

programTest("draws with all recipes, exports the model, and draws the same from it", async (folder) => {
  const cache = ["--cache-dir", join(folder, "cache")];
  const draw = (name: string, ...flags: string[]) =>
    runTask("generate", ...SMALL, ...STEPS, ...cache, "--output-file", join(folder, name), ...flags);
  const first = await draw("first.png", "--verbose");
  assert.equal(first.code, 0, first.stderr);
  assert.match(first.stderr + first.stdout, /hipBLASLt 1\.0\.0/);
  const png = Deno.readFileSync(join(folder, "first.png"));
  const { parameters } = readPngText(png);
  for (
    const recipe of ["01_bfloat16", "02_compile", "03_fuse_qkv", "04_channels_last", "06_float8", "07_tuning"]
  ) {
    assert.ok(parameters.includes(recipe), `${recipe} is not in ${parameters}`);
  }
  assert.ok(namesIn(join(folder, "cache")).includes("exported"));
  const second = await draw("second.png", "--use-cached-model");
  assert.equal(second.code, 0, second.stderr);
  assert.doesNotMatch(second.stderr, /differ|another|again/);
  assert.deepEqual(Deno.readFileSync(join(folder, "second.png")), png);
});

programTest(
  "a provider of another vendor is a usage error, AITER that is missing says how to get it",
  async (folder) => {
    // What the stand-ins compile is linked with them, and they are others in each process: no cache outlasts it.
    const cache = ["--cache-dir", join(folder, "cache")];
    const draw = (...flags: string[]) =>
      runTask("generate", ...SMALL, ...STEPS, ...cache, "--output-file", join(folder, "a.png"), ...flags);
    const cudnn = await draw("--attention", "cudnn");
    assert.equal(cudnn.code, 2, cudnn.stderr);
    assert.match(cudnn.stderr, /cuDNN is for NVIDIA GPUs, not for hip:0/);
    const aiter = await draw("--attention", "aiter");
    assert.equal(aiter.code, 1, aiter.stderr);
    assert.match(aiter.stderr, /AITER was not found.*\n.*pip install amd-aiter/);
  },
);

programTest("doctor lists ROCm's libraries and the GPU", async () => {
  const { code, stdout } = await runTask("doctor");
  assert.equal(code, 0);
  assert.match(stdout, /^ +HIP +6\.2\.41133 +the GPU \(AMD\) +\S+libamdhip64\.so\.7$/m);
  assert.match(stdout, /^ +MIOpen +3\.2\.0 /m);
  assert.match(stdout, /^ +hip:0 +Fake GPU 0 +1\.0 GiB +gfx950$/m);
  assert.match(stdout, /^ +06_float8 +hip +ready \(faster with AITER\)$/m);
});

Deno.test("--device hip: without ROCm the message names the library, the places and what to install", () =>
  inFolder(async (folder) => {
    const now = Deno.env.get("FLUX_LIB_PATH");
    if (before === undefined) Deno.env.delete("FLUX_LIB_PATH");
    else Deno.env.set("FLUX_LIB_PATH", before);
    try {
      const { code, stderr } = await runTask("generate", ...SMALL, "--output-file", join(folder, "a.png"));
      if (code === 0) return; // a machine with an AMD GPU
      assert.equal(code, 1, stderr);
      assert.match(stderr, /libamdhip64\.so\.7, libamdhip64\.so\.6|hipInit failed/);
      assert.match(stderr, /install ROCm 6\.1 or newer|rocminfo/);
    } finally {
      if (now !== undefined) Deno.env.set("FLUX_LIB_PATH", now);
    }
  }));
