/** The CUDA device's memory and copies, over a driver that needs no GPU (tests/support/fake_cuda.c). */
import assert from "node:assert/strict";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import fc from "fast-check";
import { openCuda } from "../../ffi/cuda/open.ts";
import { FfiError, OutOfMemoryError } from "../../ffi/errors.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { fill, testFakeDevice } from "../support/fake_cuda.ts";

const MIB = 2 ** 20;
const PATTERN = new Uint8Array(21 * MIB);
for (let i = 0; i < PATTERN.length; i++) PATTERN[i] = (i * 7 + (i >> 8)) & 255;

/** Bytes that differ from place to place and, by `start`, from call to call. */
function counting(length: number, start = 0): Uint8Array<ArrayBuffer> {
  return PATTERN.slice(start, start + length);
}

// -- memory --

testFakeDevice("cuda: blocks are aligned, counted and given back; the peak stays", {}, (device, fake) => {
  const before = device.memoryUse();
  assert.deepEqual(before, { current: 0, peak: 0, reserved: 0, weights: 0 });
  const small = device.alloc(1);
  const large = device.alloc(3 * MIB);
  const weight = device.alloc(5 * MIB, "weights");
  for (const { pointer } of [small, large, weight]) assert.equal(pointer % 256n, 0n);
  assert.deepEqual(device.memoryUse(), {
    current: 256 + 3 * MIB,
    peak: 256 + 3 * MIB,
    reserved: 64 * MIB,
    weights: 5 * MIB,
  });
  assert.equal(fake.used, (64 + 256) * MIB);
  for (const memory of [large, weight, small]) device.free(memory);
  const { current, peak, weights } = device.memoryUse();
  assert.deepEqual({ current, peak, weights }, { current: 0, peak: 256 + 3 * MIB, weights: 0 });
});

testFakeDevice("cuda: freeing twice, and freeing another device's memory, are errors", {}, (device) => {
  const memory = device.alloc(100);
  device.free(memory);
  assert.throws(() => device.free(memory), new FfiError("cuda:0: memory was freed twice"));
  device.alloc(100); // takes the same place
  assert.throws(() => device.free(memory), new FfiError("cuda:0: memory was freed twice"));
  using other = openCuda(0);
  assert.throws(() => other.free(memory), /memory of cuda:0 is not mine/);
});

testFakeDevice(
  "cuda: a scope frees activations but not weights, and keeps what is returned",
  {},
  (device) => {
    const kept = device.scope(() => {
      const a = Tensor.empty(device, [100], "f32");
      Tensor.empty(device, [1000], "f32");
      device.alloc(4096, "weights");
      return { nested: [a] };
    });
    assert.equal(device.memoryUse().current, 512);
    assert.equal(device.memoryUse().weights, 4096);
    kept.nested[0].dispose();
    assert.throws(() =>
      device.scope(() => {
        Tensor.empty(device, [100], "f32");
        throw new RangeError("stop");
      }), RangeError);
    assert.equal(device.memoryUse().current, 0);
  },
);

testFakeDevice(
  "cuda: memory grows behind the same addresses, and keeps its bytes",
  {},
  async (device, fake) => {
    const first = new Tensor(device.alloc(60 * MIB), "u8", [60 * MIB]);
    device.upload(counting(1000), first.memory);
    const second = new Tensor(device.alloc(300 * MIB), "u8", [300 * MIB]);
    // A block lies across two chunks here, and kernels see no seam.
    assert.equal(second.pointer - first.pointer, BigInt(60 * MIB));
    assert.equal(fake.used, 360 * MIB);
    const end = second.narrow(0, 300 * MIB - 10, 10);
    device.upload(counting(300), second.memory);
    assert.deepEqual(await device.download(first.narrow(0, 0, 1000)), counting(1000));
    assert.deepEqual(await device.download(second.narrow(0, 0, 300)), counting(300));
    assert.deepEqual(await device.download(end), new Uint8Array(10));
  },
);

testFakeDevice("cuda: the same requests get the same addresses each time", {}, (device) => {
  const weight = device.alloc(1000, "weights");
  const request = fc.record({ bytes: fc.integer({ min: 0, max: 4 * MIB }), keep: fc.boolean() });
  fc.assert(
    fc.property(fc.array(request, { maxLength: 60 }), (requests) => {
      const run = () =>
        device.scope(() =>
          requests.map(({ bytes, keep }) => {
            const memory = device.alloc(bytes);
            if (!keep) device.free(memory);
            return memory.pointer;
          })
        );
      const addresses = run();
      const { reserved, current } = device.memoryUse();
      assert.equal(current, 0);
      assert.deepEqual(run(), addresses);
      assert.equal(device.memoryUse().reserved, reserved, "a repetition takes nothing");
    }),
    { numRuns: 50 },
  );
  device.free(weight);
});

testFakeDevice(
  "cuda: where a chunk does not fit, the rest of the memory is taken as it is needed",
  { memory: 100 * MIB },
  (device, fake) => {
    device.alloc(60 * MIB);
    device.alloc(30 * MIB, "weights"); // 36 MiB are left, of 256 that a chunk has
    assert.equal(fake.used, (64 + 30) * MIB);
    device.alloc(6 * MIB, "weights");
    assert.equal(fake.used, 100 * MIB);
  },
);

testFakeDevice(
  "cuda: a segment takes what the other one does not use, then says how much there is",
  { memory: 200 * MIB },
  (device, fake) => {
    const activations = device.alloc(120 * MIB);
    assert.throws(() => device.alloc(100 * MIB, "weights"), OutOfMemoryError);
    device.free(activations);
    const weights = device.alloc(100 * MIB, "weights"); // the activations' chunks are empty now
    assert.equal(fake.used, 100 * MIB);
    device.alloc(90 * MIB);
    assert.throws(() => device.alloc(50 * MIB), (error: unknown) => {
      assert(error instanceof OutOfMemoryError);
      assert.equal(
        error.message,
        "cuda:0: out of memory: asked for 50.0 MiB for activations; 100.0 MiB are used by weights, 90.0 MiB by " +
          "activations and 0.0 MiB by libraries, 10.0 MiB of 200.0 MiB are free on the GPU",
      );
      assert.match(error.hint!, /--height and --width.*--disable_bf16.*nvidia-smi/);
      return true;
    });
    device.alloc(10 * MIB); // nothing was lost on the way
    device.free(weights);
  },
);

testFakeDevice(
  "cuda: out of memory is not final, other failures keep their call's name",
  {},
  (device, fake) => {
    fake.fail("cuMemCreate", 1);
    assert.throws(
      () => device.alloc(10),
      new FfiError("cuda: cuMemCreate failed: CUDA_ERROR_INVALID_VALUE (1)"),
    );
    fake.fail("cuMemCreate", 2);
    device.alloc(10);
  },
);

testFakeDevice(
  "cuda: a library's scratch grows, counts as reserved, and is one for all",
  { memory: 512 * MIB },
  (device, fake) => {
    const { workspace } = device.context;
    const small = workspace(1000);
    assert.equal(workspace(500), small);
    assert.equal(device.memoryUse().reserved, 1024);
    workspace(5000);
    assert.deepEqual(device.memoryUse(), { current: 0, peak: 5120, reserved: 5120, weights: 0 });
    assert.equal(fake.used, 256 * MIB);
    // What a graph was recorded with stays as long as the graph.
    const graph = device.record(() => fill(device, Tensor.empty(device, [4], "i32"), 1));
    workspace(10_000);
    assert.equal(device.memoryUse().reserved - 64 * MIB, 5120 + 10_240);
    graph[Symbol.dispose]();
    assert.equal(device.memoryUse().reserved - 64 * MIB, 10_240);
    assert.throws(() => workspace(1024 * MIB), /asked for 1024.0 MiB for a library's scratch/);
  },
);

testFakeDevice(
  "cuda: work among recordings takes the memory that recordings have, and no other",
  { memory: 512 * MIB },
  (device, fake) => {
    const twoBlocks = () =>
      device.scope(() => [60, 40].map((mebibytes) => device.alloc(mebibytes * MIB).pointer));
    const eager = device.amongRecordings(twoBlocks);
    assert.equal(fake.used, 128 * MIB);
    let recorded: bigint[] = [];
    using graph = device.record(() => {
      recorded = twoBlocks();
    });
    assert.deepEqual(recorded, eager);
    assert.equal(fake.used, 128 * MIB);
    assert.equal(device.memoryUse().peak, 128 * MIB);
    // What it returns lives on, in the caller's scope.
    device.scope(() => {
      const kept = device.amongRecordings(() => device.scope(() => Tensor.empty(device, [MIB], "u8")));
      assert.equal(kept.pointer, eager[0]);
      assert.notEqual(Tensor.empty(device, [MIB], "u8").pointer, kept.pointer);
    });
    assert.throws(() => device.amongRecordings(() => assert.fail("stopped")), /stopped/);
    assert.ok(!eager.includes(device.alloc(MIB).pointer));
    assert.throws(
      () => device.record(() => device.amongRecordings(twoBlocks)),
      /cannot be part of a recording/,
    );
    graph.replay();
  },
);

// -- copies --

testFakeDevice(
  "cuda: what is uploaded comes back, whatever happens to the host's bytes",
  {},
  async (device) => {
    const sizes = fc.array(fc.oneof(fc.nat(300), fc.nat(2 * MIB)), { minLength: 1, maxLength: 16 });
    await fc.assert(
      fc.asyncProperty(sizes, async (lengths) => {
        // All are uploaded before anything is waited for: that can be more than the ring holds.
        const tensors = lengths.map((length, i) => {
          const bytes = counting(length, i);
          const tensor = Tensor.fromBytes(device, bytes, [length], "u8");
          bytes.fill(0);
          return tensor;
        });
        for (const [i, tensor] of tensors.entries()) {
          assert(Buffer.from(await device.download(tensor)).equals(counting(lengths[i], i)), `tensor ${i}`);
        }
        for (const tensor of tensors) tensor.dispose();
      }),
      { numRuns: 15 },
    );
  },
);

testFakeDevice(
  "cuda: a download holds more than the staging memory, and needs no live tensor",
  {},
  async (device) => {
    const length = 20 * MIB + 5;
    const tensor = Tensor.fromBytes(device, counting(length), [length], "u8");
    const downloaded = device.download(tensor);
    tensor.dispose();
    Tensor.fromBytes(device, new Uint8Array(length), [length], "u8");
    assert(Buffer.from(await downloaded).equals(counting(length)));
    const again = Tensor.fromBytes(device, counting(1000), [1000], "u8");
    const into = new Uint8Array(1000);
    assert.equal(await device.download(again, into), into);
    assert.deepEqual(into, counting(1000));
  },
);

testFakeDevice("cuda: copies that cannot be are refused", {}, (device) => {
  const tensor = Tensor.fromInt32(device, [1, 2, 3, 4, 5, 6], [2, 3]);
  assert.throws(() => device.upload(new Uint8Array(25), tensor.memory), /25 bytes do not fit into 24/);
  assert.throws(() => device.download(tensor.permute([1, 0])), /contiguous tensor, not strided i32 \[3, 2\]/);
  assert.throws(() => device.download(tensor, new Uint8Array(25)), /has 24 bytes, 25 were given/);
  using other = openCuda(0);
  assert.throws(() => other.download(tensor), /lies on cuda:0/);
  assert.throws(() => other.upload(new Uint8Array(1), tensor.memory), /is not mine/);
});

testFakeDevice("cuda: weights are streamed into place", {}, async (device) => {
  const parts = [counting(1000), counting(0), counting(3 * MIB, 5)];
  const counts: number[] = [];
  const placed = await device.placeAll(parts, (bytes) => counts.push(bytes));
  assert.equal(counts.at(-1), 1000 + 3 * MIB);
  for (const [i, memory] of placed.entries()) {
    const tensor = new Tensor(memory, "u8", [parts[i].length]);
    assert(Buffer.from(await device.download(tensor)).equals(parts[i]));
  }
  assert.equal(device.memoryUse().current, 0);
  for (const memory of placed) device.free(memory);
});

testFakeDevice(
  "cuda: weights that do not fit leave nothing behind",
  { memory: 100 * MIB },
  async (device) => {
    const parts = [counting(10), new Uint8Array(200 * MIB)];
    await assert.rejects(device.placeAll(parts), OutOfMemoryError);
    assert.equal(device.memoryUse().weights, 0);
  },
);

testFakeDevice("cuda: weights that nothing refers to any more go", {}, async (device) => {
  setFlagsFromString("--expose-gc");
  const gc: () => void = runInNewContext("gc");
  (() => device.alloc(MIB, "weights"))();
  for (let i = 0; i < 10 && device.memoryUse().weights > 0; i++) {
    gc();
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  assert.equal(device.memoryUse().weights, 0);
});
