/** Kernels that are compiled side by side before they are asked for, by a device on the fake NVRTC. */
import assert from "node:assert/strict";
import type { CudaDevice } from "../../ffi/cuda/device.ts";
import { Nvrtc } from "../../ffi/cuda/nvrtc.ts";
import { openCuda } from "../../ffi/cuda/open.ts";
import { CompileError, FfiError } from "../../ffi/errors.ts";
import type { KernelSource } from "../../ffi/gpu.ts";
import { LibraryNotFoundError } from "../../ffi/library.ts";
import { type FakeCuda, testFakeCuda, testFakeDevice } from "../support/fake_cuda.ts";
import { inFolder } from "../support/folders.ts";
import { namesIn } from "../support/programs.ts";

/** Kernels that take a while to compile. */
const SOURCES: readonly KernelSource[] = Array.from(
  { length: 6 },
  (_, i) => ({ name: `fake${i}.cu`, text: `slow ${"x".repeat(i)}` }),
);
const BROKEN = { name: "broken.cu", text: "#error, and slow" };

function askForAll(device: CudaDevice, sources = SOURCES): void {
  for (const source of sources) device.kernel(source, "fill");
}

testFakeDevice(
  "compileAhead: each text once, several at a time, and nothing behind it",
  {},
  async (device, fake) => {
    const [first] = SOURCES;
    await device.compileAhead([...SOURCES, first, { ...first }]);
    assert.equal(fake.compilations, SOURCES.length);
    const cores = Math.min(navigator.hardwareConcurrency, SOURCES.length);
    assert.equal(fake.compilationsAtOnce, cores);
    askForAll(device);
    await device.compileAhead(SOURCES);
    assert.equal(fake.compilations, SOURCES.length);
  },
);

testFakeDevice(
  "compileAhead: what was asked for before its turn is not compiled again",
  {},
  async (device, fake) => {
    const length = navigator.hardwareConcurrency + 3;
    const many = Array.from({ length }, (_, i) => ({ name: "fake.cu", text: `slow ${"x".repeat(i)}` }));
    askForAll(device, [many[1]]);
    const ahead = device.compileAhead(many);
    askForAll(device, [many[0]]); // the shortest, whose turn is the last
    await ahead;
    assert.equal(fake.compilations, length);
  },
);

testFakeDevice(
  "compileAhead: a text that does not compile fails where it is asked for",
  {},
  async (device, fake) => {
    await device.compileAhead([BROKEN, ...SOURCES]);
    assert.equal(fake.compilations, SOURCES.length + 1);
    askForAll(device);
    assert.equal(fake.compilations, SOURCES.length + 1);
    assert.throws(() => device.kernel(BROKEN, "fill"), (error) => {
      assert.ok(error instanceof CompileError);
      assert.match(error.message, /^broken\.cu does not compile for sm_90a: fake\.cu\(2\): error: #error$/);
      return true;
    });
  },
);

testFakeDevice("compileAhead: no more are begun when the signal aborts", {}, async (device, fake) => {
  const stop = new AbortController();
  const many = Array.from({ length: 200 }, (_, i) => ({ name: "fake.cu", text: `slow ${i}` }));
  const ahead = device.compileAhead(many, stop.signal);
  stop.abort();
  await ahead;
  assert.ok(fake.compilations <= navigator.hardwareConcurrency, `${fake.compilations}`);
});

testFakeCuda("compileAhead: a device that is closed meanwhile leaves nothing behind", {}, async (fake) => {
  const device = openCuda(0);
  const ahead = device.compileAhead(SOURCES);
  device[Symbol.dispose]();
  await ahead;
  assert.ok(fake.compilations <= navigator.hardwareConcurrency, `${fake.compilations}`);
  assert.equal(fake.alive, 0);
  await assert.rejects(device.compileAhead(SOURCES), FfiError);
});

/** Compiles ahead and asks for all, in a process of its own as far as the device goes. */
async function run(cacheDir: string, onWarning?: (message: string) => void): Promise<void> {
  using device = openCuda(0, { cacheDir, ...(onWarning && { onWarning }) });
  await device.compileAhead(SOURCES);
  askForAll(device);
}

testFakeCuda(
  "compileAhead: the cache is filled, and the next device compiles nothing",
  {},
  (fake: FakeCuda) =>
    inFolder(async (folder) => {
      await run(folder);
      assert.equal(fake.compilations, SOURCES.length);
      assert.equal(namesIn(folder).length, SOURCES.length);
      await run(folder);
      {
        using device = openCuda(0, { cacheDir: folder });
        askForAll(device); // by itself it finds the same
      }
      assert.equal(fake.compilations, SOURCES.length);
    }),
);

testFakeCuda(
  "compileAhead: a cache that cannot be written is one warning, and nothing is compiled twice",
  {},
  (fake) =>
    inFolder(async (folder) => {
      Deno.writeTextFileSync(`${folder}/file`, "no folder");
      const warnings: string[] = [];
      await run(`${folder}/file`, (message) => warnings.push(message));
      assert.equal(fake.compilations, SOURCES.length);
      assert.equal(warnings.length, 1, warnings.join("\n"));
    }),
);

testFakeCuda(
  "compileAhead: without a compiler it is the first kernel that says so",
  {},
  (fake) =>
    inFolder(async (folder) => {
      Deno.symlinkSync(`${fake.folder}/libcuda.so.1`, `${folder}/libcuda.so.1`);
      Deno.writeTextFileSync(`${folder}/libnvrtc.so.13`, "no library");
      Deno.env.set("FLUX_LIB_PATH", folder); // which the fake puts back
      using device = openCuda(0);
      await device.compileAhead(SOURCES);
      assert.throws(() => askForAll(device), LibraryNotFoundError);
    }),
);

testFakeCuda("compileAside: a compiler that is closed meanwhile compiles to the end", {}, async () => {
  const nvrtc = new Nvrtc(13);
  const [source] = SOURCES;
  const code = nvrtc.compileAside(source, "sm_90a");
  // Awaited from the beginning: it may fail before the other one is done.
  const failure = assert.rejects(nvrtc.compileAside(BROKEN, "sm_90a"), CompileError);
  nvrtc[Symbol.dispose]();
  assert.equal(new TextDecoder().decode(await code), source.text);
  await failure;
});
