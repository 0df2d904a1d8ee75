/**
 * The HIP device without an AMD GPU: its calls go through the shim to CUDA's, and those to stand-ins on the CPU which run
 * kernels, products and convolutions. What both vendors' devices share is tested in cuda_device_test.ts and cuda_memory_test.ts.
 */
import assert from "node:assert/strict";
import { Float } from "../../ffi/gpu.ts";
import { HipDevice } from "../../ffi/hip/device.ts";
import { openHip } from "../../ffi/hip/open.ts";
import { openDevice } from "../../ffi/open.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { missingCompiler } from "../support/fake_cuda.ts";
import { valuesOf } from "../support/golden.ts";
import { hipOnCpu } from "../support/hip_shim.ts";

const skip = missingCompiler();
const cuda = skip === undefined ? hipOnCpu() : undefined;

function hipTest(title: string, body: () => void | Promise<void>): void {
  Deno.test({
    name: `hip device: ${title}${skip === undefined ? "" : ` (skipped: ${skip})`}`,
    ignore: skip !== undefined,
    fn: async () => {
      cuda!.reset();
      await body();
    },
  });
}

const ADD_ONE = {
  name: "add_one.cu",
  text: `extern "C" __global__ void addOne(int* out, int count, float scale, long long offset) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = (int)(out[i] * scale) + (int)offset;
}`,
};

hipTest("opens by name, compiles and launches a kernel, and gives all back", async () => {
  {
    using device = await openDevice("hip:0");
    assert.ok(device instanceof HipDevice);
    assert.deepEqual([device.kind, device.name], ["hip", "hip:0"]);
    assert.deepEqual(device.limits, {
      architecture: "gfx950",
      multiprocessors: 132,
      warpSize: 32,
      sharedBytesPerBlock: 65536,
      convAddsBias: false,
    });
    const x = Tensor.fromInt32(device, Int32Array.of(1, 2, 3, 4, 5), [5]);
    device.launch(device.kernel(ADD_ONE, "addOne"), { grid: 2, block: 4 }, [x, 5, new Float(10), 7n]);
    const bytes = await device.download(x);
    assert.deepEqual([...new Int32Array(bytes.buffer)], [17, 27, 37, 47, 57]);
    await device.synchronize();
  }
  assert.ok(cuda!.alive <= 1, "nothing is left but the context of the process");
});

hipTest("says what it is and what does its work", () => {
  using device = openHip(0);
  const { description, providers, nativeBfloat16 } = device.properties();
  assert.equal(description, "Fake GPU 0, 2.0 GiB, gfx950");
  assert.equal(nativeBfloat16, true);
  assert.equal(providers.matmul, "hipBLASLt 1.0.0");
  assert.equal(providers.convolution, "MIOpen 3.2.0");
  assert.match(
    providers.attention,
    /^AITER was not found \(looked for .*\); deno task doctor .*; pip install amd-aiter$/,
  );
  assert.match(providers.other, /compiled by hipRTC 9\.0 for gfx950/);
  assert.match(providers.driver, /^HIP 6\.2\.41133, /);
  const environment = device.environment();
  assert.deepEqual(
    [environment.architecture, environment.HIP, environment.hipBLASLt, environment.MIOpen],
    ["gfx950", "6.2.41133", "1.0.0", "3.2.0"],
  );
});

hipTest("a deposit's weights come back to the same addresses; maps of tiles are refused", async () => {
  using device = openHip(0);
  const deposit = device.deposit();
  const memory = device.alloc(1000, "weights");
  device.upload(new Uint8Array(1000).fill(7), memory);
  const moved = deposit.add(memory);
  assert.equal(device.memoryUse().weights, 0);
  for (let time = 0; time < 2; time++) {
    deposit.bring();
    assert.ok(device.memoryUse().weights >= 1000);
    const bytes = await device.download(new Tensor(moved, "u8", [1000]));
    assert.ok(bytes.every((byte) => byte === 7));
    deposit.leave();
    assert.equal(device.memoryUse().weights, 0);
  }
  device.free(moved);
  assert.throws(() => device.tensorMap(), { message: /hip:0: AMD GPUs have no bulk copies of tiles/ });
});

hipTest("an index that no GPU has is an error that lists those there are", () => {
  assert.throws(() => openHip(3), {
    name: "FfiError",
    message: "there is no GPU hip:3; there are: hip:0 Fake GPU 0",
    hint: /rocminfo/,
  });
});

hipTest("an error of the runtime has the call, its words and a way out; a lost GPU stays lost", async () => {
  using device = openHip(0);
  cuda!.fail("cuMemCreate", 2);
  assert.throws(() => device.alloc(3e9), {
    name: "OutOfMemoryError",
    message: /^hip:0: out of memory: asked for 2861\.0 MiB/,
  });
  cuda!.fail("cuStreamQuery", 700);
  await assert.rejects(device.synchronize(), {
    message: /^hip: hipStreamQuery failed: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)/,
  });
  assert.throws(() => device.alloc(4), { message: /the GPU was lost earlier: hip: hipStreamQuery failed/ });
});

hipTest("a graph is recorded and replayed; what it waits for is refused", async () => {
  using device = openHip(0);
  const x = Tensor.fromInt32(device, Int32Array.of(1, 2), [2]);
  const kernel = device.kernel(ADD_ONE, "addOne");
  using graph = device.record(() => device.launch(kernel, { grid: 1, block: 32 }, [x, 2, new Float(2), 1n]));
  graph.replay();
  graph.replay();
  const bytes = await device.download(x);
  assert.deepEqual([...new Int32Array(bytes.buffer)], [7, 11]);
  assert.throws(() => device.record(() => void device.upload(Uint8Array.of(1), x.memory)), {
    message: "hip:0: an upload cannot be part of a recording",
  });
});

hipTest("products by hipBLASLt: bias, GELU, batches, float8 with scales of both kinds", async () => {
  using device = openHip(0);
  const f32 = (values: number[], shape: number[]) => Tensor.fromFloat32(device, values, shape);
  const a = f32([1, 2, 3, 4, 5, 6], [2, 3]);
  const b = f32([1, 0, 0, 0, 1, 1], [2, 3]);
  const out = Tensor.empty(device, [2, 2], "f32");
  device.matmul({ a, b, out, bias: f32([10, 20], [2]), alpha: 2 });
  assert.deepEqual([...await valuesOf(out)], [12, 30, 18, 42]);
  device.matmul({ a, b, out, activation: "geluTanh" });
  const gelu = (x: number) => 0.5 * x * (1 + Math.tanh(0.7978845608028654 * (x + 0.044715 * x ** 3)));
  (await valuesOf(out)).forEach((y, i) => assert.ok(Math.abs(y - gelu([1, 5, 4, 11][i])) < 1e-5));
  const ones = (rows: number) =>
    Tensor.fromBytes(device, new Uint8Array(rows * 16).fill(0x38), [rows, 16], "f8e4m3");
  const wide = Tensor.empty(device, [2, 16], "f32");
  device.matmul({ a: ones(2), b: ones(16), out: wide, scaleA: f32([2], [1]), scaleB: f32([0.5], [1]) });
  assert.deepEqual([...await valuesOf(wide)].slice(0, 2), [16, 16]);
  const columns = Array.from({ length: 16 }, (_, i) => i);
  // The same tuning as cuBLASLt's: algorithms are timed where that is asked for, and what is refused is left out.
  const byRows = { a: ones(2), b: ones(16), out: wide, scaleA: f32([1, 3], [2]), scaleB: f32(columns, [16]) };
  device.measuring(() => device.matmul(byRows));
  assert.deepEqual([...await valuesOf(wide)].slice(15, 18), [240, 0, 48]);
  const choices = [...device.prepared().keys()].filter((key) =>
    key.startsWith("choice for hipBLASLt 1.0.0 ")
  );
  assert.equal(choices.length, 1);
});

hipTest("before hipBLASLt 1.0 scales for rows have attributes of their own", async () => {
  Deno.env.set("HIP_SHIM_HIPBLASLT", "1200");
  try {
    using device = openHip(0);
    assert.equal(device.properties().providers.matmul, "hipBLASLt 0.12.0");
    const ones = (rows: number) =>
      Tensor.fromBytes(device, new Uint8Array(rows * 16).fill(0x38), [rows, 16], "f8e4m3");
    const scales = (values: number[]) => Tensor.fromFloat32(device, values, [values.length]);
    const out = Tensor.empty(device, [2, 16], "f32");
    const columns = Array.from({ length: 16 }, (_, i) => i);
    device.matmul({ a: ones(2), b: ones(16), out, scaleA: scales([1, 3]), scaleB: scales(columns) });
    assert.deepEqual([...await valuesOf(out)].slice(15, 18), [240, 0, 48]);
    device.matmul({ a: ones(2), b: ones(16), out, scaleA: scales([2]), scaleB: scales([4]) });
    assert.deepEqual([...await valuesOf(out)].slice(0, 2), [128, 128]);
  } finally {
    Deno.env.delete("HIP_SHIM_HIPBLASLT");
  }
});

hipTest(
  "convolutions by MIOpen: both orders, padding of one side, no bias; the fastest of its solutions",
  async () => {
    using device = openHip(0);
    const x = Tensor.fromFloat32(device, Float32Array.from({ length: 16 }, (_, i) => i), [1, 1, 4, 4]);
    const weight = Tensor.fromFloat32(device, new Float32Array(9).fill(1), [1, 1, 3, 3]);
    const out = Tensor.empty(device, [1, 1, 2, 2], "f32");
    const plan = { x, weight, out, stride: 2, padding: [0, 0, 1, 1] as const };
    device.measuring(() => device.conv(plan));
    assert.deepEqual([...await valuesOf(out)], [45, 39, 66, 50]);
    device.conv(plan); // prepared
    assert.deepEqual([...await valuesOf(out)], [45, 39, 66, 50]);
    const last = (tensor: Tensor) => {
      const [n, c, h, w] = tensor.shape;
      return new Tensor(tensor.memory, tensor.dtype, [n, c, h, w], [c * h * w, 1, w * c, c]);
    };
    const picture = last(Tensor.fromFloat32(device, [1, 10, 2, 20, 3, 30, 4, 40], [1, 2, 2, 2]));
    const filter = last(Tensor.fromFloat32(device, [1, 0.5, 2, 0.25], [2, 2, 1, 1]));
    const result = last(Tensor.empty(device, [1, 2, 2, 2], "f32"));
    device.conv({ x: picture, weight: filter, out: result, stride: 1, padding: [0, 0, 0, 0] });
    const values = new Float32Array((await device.download(new Tensor(result.memory, "f32", [8]))).buffer);
    assert.deepEqual([...values], [6, 4.5, 12, 9, 18, 13.5, 24, 18]);
    const bias = Tensor.fromFloat32(device, [1], [1]);
    assert.throws(() => device.conv({ ...plan, bias }), {
      name: "ShapeError",
      message: /MIOpen adds no bias/,
    });
    assert.throws(() => device.conv({ ...plan, x: x.permute([0, 1, 3, 2]) }), {
      message: /dense tensors in one order and dtype, not conv x f32 \[1, 1, 4, 4\]/,
    });
  },
);

hipTest(
  "attention without AITER is our own, with one warning that names the package; traces are refused",
  async () => {
    const warnings: string[] = [];
    using device = openHip(0, { onWarning: (message) => warnings.push(message) });
    const x = Tensor.empty(device, [1, 4, 2, 128], "bf16");
    const plan = { q: x, k: x, v: x, out: x, scale: 1 };
    assert.equal(device.attention({ ...plan, q: Tensor.empty(device, [1, 4, 2, 64], "bf16") }), false);
    assert.deepEqual(warnings, [], "not for heads that AITER has no kernel for");
    for (let i = 0; i < 2; i++) assert.equal(device.attention(plan), false);
    assert.equal(warnings.length, 1);
    assert.match(
      warnings[0],
      /our own kernel's, AITER's is faster: AITER was not found .*; pip install amd-aiter$/,
    );
    assert.equal(device.attention({ ...plan, library: "fa3" }), false);
    assert.throws(() => device.attention({ ...plan, library: "aiter" }), {
      name: "LibraryNotFoundError",
      message: /^AITER was not found \(looked for aiter_meta\/hsa\/gfx950\/fmha_v3_fwd\/fmha_fwd\.csv\)/,
      hint: /^deno task doctor .*; pip install amd-aiter$/,
    });
    await assert.rejects(device.openProfiler(), { message: /kernels in traces are for NVIDIA GPUs so far/ });
  },
);
