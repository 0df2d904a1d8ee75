/** The CUDA device over a driver that needs no GPU (tests/support/fake_cuda.c). */
import assert from "node:assert/strict";
import fc from "fast-check";
import type { CudaDevice } from "../../ffi/cuda/device.ts";
import { openCuda } from "../../ffi/cuda/open.ts";
import type { Memory } from "../../ffi/device.ts";
import { FfiError, OutOfMemoryError } from "../../ffi/errors.ts";
import { Float } from "../../ffi/gpu.ts";
import { openDevice } from "../../ffi/open.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { type FakeCuda, fill, SOURCE, testFakeCuda, testFakeDevice } from "../support/fake_cuda.ts";

const MIB = 2 ** 20;
async function ints(tensor: Tensor): Promise<number[]> {
  const bytes = await (tensor.device as CudaDevice).download(tensor);
  return [...new Int32Array(bytes.buffer)];
}

// -- kernels --

testFakeDevice("cuda: arguments lie as C has them", {}, (device, fake) => {
  const tensor = Tensor.fromInt32(device, [1, 2, 3, 4], [4]);
  const kernel = device.kernel(SOURCE, "probe");
  assert.equal(kernel.name, "fake.cu:probe");
  device.launch(kernel, { grid: [5, 6], block: [32, 2, 3], shared: 100 }, [
    -7,
    tensor.narrow(0, 1, 2),
    new Float(1.5),
    3,
    undefined,
    new Float(-0.25),
    -(2n ** 40n),
    2 ** 31 - 1,
  ]);
  const { grid, block, shared, args } = fake.lastLaunch();
  assert.deepEqual({ grid, block, shared }, { grid: [5, 6, 1], block: [32, 2, 3], shared: 100 });
  const view = new DataView(args.buffer);
  assert.equal(args.length, 52);
  assert.equal(view.getInt32(0, true), -7);
  assert.equal(view.getBigUint64(8, true), tensor.pointer + 4n);
  assert.equal(view.getFloat32(16, true), 1.5);
  assert.equal(view.getInt32(20, true), 3);
  assert.equal(view.getBigUint64(24, true), 0n);
  assert.equal(view.getFloat32(32, true), -0.25);
  assert.equal(view.getBigInt64(40, true), -(2n ** 40n));
  assert.equal(view.getInt32(48, true), 2 ** 31 - 1);
  device.launch(kernel, { grid: 1, block: 1 }, []);
  assert.equal(fake.lastLaunch().args.length, 0);
});

testFakeDevice("cuda: arguments of any kinds lie at multiples of their sizes", {}, (device, fake) => {
  const kernel = device.kernel(SOURCE, "probe");
  const argument = fc.oneof(
    fc.integer(),
    fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n }),
    fc.float({ noNaN: true }).map((value) => new Float(value)),
  );
  fc.assert(fc.property(fc.array(argument, { maxLength: 40 }), (args) => {
    device.launch(kernel, { grid: 1, block: 1 }, args);
    const packed = fake.lastLaunch().args;
    const view = new DataView(packed.buffer);
    let at = 0;
    for (const arg of args) {
      if (typeof arg === "bigint") {
        at = Math.ceil(at / 8) * 8;
        assert.equal(view.getBigInt64(at, true), arg);
        at += 8;
      } else {
        if (arg instanceof Float) assert.equal(view.getFloat32(at, true), arg.value);
        else assert.equal(view.getInt32(at, true), arg);
        at += 4;
      }
    }
    assert.equal(packed.length, at);
  }));
});

testFakeDevice(
  "cuda: a kernel that takes maps gets them at multiples of 64, structs as their members",
  {},
  (device, fake) => {
    const matrix = Tensor.empty(device, [6, 128], "bf16").narrow(0, 1, 4).narrow(1, 32, 64);
    const map = device.tensorMap(matrix, 256);
    const kernel = device.kernel(SOURCE, "probe");
    device.launch(kernel, { grid: 1, block: 1 }, [5, map, [matrix, undefined, -7n], new Float(1.5), map]);
    const { args } = fake.lastLaunch();
    const view = new DataView(args.buffer, args.byteOffset);
    const longs = (at: number, count: number) =>
      Array.from({ length: count }, (_, i) => view.getBigInt64(at + 8 * i, true));
    assert.equal(view.getInt32(0, true), 5);
    // The fake driver writes what it was told: address, bytes of a row, rows, bytes from row to row, and the tile's sizes.
    const told = [matrix.pointer, 128n, 4n, 256n, 128n, 256n];
    assert.deepEqual(longs(64, 6), told);
    assert.deepEqual(longs(192, 3), [matrix.pointer, 0n, -7n]);
    assert.equal(view.getFloat32(216, true), 1.5);
    assert.deepEqual(longs(256, 6), told);
    const tooMany = new Array(33).fill(map);
    assert.throws(() => device.launch(kernel, { grid: 1, block: 1 }, tooMany), /33 arguments are too many/);
    assert.throws(
      () => device.tensorMap(matrix.narrow(1, 1, 32), 8),
      /cuTensorMapEncodeTiled of bf16 \[4, 32\]/,
    );
    using other = openCuda(0);
    const there = other.tensorMap(Tensor.empty(other, [1, 64], "bf16"), 8);
    assert.throws(() => device.launch(kernel, { grid: 1, block: 1 }, [there]), /lies on cuda:0/);
  },
);

testFakeDevice("cuda: launches that cannot be are refused with the kernel's name", {}, (device, fake) => {
  const kernel = device.kernel(SOURCE, "probe");
  const refused = (
    launch: Parameters<CudaDevice["launch"]>[1],
    args: Parameters<CudaDevice["launch"]>[2],
  ) => {
    try {
      device.launch(kernel, launch, args);
    } catch (error) {
      assert(error instanceof FfiError);
      return error.message;
    }
    assert.fail("it was launched");
  };
  const one = { grid: 1, block: 1 };
  assert.match(refused(one, [0.5]), /^fake.cu:probe: argument 0, 0.5, is no 32-bit integer/);
  assert.match(refused(one, [1, 2 ** 31]), /argument 1, 2147483648, is no 32-bit integer/);
  assert.match(refused(one, [NaN]), /argument 0, NaN, is no 32-bit integer/);
  assert.match(refused(one, new Array(600).fill(1)), /600 arguments are too many/);
  assert.match(
    refused({ grid: 0, block: 1 }, []),
    /grid \[0, 1, 1\], sizes are from 1 to \[2147483647, 65535, 65535\]/,
  );
  assert.match(refused({ grid: [1, 65536], block: 1 }, []), /grid \[1, 65536, 1\]/);
  assert.match(refused({ grid: 1, block: [1, 1, 65] }, []), /block \[1, 1, 65\]/);
  assert.match(refused({ grid: 1, block: [64, 32] }, []), /a block of 2048 threads, cuda:0 takes 1024/);
  assert.match(refused({ ...one, shared: 232_448 }, []), /1024 \+ 232448 bytes of shared memory.*has 232448/);
  assert.equal(fake.launches, 0);
  using other = openCuda(0);
  assert.match(refused(one, [Tensor.fromInt32(other, [1], [1])]), /argument 0, i32 \[1\], lies on cuda:0/);
  assert.throws(() => other.launch(kernel, one, []), /was not loaded by cuda:0/);
  fake.fail("cuLaunchKernel", 701);
  assert.match(refused(one, []), /^cuda: cuLaunchKernel of fake.cu:probe failed: error 701/);
});

testFakeDevice(
  "cuda: more shared memory than a kernel has by itself is asked for once",
  {},
  (device, fake) => {
    const kernel = device.kernel(SOURCE, "probe");
    device.launch(kernel, { grid: 1, block: 1, shared: 48 * 1024 }, []);
    assert.equal(fake.lastLaunch().shared, 48 * 1024);
    device.launch(kernel, { grid: 1, block: 1, shared: 200_000 }, []);
    fake.fail("cuFuncSetAttribute", 1);
    device.launch(kernel, { grid: 1, block: 1, shared: 150_000 }, []);
  },
);

testFakeDevice("cuda: a text is compiled and loaded once", {}, (device, fake) => {
  const kernel = device.kernel(SOURCE, "fill");
  assert.equal(device.kernel({ ...SOURCE }, "fill"), kernel);
  assert.notEqual(device.kernel(SOURCE, "probe"), kernel);
  assert.equal(fake.compilations, 1);
  device.kernel({ ...SOURCE, text: "other" }, "fill");
  assert.equal(fake.compilations, 2);
  assert.throws(
    () => device.kernel(SOURCE, "missing"),
    /cuModuleGetFunction of missing in fake.cu failed: CUDA_ERROR_NOT_FOUND/,
  );
  assert.throws(
    () => device.kernel({ ...SOURCE, text: "#error" }, "fill"),
    /^CompileError: fake.cu does not compile for sm_90a: fake.cu\(2\): error: #error$/,
  );
});

// -- events, waiting, graphs --

testFakeDevice("cuda: waiting leaves the loop to others", { patience: 20 }, async (device) => {
  const tensor = Tensor.empty(device, [4], "i32");
  fill(device, tensor, 3);
  let turns = 0;
  const other = (async () => {
    for (; turns < 5; turns++) await new Promise((resolve) => setTimeout(resolve, 0));
  })();
  await device.synchronize();
  await other;
  assert.equal(turns, 5);
  assert.deepEqual(await ints(tensor), [3, 3, 3, 3]);
});

testFakeDevice("cuda: events measure the time between them", {}, (device) => {
  using start = device.event();
  using end = device.event();
  assert.equal(end.since(start), 1.5);
  assert.ok(start.reached && end.reached);
  const gone = device.event();
  gone[Symbol.dispose]();
  gone[Symbol.dispose]();
  assert.throws(() => gone.since(start), /the event was disposed/);
  assert.throws(() => gone.reached, /the event was disposed/);
});

testFakeDevice("cuda: an event is reached when the work before it is done", {}, (device) => {
  const tensor = Tensor.fromInt32(device, [0, 0, 0, 0], [4]);
  for (let i = 0; i < 3; i++) fill(device, tensor, i);
  using event = device.event();
  assert.equal(event.reached, false);
  let looks = 0;
  while (!event.reached) looks++;
  assert.ok(looks > 0);
});

testFakeDevice(
  "cuda: a recording runs when it is replayed, and may need new memory",
  {},
  async (device, fake) => {
    const out = Tensor.fromInt32(device, [0, 0], [2]);
    const kept: Memory[] = [];
    const graph = device.record(() => {
      fill(device, out, 5);
      kept.push(device.alloc(100 * MIB)); // a chunk more
      fill(device, new Tensor(kept[0], "i32", [100]), 6);
    });
    assert.deepEqual(await ints(out), [0, 0]);
    for (const value of [1, 2]) {
      fill(device, out, value);
      graph.replay();
      assert.deepEqual(await ints(out), [5, 5]);
    }
    assert.deepEqual(await ints(new Tensor(kept[0], "i32", [2])), [6, 6]);
    assert.equal(fake.launches, 4);
    graph[Symbol.dispose]();
    graph[Symbol.dispose]();
    assert.throws(() => graph.replay(), /the graph was disposed/);
  },
);

testFakeDevice("cuda: a recording that fails leaves the device as it was", {}, async (device) => {
  const out = Tensor.fromInt32(device, [1, 2], [2]);
  const failing: readonly (readonly [() => unknown, RegExp])[] = [
    [() => {
      fill(device, out, 9);
      throw new RangeError("stop");
    }, /^RangeError: stop/],
    [() => device.upload(new Uint8Array(4), out.memory), /an upload cannot be part of a recording/],
    [() => device.download(out), /a download cannot be/],
    [() => device.event(), /an event cannot be/],
    [() => device.record(() => {}), /a recording cannot be/],
    [
      () => device.context.driver.streamSynchronize(device.context.stream),
      /cuStreamSynchronize failed: error 900/,
    ],
    [() => Promise.resolve(), /record takes a synchronous function/],
  ];
  for (const [body, message] of failing) {
    assert.throws(() => device.record(() => body() as void), message);
    device.upload(Uint8Array.of(4), out.memory);
    fill(device, out, 7);
    assert.deepEqual(await ints(out), [7, 7]);
  }
  // A call that failed inside, and was caught there, has made the recording invalid all the same.
  assert.throws(
    () =>
      device.record(() => {
        try {
          device.context.driver.streamQuery(device.context.stream);
        } catch { /* as a library would */ }
      }),
    /cuStreamEndCapture failed: error 901/,
  );
  device.record(() => fill(device, out, 8))[Symbol.dispose]();
});

testFakeDevice(
  "cuda: what recordings allocate is theirs together, and nobody else's",
  {},
  async (device) => {
    const made: Tensor[] = [];
    const record = (value: number) =>
      device.record(() =>
        device.scope(() => {
          made.push(Tensor.empty(device, [1000], "i32"));
          fill(device, made.at(-1)!, value);
        })
      );
    const [first, second] = [record(1), record(2)];
    assert.equal(made[0].pointer, made[1].pointer);
    const others = Array.from(
      { length: 20 },
      (_, i) => Tensor.fromInt32(device, Array(1000).fill(100 + i), [1000]),
    );
    for (const [graph, value] of [[first, 1], [second, 2], [first, 1]] as const) {
      graph.replay();
      assert.deepEqual((await ints(new Tensor(made[0].memory, "i32", [1000]))).slice(998), [value, value]);
    }
    for (const [i, other] of others.entries()) assert.deepEqual((await ints(other))[999], 100 + i);
  },
);

testFakeDevice(
  "cuda: memory that recorded work may use is not given to the other segment",
  { memory: 200 * MIB },
  (device) => {
    const graph = device.record(() => {
      device.scope(() => fill(device, Tensor.empty(device, [40 * MIB], "i32"), 1));
    });
    assert.throws(() => device.alloc(100 * MIB, "weights"), OutOfMemoryError);
    graph.replay();
    graph[Symbol.dispose]();
    device.alloc(100 * MIB, "weights");
  },
);

// -- failures --

testFakeCuda("cuda: after a lost context all calls name the first that failed", {}, async () => {
  using device = openCuda(0);
  const out = Tensor.fromInt32(device, [1, 2], [2]);
  device.launch(device.kernel(SOURCE, "fault"), { grid: 1, block: 1 }, []);
  const first =
    "cuda: cuStreamQuery failed: CUDA_ERROR_ILLEGAL_ADDRESS (700), an illegal memory access was " +
    "encountered";
  await assert.rejects(device.synchronize(), (error: unknown) => {
    assert(error instanceof FfiError);
    assert.equal(error.message, first);
    assert.match(error.hint!, /work issued before that call/);
    return true;
  });
  const later = { name: "FfiError", message: `cuda: the GPU's context was lost earlier: ${first}` };
  assert.throws(() => fill(device, out, 1), later);
  assert.throws(() => device.alloc(1), later);
  assert.throws(() => device.download(out), later);
  assert.throws(() => device.event(), later);
  assert.throws(() => device.context.driver.memGetInfo(), later);
  assert.throws(() => device.kernel(SOURCE, "probe"), later);
  out.dispose(); // a scope that ends does not hide the error
});

testFakeCuda("cuda: work that fails at the very end shows when the device is closed", {}, () => {
  const device = openCuda(0);
  device.launch(device.kernel(SOURCE, "fault"), { grid: 1, block: 1 }, []);
  assert.throws(() => device[Symbol.dispose](), /cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS/);
});

testFakeDevice(
  "cuda: a closed device says so, and two devices live side by side",
  { devices: 2 },
  async (first) => {
    const second = openCuda(1);
    const a = Tensor.fromInt32(first, [1, 2], [2]);
    const b = Tensor.fromInt32(second, [3, 4], [2]);
    fill(second, b, 5);
    assert.deepEqual(await ints(a), [1, 2]);
    assert.deepEqual(await ints(b), [5, 5]);
    const event = second.event();
    event[Symbol.dispose]();
    second[Symbol.dispose]();
    second[Symbol.dispose]();
    assert.throws(() => second.alloc(1), new FfiError("cuda:1: the device was closed"));
    assert.deepEqual(await ints(a), [1, 2]);
  },
);

// -- opening --

testFakeCuda(
  "cuda: openDevice opens GPUs by index and lists those there are",
  { devices: 2 },
  async (fake) => {
    {
      using device = await openDevice("cuda:1");
      assert.equal(device.name, "cuda:1");
      using other = await openDevice("cuda");
      assert.equal(other.name, "cuda:0");
      const { description, nativeBfloat16, providers } = device.properties();
      assert.equal(description, "Fake GPU 1, 1.0 GiB, compute capability 9.0");
      assert(nativeBfloat16);
      assert.equal(providers.other, "CUDA kernels, compiled by NVRTC 13.0 for sm_90a");
      assert.match(providers.driver, /^for CUDA 13.0, .*libcuda.so.1$/);
    }
    assert.equal(fake.alive, 0);
    await assert.rejects(
      openDevice("cuda:2"),
      {
        name: "FfiError",
        message: "there is no GPU cuda:2; there are: cuda:0 Fake GPU 0, cuda:1 Fake GPU 1",
      },
    );
    assert.equal(fake.alive, 0);
  },
);

testFakeCuda("cuda: a machine without a GPU is told so", { devices: 0 }, async () => {
  await assert.rejects(openDevice("cuda"), (error: unknown) => {
    assert(error instanceof FfiError);
    assert.match(error.message, /cuInit failed: CUDA_ERROR_NO_DEVICE \(100\)/);
    assert.match(error.hint!, /nvidia-smi/);
    return true;
  });
});

testFakeCuda("cuda: a device that cannot be opened leaves nothing", {}, (fake: FakeCuda) => {
  fake.fail("cuDevicePrimaryCtxRetain", 2);
  assert.throws(() => openCuda(0), OutOfMemoryError);
  assert.equal(fake.alive, 0);
});
