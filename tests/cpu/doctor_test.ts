/** `deno task doctor`: what is found, what is missing, and what to type. */
import assert from "node:assert/strict";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { type FoundLibrary, type Inventory, takeInventory } from "../../ffi/inventory.ts";
import { describe, readiness } from "../../recipes/doctor.ts";
import { inFolder } from "../support/folders.ts";
import { missingOneDnn } from "../support/providers.ts";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));

/** The command line of the task `doctor`, so that its permissions are what is tested. */
const TASK: string = JSON.parse(Deno.readTextFileSync(join(ROOT, "deno.json"))).tasks.doctor.command;

async function run(env: Record<string, string>, ...args: string[]) {
  const [program, subcommand, ...flags] = TASK.split(" ");
  const { code, stdout, stderr } = await new Deno.Command(program, {
    args: [subcommand, "--quiet", ...flags, ...args], // quiet about packages that Deno looks for
    cwd: ROOT,
    clearEnv: true,
    env: { HOME: Deno.env.get("HOME") ?? "", ...env },
  }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

const NAMES = [
  "NVIDIA driver",
  "NVML",
  "NVRTC",
  "cuBLASLt",
  "cuDNN",
  "CUPTI",
  "FlashAttention-3",
  "NCCL",
  "HIP",
  "hipRTC",
  "hipBLASLt",
  "MIOpen",
  "AITER",
  "oneDNN",
] as const;

/** A machine with the named libraries and as many GPUs. */
function machine(present: readonly string[], gpus: number, kind: "cuda" | "hip" = "cuda"): Inventory {
  const libraries = NAMES.map((name): FoundLibrary => ({
    name,
    purpose: `for ${name}`,
    install: `get ${name}`,
    ...(present.includes(name)
      ? { path: `/lib/${name}.so`, version: "1.2.3", problem: undefined }
      : { path: undefined, version: undefined, problem: `${name} was not found` }),
  }));
  return {
    libraries,
    gpus: Array.from({ length: gpus }, (_, i) => ({
      device: `${kind}:${i}`,
      ...(kind === "cuda"
        ? { description: "NVIDIA H100 80GB HBM3", memoryBytes: 85e9, architecture: "compute capability 9.0" }
        : { description: "AMD Instinct MI300X", memoryBytes: 206e9, architecture: "gfx942" }),
    })),
    driverVersion: kind === "cuda" && gpus > 0 ? "580.159.04" : undefined,
    cudaVersion: kind === "cuda" && gpus > 0 ? "13.0" : undefined,
    hipVersion: kind === "hip" && gpus > 0 ? "6.2.41133" : undefined,
  };
}

Deno.test("doctor on a machine that has all says so, and nothing is left to install", () => {
  const inventory = machine(NAMES, 2);
  const recipes = readiness(inventory);
  assert.ok(
    recipes.length >= 4 && recipes.every(({ ready, fasterWith }) => ready && fasterWith.length === 0),
  );
  const text = describe(inventory, recipes);
  assert.match(text, /cuDNN +1\.2\.3 +for cuDNN +\/lib\/cuDNN\.so/);
  assert.match(text, /cuda:1 +NVIDIA H100 80GB HBM3 +79\.2 GiB +compute capability 9\.0/);
  assert.match(text, /driver 580\.159\.04, takes CUDA up to 13\.0/);
  assert.match(text, /01_bfloat16 +cuda +ready$/m);
  assert.doesNotMatch(text, /needs|To install/);
});

Deno.test("doctor names what each recipe lacks, and how to get it, once", () => {
  const inventory = machine(["NVIDIA driver", "NVML", "NVRTC", "cuBLASLt"], 1);
  const text = describe(inventory, readiness(inventory));
  assert.match(text, /01_bfloat16 +cuda +needs cuDNN$/m);
  assert.match(text, /01_bfloat16 +cpu +ready \(faster with oneDNN\)$/m);
  assert.equal(text.match(/get cuDNN/g)?.length, 1);
  assert.match(text, /get oneDNN/);
  assert.match(text, /CUPTI +get CUPTI$/m, "for traces");
  assert.match(text, /FlashAttention-3 +get FlashAttention-3$/m, "for --attention fa3");
  assert.doesNotMatch(text, /get NCCL/, "nothing needs it yet");
});

Deno.test("doctor on a machine with AMD GPUs asks for what is AMD's", () => {
  const inventory = machine(["HIP", "hipRTC", "hipBLASLt", "oneDNN"], 1, "hip");
  const text = describe(inventory, readiness(inventory));
  assert.match(text, /hip:0 +AMD Instinct MI300X +191\.9 GiB +gfx942$/m);
  assert.match(text, /^ +HIP 6\.2\.41133$/m);
  assert.match(text, /05_flash_attention +hip +needs MIOpen$/m);
  assert.match(text, /MIOpen +get MIOpen$/m);
  assert.match(text, /AITER +get AITER$/m);
  assert.doesNotMatch(text, /get (cuDNN|CUPTI|NVIDIA driver|FlashAttention-3)/);
  const complete = machine(["HIP", "hipRTC", "hipBLASLt", "MIOpen"], 1, "hip");
  const ready = describe(complete, readiness(complete));
  assert.match(ready, /06_float8 +hip +ready \(faster with AITER\)$/m);
});

Deno.test("doctor asks for CUPTI and FlashAttention-3 only where there is a GPU", () => {
  const inventory = machine(["NVIDIA driver", "NVML", "NVRTC", "cuBLASLt", "cuDNN", "oneDNN"], 0);
  assert.doesNotMatch(describe(inventory, readiness(inventory)), /get (CUPTI|Flash)/);
});

Deno.test("doctor works with nothing installed: exit code 0, a table and JSON that agree", async () => {
  const { code, stdout, stderr } = await run({});
  assert.equal(code, 0, stderr);
  assert.equal(stderr, "");
  for (const title of ["Libraries", "GPUs", "Recipes"]) assert.match(stdout, new RegExp(`^${title}$`, "m"));
  assert.match(stdout, /00_baseline_fp32 +cpu +ready/);
  const json = await run({}, "--json");
  assert.equal(json.code, 0);
  const report = JSON.parse(json.stdout);
  assert.deepEqual(report.libraries.map(({ name }: FoundLibrary) => name), NAMES);
  for (const { name, problem } of report.libraries as FoundLibrary[]) {
    assert.equal(new RegExp(`^  ${name} +- `, "m").test(stdout), problem !== undefined, name);
  }
  assert.equal(report.recipes[0].ready, true);
});

Deno.test("doctor says why a library that is there does not open", () =>
  inFolder(async (folder) => {
    Deno.writeTextFileSync(join(folder, "libcudnn.so.9"), "no library");
    const { code, stdout } = await run({ FLUX_LIB_PATH: folder });
    assert.equal(code, 0);
    assert.match(stdout, /cuDNN +- +.*cuDNN was found but could not be opened: .*libcudnn\.so\.9/);
    assert.match(stdout, /01_bfloat16 +cuda +needs .*cuDNN/);
  }));

Deno.test("doctor finds FlashAttention-3 among Python packages, and opens nothing for it", () =>
  inFolder(async (folder) => {
    for (const path of ["fa3_fwd/_C.abi3.so", "torch/lib/libtorch_cuda.so"]) {
      Deno.mkdirSync(dirname(join(folder, path)), { recursive: true });
      Deno.writeTextFileSync(join(folder, path), "only looked for");
    }
    for (const info of ["fa3_fwd-0.0.3", "torch-2.11.0+cu130"]) {
      Deno.mkdirSync(join(folder, `${info}.dist-info`));
    }
    const { code, stdout } = await run({ FLUX_LIB_PATH: folder });
    assert.equal(code, 0);
    const row = /^ +FlashAttention-3 +(\S.*?) {2,}attention by --attention fa3 +(\S+)$/m.exec(stdout);
    assert.deepEqual(row?.slice(1), [
      "fa3_fwd 0.0.3, PyTorch 2.11.0+cu130",
      join(folder, "fa3_fwd/_C.abi3.so"),
    ]);
  }));

Deno.test("doctor refuses flags that it does not have", async () => {
  const { code, stderr } = await run({}, "--frobnicate");
  assert.equal(code, 2);
  assert.match(stderr, /unknown option '--frobnicate'/);
});

const noOneDnn = missingOneDnn();
Deno.test({
  name: `the inventory reads oneDNN's version${noOneDnn === undefined ? "" : ` (skipped: ${noOneDnn})`}`,
  ignore: noOneDnn !== undefined,
  sanitizeResources: false, // it keeps the libraries open
  fn: () => {
    const found = takeInventory().libraries.find(({ name }) => name === "oneDNN")!;
    assert.match(found.version ?? "", /^2\.\d+\.\d+$/);
    assert.match(found.path ?? "", /libdnnl\.so\.2$/);
  },
});

const noNvrtc = takeInventory().libraries.find(({ name }) => name === "NVRTC")!.problem;
Deno.test({
  name: `the inventory reads the CUDA libraries' versions${
    noNvrtc === undefined ? "" : ` (skipped: ${noNvrtc})`
  }`,
  ignore: noNvrtc !== undefined,
  sanitizeResources: false,
  fn: () => {
    for (const { name, version, problem } of takeInventory().libraries) {
      if (problem === undefined && name !== "NVML") assert.match(version ?? "", /\d+\.\d+/, name);
    }
  },
});
