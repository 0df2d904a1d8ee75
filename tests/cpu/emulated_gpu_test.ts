/** The emulated GPU itself: that it runs CUDA's text rightly, and that it finds what it promises to find. */
import assert from "node:assert/strict";
import { FfiError, OutOfMemoryError, ShapeError } from "../../ffi/errors.ts";
import { Float, type GpuDevice, type KernelArgument, type Launch } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { NCHW, NHWC } from "../../kernels/layout.ts";
import { cast } from "../../kernels/cast.ts";
import { linearReference } from "../../kernels/linear.ts";
import { contiguous } from "../../kernels/contiguous.ts";
import { conv2d, conv2dReference } from "../../kernels/conv2d.ts";
import { attentionReference } from "../../kernels/attention.ts";
import { assertClose } from "../support/compare.ts";
import { openEmulatedGpu } from "../support/emulated_gpu.ts";
import { valuesOf } from "../support/golden.ts";
import { forEachGpu } from "../support/gpu_devices.ts";
import { noise } from "../support/providers.ts";

/** Launches the kernel `k` of a text. */
function run(device: GpuDevice, text: string, launch: Launch, args: readonly KernelArgument[]): void {
  device.launch(device.kernel({ name: "test.cu", text }, "k"), launch, args);
}

function kernel(parameters: string, body: string): string {
  return `extern "C" __global__ void k(${parameters}) { ${body} }`;
}

function floats(device: GpuDevice, values: readonly number[]): Tensor {
  return Tensor.fromFloat32(device, values, [values.length]);
}

async function ints(tensor: Tensor): Promise<number[]> {
  return [...new Int32Array((await tensor.device.download(tensor)).buffer)];
}

const range = (length: number) => Array.from({ length }, (_, i) => i);
const sum = (values: readonly number[]) => values.reduce((total, value) => total + value, 0);

/** Values of row-major element i of a test's tensor. */
function random(length: number, seed: number): Float32Array {
  return Float32Array.from(range(length), noise(seed));
}

/** Fails unless `body` throws an {@link FfiError} whose message fits, after which the device still works. */
function refuses(device: GpuDevice, body: () => void, message: RegExp): void {
  assert.throws(body, (error) => {
    assert.ok(error instanceof FfiError, Deno.inspect(error));
    assert.match(error.message, message);
    return true;
  });
  const out = Tensor.empty(device, [64], "i32");
  run(device, kernel("int* out", "__syncthreads(); out[threadIdx.x] = 7;"), { grid: 1, block: 64 }, [out]);
}

forEachGpu("emulation", (test) => {
  test("grids and blocks of three dimensions cover what they should", async (device) => {
    const out = Tensor.empty(device, [6, 6, 8], "i32");
    const text = kernel(
      "int* out",
      `int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y,
           z = blockIdx.z * blockDim.z + threadIdx.z;
       out[(z * gridDim.y * blockDim.y + y) * gridDim.x * blockDim.x + x] = z * 10000 + y * 100 + x;`,
    );
    run(device, text, { grid: [2, 3, 2], block: [4, 2, 3] }, [out]);
    const expected = range(6).flatMap((z) =>
      range(6).flatMap((y) => range(8).map((x) => z * 10000 + y * 100 + x))
    );
    assert.deepEqual(await ints(out), expected);
  });

  test("barriers order shared memory, in one and in three dimensions", async (device) => {
    // Without the second barrier a thread may overwrite what its neighbour has not read.
    const text = kernel(
      "float* out, int rounds",
      `__shared__ float ring[256];
       int threads = blockDim.x * blockDim.y * blockDim.z;
       int at = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
       ring[at] = at;
       for (int i = 0; i < rounds; i++) {
         __syncthreads();
         float next = ring[(at + 1) % threads];
         __syncthreads();
         ring[at] = next;
       }
       out[blockIdx.x * threads + at] = ring[at];`,
    );
    for (const block of [200, [5, 4, 10]] as const) {
      const out = Tensor.empty(device, [3 * 200], "f32");
      run(device, text, { grid: 3, block }, [out, 7]);
      assert.deepEqual([...await valuesOf(out)], range(600).map((i) => (i % 200 + 7) % 200));
    }
  });

  test("a missing barrier gives wrong numbers", async (device) => {
    // Each thread takes what a thread before it and one behind it have written.
    const text = (barrier: string) =>
      kernel(
        "float* out",
        `__shared__ float held[96];
         held[threadIdx.x] = threadIdx.x;
         ${barrier}
         out[blockIdx.x * 96 + threadIdx.x] = held[(threadIdx.x + 95) % 96];`,
      );
    const expected = range(192).map((i) => (i + 95) % 96);
    const out = Tensor.empty(device, [192], "f32");
    run(device, text("__syncthreads();"), { grid: 2, block: 96 }, [out]);
    assert.deepEqual([...await valuesOf(out)], expected);
    run(device, text(""), { grid: 2, block: 96 }, [out]);
    assert.notDeepEqual([...await valuesOf(out)].slice(0, 96), expected.slice(0, 96));
    assert.notDeepEqual([...await valuesOf(out)].slice(96), expected.slice(96));
  });

  test("shuffles and votes give what CUDA's do", async (device) => {
    const cases: [string, (lane: number) => number][] = [
      ["__shfl_sync(full, v, 3)", () => 3],
      ["__shfl_sync(full, v, (lane + 5) % 32)", (lane) => (lane + 5) % 32],
      ["__shfl_sync(full, v, 2, 8)", (lane) => (lane & ~7) + 2],
      ["__shfl_xor_sync(full, v, 5)", (lane) => lane ^ 5],
      ["__shfl_xor_sync(full, v, 4, 4)", (lane) => lane < 4 || (lane & 4) === 0 ? lane : lane ^ 4],
      ["__shfl_down_sync(full, v, 3)", (lane) => lane < 29 ? lane + 3 : lane],
      ["__shfl_down_sync(full, v, 3, 16)", (lane) => lane % 16 < 13 ? lane + 3 : lane],
      ["__shfl_up_sync(full, v, 2)", (lane) => lane < 2 ? lane : lane - 2],
      ["__shfl_up_sync(full, v, 2, 8)", (lane) => lane % 8 < 2 ? lane : lane - 2],
      ["__popc(__ballot_sync(full, lane % 3 == 0))", () => 11],
      ["__any_sync(full, lane == 31)", () => 1],
      ["__any_sync(full, lane == 32)", () => 0],
      ["__all_sync(full, lane < 32)", () => 1],
      ["__all_sync(full, lane < 31)", () => 0],
      // Half warps on their own.
      ["__shfl_xor_sync(lane < 16 ? 0xffffu : 0xffff0000u, v, 1)", (lane) => lane ^ 1],
      ["lane < 16 ? __shfl_xor_sync(0xffffu, v, 2) : -v", (lane) => lane < 16 ? lane ^ 2 : -lane],
    ];
    const text = kernel(
      "float* out",
      `const unsigned full = 0xffffffffu;
       int lane = threadIdx.x % warpSize, at = blockIdx.x * blockDim.x + threadIdx.x;
       float v = lane;
       ${cases.map(([expression], i) => `out[${i} * 192 + at] = ${expression};`).join("\n")}`,
    );
    const out = Tensor.empty(device, [cases.length, 192], "f32");
    run(device, text, { grid: 2, block: 96 }, [out]);
    const values = [...await valuesOf(out)];
    for (const [i, [expression, expected]] of cases.entries()) {
      const actual = values.slice(i * 192, (i + 1) * 192);
      assert.deepEqual(actual, range(192).map((lane) => expected(lane % 32)), expression);
    }
  });

  test("a lane that does not take part in a shuffle gives NaN", async (device) => {
    const text = kernel("float* out", "out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 8);");
    const out = Tensor.empty(device, [40], "f32");
    run(device, text, { grid: 1, block: 40 }, [out]);
    assert.deepEqual([...await valuesOf(out)], range(40).map((i) => i < 32 ? 1 : NaN));
  });

  test("dynamic shared memory has the size that the launch asks for, under any name and type", async (device) => {
    for (
      const declaration of [
        "extern __shared__ float held[];",
        "extern __shared__ __align__(16) unsigned char raw[]; float* held = (float*)raw;",
        "extern __shared__ float4 quads[]; float* held = &quads[0].x;",
      ]
    ) {
      const text = kernel(
        "float* out",
        `${declaration} held[threadIdx.x] = threadIdx.x; __syncthreads();
         out[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];`,
      );
      const out = Tensor.empty(device, [64], "f32");
      run(device, text, { grid: 1, block: 64, shared: 256 }, [out]);
      assert.deepEqual([...await valuesOf(out)], range(64).reverse());
      refuses(
        device,
        () => run(device, text, { grid: 1, block: 64, shared: 252 }, [out]),
        /beyond the dynamic shared memory/,
      );
      refuses(device, () => run(device, text, { grid: 1, block: 64, shared: 2 ** 18 }, [out]), /a block has/);
    }
  });

  test("shared memory is fresh in each block", async (device) => {
    const text = kernel(
      "float* out",
      `__shared__ float held[4]; extern __shared__ float more[];
       out[blockIdx.x * 2] = held[0]; out[blockIdx.x * 2 + 1] = more[0]; held[0] = more[0] = 1.0f;`,
    );
    const out = Tensor.empty(device, [6], "f32");
    run(device, text, { grid: 3, block: 1, shared: 4 }, [out]);
    assert.deepEqual([...await valuesOf(out)], range(6).map(() => NaN));
  });

  test("atomics add up over blocks, and return what was there", async (device) => {
    const text = kernel(
      "float* total, int* count, int* most, int* order",
      `int i = blockIdx.x * blockDim.x + threadIdx.x;
       atomicAdd(total, (float)i);
       order[atomicAdd(count, 1)] = 1;
       atomicMax(most, i);`,
    );
    const [total, count, most] = [
      floats(device, [0]),
      Tensor.fromInt32(device, [0], [1]),
      Tensor.fromInt32(device, [-5], [1]),
    ];
    const order = Tensor.empty(device, [300], "i32");
    run(device, text, { grid: 3, block: 100 }, [total, count, most, order]);
    assert.deepEqual([...await valuesOf(total)], [sum(range(300))]);
    assert.deepEqual([await ints(count), await ints(most)], [[300], [299]]);
    assert.deepEqual(await ints(order), range(300).map(() => 1));
  });

  test("arguments arrive as the kernel's own types", async (device) => {
    const text = kernel(
      "float* out, const float* none, int i, unsigned u, long long l, float f, double* d",
      "out[0] = none == nullptr; out[1] = i; out[2] = u; out[3] = l == 5000000000LL; out[4] = f; out[5] = d[0];",
    );
    const double = new Tensor(device.alloc(8), "f64", [1]);
    device.upload(new Uint8Array(Float64Array.of(0.5).buffer), double.memory);
    const out = Tensor.empty(device, [6], "f32");
    run(device, text, { grid: 1, block: 1 }, [
      out,
      undefined,
      -3,
      7,
      5_000_000_000n,
      new Float(1.25),
      double,
    ]);
    assert.deepEqual([...await valuesOf(out)], [1, -3, 7, 1, 1.25, 0.5]);
    // A view starts where it starts.
    run(device, kernel("float* out", "*out = 9.0f;"), { grid: 1, block: 1 }, [out.narrow(0, 2, 1)]);
    assert.deepEqual([...await valuesOf(out)], [1, -3, 9, 1, 1.25, 0.5]);
  });

  test("arguments that do not fit the parameters are refused", (device) => {
    const out = floats(device, [0]);
    const text = kernel("float* out, int i, float f, long long l", "out[0] = i + f + l;");
    const go = (...args: KernelArgument[]) => () => run(device, text, { grid: 1, block: 1 }, args);
    go(out, 1, new Float(1), 1n)();
    refuses(device, go(out, 1, new Float(1)), /test\.cu:k takes 4 arguments, 3 were given/);
    refuses(device, go(out, 1, 1, 1n), /argument 2 is a whole number \(int\), the kernel takes a Float/);
    refuses(device, go(out, new Float(1), new Float(1), 1n), /argument 1 is a Float/);
    refuses(device, go(out, 1, new Float(1), 1), /argument 3 is a whole number/);
    refuses(device, go(1, 1, new Float(1), 1n), /argument 0 is a whole number/);
    refuses(device, go(out, 1.5, new Float(1), 1n), /argument 1 is 1\.5, no int/);
    refuses(device, go(out, 2 ** 31, new Float(1), 1n), /no int/);
    const wrong = Tensor.empty(device, [1], "bf16");
    refuses(device, go(wrong, 1, new Float(1), 1n), /bf16 \[1\], the kernel takes elements of 4 bytes/);
  });

  test("sizes that no GPU launches are refused", (device) => {
    const text = kernel("", "");
    const launches: Launch[] = [
      { grid: 0, block: 1 },
      { grid: 1.5, block: 1 },
      { grid: 1, block: 1025 },
      { grid: 1, block: [1, 1, 65] },
      { grid: [1, 65536], block: 1 },
    ];
    for (const launch of launches) refuses(device, () => run(device, text, launch, []), /no GPU launches/);
    const tooMuch = kernel("", "__shared__ volatile float x[12289]; x[0] = 1.0f;");
    refuses(device, () => run(device, tooMuch, { grid: 1, block: 1 }, []), /49156 of static shared memory/);
  });

  test("a barrier or a shuffle that only a part reaches is found", (device) => {
    const go = (body: string) => () => run(device, kernel("", body), { grid: 3, block: 96 }, []);
    refuses(
      device,
      go("if (blockIdx.x == 1 && threadIdx.x < 64) __syncthreads();"),
      /test\.cu:k: only a part of the block reaches a barrier \(block 1, 0, 0; thread 0, 0, 0\)/,
    );
    refuses(device, go("if (threadIdx.x == 70) return; __syncthreads();"), /only a part of the block/);
    refuses(
      device,
      go("if (threadIdx.x % 2) __syncthreads(); else __shfl_sync(0xffffffffu, 1, 0);"),
      /only a part of the/,
    );
    refuses(
      device,
      go("if (threadIdx.x % 32 < 8) __shfl_sync(0xffffffffu, 1, 0); else __syncwarp();"),
      /only a part of the warp/,
    );
    refuses(device, go("__shfl_sync(0xffffu, 1, 0);"), /only a part of the warp/);
  });

  test("accesses beside a tensor, misaligned ones and wild ones are found", (device) => {
    const out = Tensor.empty(device, [8], "f32");
    const go = (body: string) => () => run(device, kernel("float* out", body), { grid: 2, block: 4 }, [out]);
    refuses(device, go("out[8] = 1.0f;"), /test\.cu:k wrote 0 bytes behind the end/);
    refuses(device, go("((char*)out)[33] = 0;"), /wrote 1 bytes behind the end/);
    refuses(device, go("((char*)out)[-3] = 1;"), /wrote 3 bytes before the start/);
    refuses(device, go("((float2*)(out + 1))[0] = make_float2(0.0f, 0.0f);"), /misaligned/);
    refuses(device, go("__shared__ float held[4]; held[threadIdx.x + 1] = 1.0f; out[0] = held[1];"), /index/);
    refuses(device, go("int x = 2147483647; x += (int)gridDim.x; out[0] = x;"), /overflow/);
    refuses(device, go("out[0] = 1 / (int)threadIdx.x;"), /division by zero/);
    refuses(
      device,
      go("*(volatile int*)16 = 1;"),
      /memory that is not there \(block 0, 0, 0; thread 0, 0, 0\)/,
    );
  });

  test("what nobody wrote is NaN, and so is what lies beside a tensor", async (device) => {
    assert.deepEqual([...await valuesOf(Tensor.empty(device, [2], "f32"))], [NaN, NaN]);
    assert.deepEqual([...await valuesOf(Tensor.empty(device, [2], "bf16"))], [NaN, NaN]);
    const [x, out] = [floats(device, [1, 2]), floats(device, [0, 0])];
    const text = kernel("float* out, const float* x", "out[0] = x[-1]; out[1] = x[2];");
    run(device, text, { grid: 1, block: 1 }, [out, x]);
    assert.deepEqual([...await valuesOf(out)], [NaN, NaN]);
  });

  test("text that does not compile gives the compiler's words", (device) => {
    const source = { name: "wrong.cu", text: 'extern "C" __global__ void k() {\n  undeclared = 1;\n}' };
    assert.throws(
      () => device.kernel(source, "k"),
      (error) =>
        error instanceof FfiError &&
        /wrong\.cu:k does not compile: .*wrong\.cu:2:\d+: .*undeclared/s.test(error.message),
    );
    assert.throws(() => device.kernel({ name: "x.cu", text: "" }, "absent"), /absent/);
  });

  test("memory is counted, freed once, kept by scopes, and limited", () => {
    using device = openEmulatedGpu({ memoryBytes: 1000 });
    const outer = device.alloc(100);
    const kept = device.scope(() => {
      device.alloc(200);
      return Tensor.empty(device, [75], "f32");
    });
    assert.deepEqual(device.memoryUse(), { current: 400, peak: 600, reserved: 400, weights: 0 });
    const weight = device.alloc(500, "weights");
    assert.equal(device.memoryUse().weights, 500);
    assert.throws(() => device.alloc(101), OutOfMemoryError);
    kept.dispose();
    device.free(outer);
    device.free(weight);
    assert.deepEqual(device.memoryUse(), { current: 0, peak: 600, reserved: 0, weights: 0 });
    refuses(device, () => device.free(outer), /freed twice/);
    const text = kernel("float* out", "out[0] = 1.0f;");
    refuses(device, () => run(device, text, { grid: 1, block: 1 }, [kept]), /test\.cu:k: .* was freed/);
    refuses(device, () => device.upload(new Uint8Array(9), device.alloc(8)), /9 bytes do not fit into 8/);
  });

  test("weights arrive, with their progress, or none of them", async (device) => {
    const progress: number[] = [];
    const parts = [Uint8Array.of(1, 2, 3), new Uint8Array(0), Uint8Array.of(4)];
    const memories = await device.placeAll(parts, (bytes) => progress.push(bytes));
    assert.deepEqual(progress, [3, 3, 4]);
    const bytes = await device.download(new Tensor(memories[0], "u8", [3]));
    assert.deepEqual([...bytes], [1, 2, 3]);
    assert.equal(device.memoryUse().weights, 4);
    using small = openEmulatedGpu({ memoryBytes: 5 });
    await assert.rejects(small.placeAll([new Uint8Array(3), new Uint8Array(3)]), OutOfMemoryError);
    assert.equal(small.memoryUse().weights, 0);
  });

  test("a closed device says so", () => {
    const device = openEmulatedGpu();
    device[Symbol.dispose]();
    device[Symbol.dispose]();
    assert.throws(() => device.alloc(1), FfiError);
  });

  test("a recorded graph replays on the same memory, also on what was freed while recording", async (device) => {
    const twice = kernel(
      "float* out, const float* x, int n",
      "if (threadIdx.x < n) out[threadIdx.x] = 2.0f * x[threadIdx.x];",
    );
    const x = floats(device, [1, 2, 3]);
    const out = Tensor.empty(device, [3], "f32");
    using graph = device.record(() =>
      device.scope(() => {
        const middle = Tensor.empty(device, [3], "f32");
        run(device, twice, { grid: 1, block: 32 }, [middle, x, 3]);
        run(device, twice, { grid: 1, block: 32 }, [out, middle, 3]);
        assert.throws(() => device.upload(new Uint8Array(4), x.memory), FfiError);
      })
    );
    assert.deepEqual([...await valuesOf(out)], [NaN, NaN, NaN]);
    graph.replay();
    assert.deepEqual([...await valuesOf(out)], [4, 8, 12]);
    device.upload(new Uint8Array(Float32Array.of(5, 6, 7).buffer), x.memory);
    graph.replay();
    assert.deepEqual([...await valuesOf(out)], [20, 24, 28]);
    graph[Symbol.dispose]();
    assert.throws(() => graph.replay(), FfiError);
  });

  test("events tell the time between them", async (device) => {
    using first = device.event();
    await new Promise((resolve) => setTimeout(resolve, 20));
    using second = device.event();
    assert.ok(second.since(first) >= 15 && second.since(first) < 10_000);
  });

  test("matrix products equal their reference, batched, strided, scaled and in bfloat16", async (device) => {
    const [batch, m, n, k] = [3, 5, 7, 11];
    const [left, right, bias] = [random(batch * m * k, 1), random(batch * n * k, 2), random(n, 3)];
    const a = Tensor.fromFloat32(device, left, [batch, m, k]);
    const b = Tensor.fromFloat32(device, right, [batch, n, k]);
    const shift = floats(device, [...bias]);
    const expected = range(batch).map((item) => {
      const result = new Float32Array(m * n);
      const rows = left.slice(item * m * k, (item + 1) * m * k).map((value) => value * 0.5);
      linearReference(result, rows, right.slice(item * n * k, (item + 1) * n * k), bias, k);
      return result;
    });
    const out = Tensor.empty(device, [batch, m, n], "f32");
    device.matmul({ a, b, bias: shift, out, alpha: 0.5 });
    assertClose(await valuesOf(out), expected.flatMap((part) => [...part]), 1e-6, "batched");

    // One of them, its result in the columns of a wider tensor.
    const wide = Tensor.fromFloat32(device, new Float32Array(m * 10), [m, 10]);
    const [first, second] = [a.narrow(0, 1, 1).reshape([m, k]), b.narrow(0, 1, 1).reshape([n, k])];
    device.matmul({ a: first, b: second, bias: shift, out: wide.narrow(1, 2, n), alpha: 0.5 });
    const values = await valuesOf(wide);
    const columns = range(m * n).map((i) => values[Math.floor(i / n) * 10 + 2 + i % n]);
    assertClose(columns, expected[1], 1e-6, "strided");
    assert.equal(values.filter((value) => value === 0).length, m * 3, "wrote beside its columns");

    const small = Tensor.empty(device, [m, n], "bf16");
    device.matmul({
      a: cast(first, "bf16"),
      b: cast(second, "bf16"),
      bias: cast(shift, "bf16"),
      out: small,
      alpha: 0.5,
    });
    assertClose(await valuesOf(small), expected[1], 2 ** -7, "bf16");
    assert.throws(() => device.matmul({ a: first, b: first, out: wide }), ShapeError);
    assert.throws(() => device.matmul({ a: cast(first, "bf16"), b: second, out: small }), ShapeError);
  });

  test("convolutions equal their reference, NCHW and NHWC", async (device) => {
    const shape = { x: [2, 3, 6, 5], weight: [4, 3, 3, 2], out: [2, 4, 3, 3] };
    const [x, weight, bias] = [random(180, 1), random(72, 2), random(4, 3)];
    const padding = [1, 0, 0, 2] as const;
    const expected = new Float32Array(72);
    conv2dReference(expected, x, weight, bias, shape, 2, padding);
    const input = Tensor.fromFloat32(device, x, shape.x);
    const filter = Tensor.fromFloat32(device, weight, shape.weight);
    const out = conv2d(input, filter, floats(device, [...bias]), { stride: 2, padding });
    assertClose(await valuesOf(out), expected, 1e-6, "NCHW");

    const [inputLast, filterLast] = [input, filter].map((tensor) =>
      contiguous(tensor.permute(NHWC)).permute(NCHW)
    );
    const last = conv2d(inputLast, filterLast, floats(device, [...bias]), { stride: 2, padding });
    assert.ok(last.permute(NHWC).isContiguous);
    assertClose(await valuesOf(contiguous(last)), expected, 1e-6, "NHWC");
    assert.throws(
      () => device.conv({ x: inputLast, weight: filter, out: last, stride: 2, padding }),
      /differ in layout/,
    );
  });

  test("attention by a library is there on demand, and equals its reference", async (device) => {
    const [batch, queries, keys, heads, dim] = [2, 5, 7, 3, 8];
    const plan = (on: GpuDevice) => ({
      q: Tensor.fromFloat32(on, random(batch * queries * heads * dim, 1), [batch, queries, heads, dim]),
      k: Tensor.fromFloat32(on, random(batch * keys * heads * dim, 2), [batch, keys, heads, dim]),
      v: Tensor.fromFloat32(on, random(batch * keys * heads * dim, 3), [batch, keys, heads, dim]),
      out: Tensor.empty(on, [batch, queries, heads, dim], "f32"),
      scale: 0.3,
    });
    assert.equal(device.attention(plan(device)), false);
    using able = openEmulatedGpu({ attention: true });
    const { q, k, v, out, scale } = plan(able);
    assert.equal(able.attention({ q, k, v, out, scale }), true);
    const [qs, ks, vs] = await Promise.all([q, k, v].map(valuesOf));
    const expected = new Float32Array(out.size);
    const shape = { batch, queries, keys, heads, headDim: dim };
    attentionReference(expected, qs, ks, vs, new Float32Array(0), shape, scale, false);
    assertClose(await valuesOf(out), expected, 1e-6, "attention");
  });
});
