/** What a CUDA device has found out, taken over by one of a later process: no compiler, no measuring. */
import assert from "node:assert/strict";
import type { CudaDevice } from "../../ffi/cuda/device.ts";
import { openCuda } from "../../ffi/cuda/open.ts";
import { LibraryNotFoundError } from "../../ffi/library.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { type FakeCuda, SOURCE, testFakeCuda } from "../support/fake_cuda.ts";
import { inFolder } from "../support/folders.ts";

const MIB = 2 ** 20;

/** Opens the fake GPU where NVRTC cannot be opened, as a broken file is in the way. */
async function withoutCompiler(
  fake: FakeCuda,
  body: (device: CudaDevice) => Promise<void>,
): Promise<void> {
  await inFolder(async (folder) => {
    Deno.symlinkSync(`${fake.folder}/libcuda.so.1`, `${folder}/libcuda.so.1`);
    Deno.writeTextFileSync(`${folder}/libnvrtc.so.13`, "no library");
    const before = Deno.env.get("FLUX_LIB_PATH")!;
    Deno.env.set("FLUX_LIB_PATH", folder);
    try {
      using device = openCuda(0);
      await body(device);
    } finally {
      Deno.env.set("FLUX_LIB_PATH", before);
    }
  });
}

testFakeCuda("cuda: adopted kernels are loaded without NVRTC, others need it", {}, async (fake) => {
  using device = openCuda(0);
  device.kernel(SOURCE, "fill");
  device.kernel({ ...SOURCE, text: "more kernels" }, "probe");
  const prepared = device.prepared();
  assert.equal([...prepared.keys()].filter((key) => key.startsWith("cubin of fake.cu ")).length, 2);
  const { compilations } = fake;

  await withoutCompiler(fake, async (later) => {
    assert.throws(() => later.kernel(SOURCE, "fill"), LibraryNotFoundError, "the compiler is there");
    later.adopt(prepared);
    const kernel = later.kernel(SOURCE, "fill");
    later.kernel({ ...SOURCE, text: "more kernels" }, "probe");
    const out = Tensor.empty(later, [4], "i32");
    later.launch(kernel, { grid: 1, block: 32 }, [out, 7, out.size]);
    assert.deepEqual([...new Int32Array((await later.download(out)).buffer)], [7, 7, 7, 7]);
    assert.match(later.properties().providers.other, /compiled by an earlier process$/);
    assert.throws(() => later.kernel({ ...SOURCE, text: "new" }, "fill"), LibraryNotFoundError);
    assert.deepEqual([...later.prepared().keys()], [...prepared.keys()]);
  });
  assert.equal(fake.compilations, compilations);
});

testFakeCuda("cuda: an adopted choice is not measured again, with or without a cache", {}, () => {
  let runs = 0;
  const ways = () =>
    [1, 2].map(() => () => {
      runs++;
      return true;
    });
  using device = openCuda(0);
  device.measuring(() => device.context.choose("library 1 work", ways));
  assert.ok(runs > 0);
  const prepared = new Map(device.prepared());
  const [choice] = [...prepared.keys()].filter((key) => key === "choice for library 1 work");
  prepared.set(choice, Uint8Array.of(1));

  runs = 0;
  using later = openCuda(0);
  later.adopt(prepared);
  assert.equal(later.measuring(() => later.context.choose("library 1 work", ways)), 1);
  assert.equal(runs, 0);
  later.measuring(() => later.context.choose("library 2 work", ways));
  assert.ok(runs > 0, "another version's work is measured");
});

testFakeCuda(
  "cuda: the memory of an earlier process is reserved at once, if there is so much",
  {},
  (fake) => {
    let prepared: ReadonlyMap<string, Uint8Array<ArrayBuffer>>;
    {
      using device = openCuda(0);
      const large = device.alloc(300 * MIB, "weights");
      device.alloc(50 * MIB, "weights");
      device.free(large);
      device.alloc(100 * MIB);
      prepared = device.prepared();
    }
    assert.equal(fake.used, 0);
    using later = openCuda(0);
    later.adopt(prepared);
    assert.equal(fake.used, (50 + 100) * MIB, "weights in use, and activations at most");
    later.alloc(100 * MIB);
    later.alloc(50 * MIB, "weights");
    assert.equal(fake.used, 150 * MIB);

    const plan = { activations: 100 * MIB, recorded: 2 ** 40, weights: 2 ** 40 };
    const memory = [...prepared.keys()].find((key) => /memory/.test(key))!;
    later.adopt(new Map([[memory, new TextEncoder().encode(JSON.stringify(plan))]]));
    assert.equal(fake.used, 150 * MIB, "more than the GPU has is not an error");
  },
);

testFakeCuda("cuda: the environment names GPU, driver and libraries", { capability: 80 }, () => {
  using device = openCuda(0);
  const { GPU, architecture, multiprocessors, driver, ...libraries } = device.environment();
  assert.deepEqual([GPU, architecture, multiprocessors], ["Fake GPU 0", "sm_80", "132"]);
  assert.match(driver, /^(for CUDA 13\.0|\d+\.\d+.*)$/);
  assert.deepEqual(Object.keys(libraries), ["cuBLASLt", "cuDNN"]);
});
