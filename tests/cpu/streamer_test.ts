/** Streaming weights to a GPU, with a driver that copies from host to host, late, as a GPU does. */
import assert from "node:assert/strict";
import { join } from "node:path";
import fc from "fast-check";
import { mapFile } from "../../ffi/cpu/libc.ts";
import { bufferBytesFor, type CopyDriver, divide, streamToDevice } from "../../ffi/gpu_streamer.ts";
import { FfiError } from "../../ffi/errors.ts";
import { inFolder } from "../support/folders.ts";

const COMPUTE = 7n;

/** A "GPU": a piece of host memory, and copies that happen some event queries after they were issued. */
class FakeDriver implements CopyDriver {
  readonly memory: Uint8Array<ArrayBuffer>;
  readonly pointer: bigint;
  /** What has not been given back. */
  readonly held = new Map<bigint, Uint8Array<ArrayBuffer> | "event" | "stream">();
  readonly waited: (readonly [stream: bigint, event: bigint])[] = [];
  readonly recorded = new Map<bigint, bigint>();
  /** Buffers that are being filled or copied at a time, at most. */
  mostBuffers = 0;
  failAtCopy = Infinity;
  #queue: { event?: bigint; run?: () => void }[] = [];
  #next = 100n;
  #queries = 0;
  #copies = 0;

  constructor(byteLength: number) {
    this.memory = new Uint8Array(byteLength);
    this.pointer = address(this.memory);
  }

  streamCreate(): bigint {
    return this.#hold("stream");
  }
  streamDestroy(stream: bigint): void {
    assert.equal(this.held.get(stream), "stream");
    this.held.delete(stream);
  }
  streamSynchronize(): void {
    this.#run(Infinity);
  }
  streamWaitEvent(stream: bigint, event: bigint): void {
    this.waited.push([stream, event]);
  }
  eventCreate(): bigint {
    return this.#hold("event");
  }
  eventDestroy(event: bigint): void {
    assert.equal(this.held.get(event), "event");
    this.held.delete(event);
  }
  eventRecord(event: bigint, stream: bigint): void {
    this.recorded.set(event, stream);
    if (stream !== COMPUTE) this.#queue.push({ event });
  }
  eventQuery(event: bigint): boolean {
    if (++this.#queries % 3 === 0) this.#run(2);
    return !this.#queue.some((entry) => entry.event === event);
  }
  memHostAlloc(bytes: number): bigint {
    const buffer = new Uint8Array(bytes);
    this.held.set(address(buffer), buffer);
    this.mostBuffers = Math.max(this.mostBuffers, this.#buffers().length);
    return address(buffer);
  }
  memFreeHost(pointer: bigint): void {
    assert.equal(this.#queue.length, 0, "a copy still reads a buffer");
    assert.ok(this.held.get(pointer) instanceof Uint8Array);
    this.held.delete(pointer);
  }
  memcpyHtoDAsync(target: bigint, source: bigint, bytes: number, stream: bigint): void {
    assert.equal(this.held.get(stream), "stream");
    if (++this.#copies === this.failAtCopy) throw new FfiError("cuda: cuMemcpyHtoDAsync failed");
    const [start, buffer] = this.#buffers().find(([start, { byteLength }]) =>
      source >= start && source + BigInt(bytes) <= start + BigInt(byteLength)
    )!;
    const [to, from] = [Number(target - this.pointer), Number(source - start)];
    assert.ok(to >= 0 && to + bytes <= this.memory.byteLength);
    this.#queue.push({ run: () => this.memory.set(buffer.subarray(from, from + bytes), to) });
  }

  #hold(what: "event" | "stream"): bigint {
    this.held.set(++this.#next, what);
    return this.#next;
  }
  #buffers(): [bigint, Uint8Array<ArrayBuffer>][] {
    return [...this.held].filter((entry): entry is [bigint, Uint8Array<ArrayBuffer>] =>
      typeof entry[1] !== "string"
    );
  }
  #run(count: number): void {
    for (const { run } of this.#queue.splice(0, count)) run?.();
  }
}

function address(bytes: Uint8Array<ArrayBuffer>): bigint {
  return Deno.UnsafePointer.value(Deno.UnsafePointer.of(bytes));
}

function pattern(length: number, seed: number): Uint8Array<ArrayBuffer> {
  return Uint8Array.from({ length }, (_, i) => Math.imul(i + seed, 0x9e3779b1) >>> 24);
}

/** Streams `parts` to one place behind another and returns the driver. */
async function stream(parts: Uint8Array[], bufferBytes: number, prepare?: (driver: FakeDriver) => void) {
  const driver = new FakeDriver(parts.reduce((sum, part) => sum + part.byteLength, 0));
  prepare?.(driver);
  let at = driver.pointer;
  const transfers = parts.map((bytes) => {
    const target = at;
    at += BigInt(bytes.byteLength);
    return { bytes, target };
  });
  const seen: number[] = [];
  try {
    await streamToDevice(driver, COMPUTE, transfers, (bytes) => seen.push(bytes), bufferBytes);
  } finally {
    assert.equal(driver.held.size, 0, "streams, events and buffers are given back");
  }
  return { driver, seen };
}

Deno.test("streaming: all bytes arrive, from mapped files and from memory, in any order and size", () =>
  inFolder(async (folder) => {
    const paths = ["a", "b"].map((name) => join(folder, name));
    for (const [seed, path] of paths.entries()) Deno.writeFileSync(path, pattern(5000, seed));
    using first = mapFile(paths[0]);
    using second = mapFile(paths[1]);
    const sources = [first.bytes, second.bytes, pattern(5000, 2)];
    const part = fc.record({ source: fc.nat(2), start: fc.nat(5000), length: fc.nat(3000) });
    await fc.assert(
      fc.asyncProperty(
        fc.array(part, { maxLength: 40 }),
        fc.integer({ min: 1, max: 700 }),
        async (drawn, size) => {
          const parts = drawn.map(({ source, start, length }) =>
            sources[source].subarray(start, Math.min(5000, start + length))
          );
          const total = parts.reduce((sum, { byteLength }) => sum + byteLength, 0);
          const { driver, seen } = await stream(parts, Math.max(size, Math.ceil(total / 60)));
          let at = 0;
          for (const bytes of parts) {
            assert.deepEqual(driver.memory.subarray(at, at += bytes.byteLength), bytes);
          }
          assert.equal(seen.at(-1) ?? 0, total);
          assert.ok(seen.every((bytes, i) => i === 0 || bytes > seen[i - 1]));
          if (total > 0) {
            const [[, event]] = driver.waited;
            assert.equal(driver.recorded.get(event), COMPUTE, "copies wait for the work before them");
          }
        },
      ),
      { numRuns: 60 },
    );
  }));

Deno.test("streaming: several buffers are under way, few loads take few, nothing takes none", async () => {
  assert.equal((await stream([pattern(100_000, 1)], 1000)).driver.mostBuffers, 12);
  assert.equal((await stream([pattern(2000, 1)], 1000)).driver.mostBuffers, 2);
  const { driver, seen } = await stream([new Uint8Array()], 1000);
  assert.deepEqual([driver.mostBuffers, seen], [0, []]);
});

Deno.test("streaming: neighbours in a file share a load, large parts are cut", () => {
  const bytes = new Uint8Array(100);
  const transfer = (start: number, end: number, target: bigint) => ({
    bytes: bytes.subarray(start, end),
    target,
  });
  const loads = divide([transfer(10, 100, 500n), transfer(0, 10, 900n)], 40);
  assert.deepEqual(
    loads.map(({ pieces }) =>
      pieces.map(({ source, target, at }) => [source.byteOffset, source.length, target, at])
    ),
    [[[0, 10, 900n, 0], [10, 30, 500n, 10]], [[40, 40, 530n, 0]], [[80, 20, 570n, 0]]],
  );
});

Deno.test("streaming: a file that was shortened or replaced meanwhile is an error that names it", () =>
  inFolder(async (folder) => {
    const path = join(folder, "model.safetensors");
    Deno.writeFileSync(path, pattern(100_000, 1));
    using file = mapFile(path);
    Deno.truncateSync(path, 70_000);
    await assert.rejects(
      stream([file.bytes], 1000),
      (error: unknown) =>
        error instanceof FfiError &&
        /model\.safetensors has become shorter/.test(error.message) &&
        /load the model again/.test(error.hint ?? ""),
    );
    Deno.writeFileSync(join(folder, "new"), pattern(100_000, 2));
    Deno.renameSync(join(folder, "new"), path);
    await assert.rejects(stream([file.bytes], 1000), /model\.safetensors is not the file any more/);
    Deno.removeSync(path);
    await assert.rejects(stream([file.bytes], 1000), /model\.safetensors is not the file any more/);
  }));

Deno.test("streaming: a driver's error ends it, and what other lanes have begun is waited for", async () => {
  for (const failAtCopy of [1, 5, 99]) {
    const failing = stream([pattern(100_000, 1)], 1000, (driver) => driver.failAtCopy = failAtCopy);
    await assert.rejects(failing, /cuMemcpyHtoDAsync failed/);
  }
});

Deno.test("streamer: little to copy locks little memory", () => {
  const MIB = 2 ** 20;
  assert.equal(bufferBytesFor(0), MIB);
  assert.equal(bufferBytesFor(170e6), MIB); // a LoRA of rank 16
  assert.equal(bufferBytesFor(1.4e9), 4 * MIB); // of rank 128
  assert.equal(bufferBytesFor(24e9), 16 * MIB); // FLUX.1's transformer
  for (let total = 0; total < 6e9; total += 3e7) {
    assert.ok(bufferBytesFor(total) <= bufferBytesFor(total + 3e7) && bufferBytesFor(total) % MIB === 0);
  }
});
