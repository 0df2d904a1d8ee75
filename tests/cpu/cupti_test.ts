/** CUPTI without a GPU: its records as bytes, the binding over a stand-in, constants and the real library where they are. */
import assert from "node:assert/strict";
import { join } from "node:path";
import fc from "fast-check";
import { Cupti, HEADER } from "../../ffi/cuda/cupti.ts";
import { COPY, FILL, KERNEL, KINDS, readRecord } from "../../ffi/cuda/cupti_records.ts";
import { demangle } from "../../ffi/cuda/demangle.ts";
import type { CudaDevice } from "../../ffi/cuda/device.ts";
import { openCuda } from "../../ffi/cuda/open.ts";
import { cuptiVersion } from "../../ffi/cuda/versions.ts";
import { FfiError } from "../../ffi/errors.ts";
import { takeInventory } from "../../ffi/inventory.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { compareWithHeaders, includeFolders, missingHeaders } from "../support/cuda_headers.ts";
import { inFolder } from "../support/folders.ts";
import { type FakeOptions, SOURCE, testFakeCuda, testFakeDevice } from "../support/fake_cuda.ts";

// -- records --

/** Bytes of a record: 32-bit words at offsets, others as bytes or 64-bit words. */
function record(length: number, fields: readonly (readonly [number, number | bigint | readonly number[]])[]) {
  const view = new DataView(new ArrayBuffer(length));
  for (const [offset, value] of fields) {
    if (typeof value === "bigint") view.setBigUint64(offset, value, true);
    else if (typeof value === "number") view.setUint32(offset, value, true);
    else value.forEach((byte, i) => view.setUint8(offset + i, byte));
  }
  return view;
}

const NOW = 1_795_592_117_445_084_990n; // more nanoseconds than a double counts

const KERNEL_FIELDS = [
  [0, KINDS.CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL],
  [KERNEL.registersPerThread, [168, 1]],
  [KERNEL.start, NOW],
  [KERNEL.end, NOW + 1234n],
  [KERNEL.streamId, 13],
  [KERNEL.gridX, 132],
  [KERNEL.gridY, 2],
  [KERNEL.gridZ, 1],
  [KERNEL.blockX, 384],
  [KERNEL.blockY, 1],
  [KERNEL.blockZ, 3],
  [KERNEL.staticSharedMemory, 1024],
  [KERNEL.dynamicSharedMemory, 200_000],
  [KERNEL.name, 0x7f00_1234_5678n],
] as const;

Deno.test("cupti: a kernel's record, in the lengths of all versions", () => {
  for (const length of [112, 208, 216, 224, 232, 248]) {
    assert.deepEqual(readRecord(record(length, KERNEL_FIELDS)), {
      kind: "kernel",
      name: 0x7f00_1234_5678n,
      stream: 13,
      start: NOW,
      end: NOW + 1234n,
      details: {
        grid: "132x2x1",
        block: "384x1x3",
        "registers per thread": 424,
        "static shared memory": 1024,
        "dynamic shared memory": 200_000,
      },
    });
  }
});

Deno.test("cupti: records of copies and fills; copies that are none of ours are copies still", () => {
  const copy = (kinds: readonly number[]) =>
    readRecord(
      record(96, [
        [0, KINDS.CUPTI_ACTIVITY_KIND_MEMCPY],
        [COPY.copyKind, kinds],
        [COPY.bytes, 33_700_000_000n],
        [COPY.start, NOW],
        [COPY.end, NOW + 5n],
        [COPY.streamId, 7],
      ]),
    );
  assert.deepEqual(copy([1, 2, 3]), {
    kind: "copy",
    name: "copy host to device",
    stream: 7,
    start: NOW,
    end: NOW + 5n,
    details: { bytes: 33_700_000_000, from: "pinned", to: "device" },
  });
  assert.equal(copy([2, 3, 1])?.name, "copy device to host");
  const strange = copy([5, 200, 4]);
  assert.deepEqual([strange?.name, strange?.details.from, strange?.details.to], ["copy", "unknown", "array"]);
  assert.deepEqual(
    readRecord(
      record(88, [
        [0, KINDS.CUPTI_ACTIVITY_KIND_MEMSET],
        [FILL.bytes, 4096n],
        [FILL.start, NOW],
        [FILL.end, NOW],
        [FILL.streamId, 9],
      ]),
    ),
    { kind: "fill", name: "fill", stream: 9, start: NOW, end: NOW, details: { bytes: 4096 } },
  );
});

Deno.test("cupti: records of other kinds are passed over, whatever is in them", () => {
  const known = new Set<number>(Object.values(KINDS));
  fc.assert(
    fc.property(
      fc.integer({ min: 0, max: 0xffff_ffff }).filter((kind) => !known.has(kind)),
      fc.uint8Array({ maxLength: 300 }),
      (kind, rest) =>
        assert.equal(readRecord(record(4 + rest.length, [[0, kind], [4, [...rest]]])), undefined),
    ),
  );
});

Deno.test("cupti: a record that is cut off is an error, and nothing behind it is read", () => {
  for (let length = 0; length < 112; length++) {
    const whole = record(248, KERNEL_FIELDS);
    const cut = new DataView(whole.buffer, 0, length);
    assert.throws(() => readRecord(cut), (error) => {
      assert.ok(error instanceof FfiError);
      assert.match(error.message, new RegExp(`has ${length} bytes, (4|112) or more are expected`));
      return true;
    });
  }
  for (const kind of [KINDS.CUPTI_ACTIVITY_KIND_MEMCPY, KINDS.CUPTI_ACTIVITY_KIND_MEMSET]) {
    assert.ok(readRecord(record(44, [[0, kind]])));
    assert.throws(() => readRecord(record(43, [[0, kind]])), /has 43 bytes, 44 or more/);
  }
});

Deno.test("cupti: versions by CUDA's", () => {
  assert.deepEqual([18, 24, 28, 130001, 130500, 17].map(cuptiVersion), [
    "12.0",
    "12.6",
    "12.9",
    "13.0.1",
    "13.5.0",
    "API 17",
  ]);
});

// -- the headers, and the real library --

/** The newest `CUpti_Activity<what>N` that an installed header has. */
function newest(what: string): number {
  const path = includeFolders().map((folder) => `${folder}/cupti_activity.h`).find((file) => {
    try {
      return Deno.statSync(file).isFile;
    } catch {
      return false;
    }
  });
  const text = Deno.readTextFileSync(path!);
  return Math.max(
    ...[...text.matchAll(new RegExp(`CUpti_Activity${what}(\\d+)\\b`, "g"))].map(([, n]) => +n),
  );
}

const noHeaders = await missingHeaders("cuda.h", "cupti.h");
Deno.test({
  name: `cupti: constants and fields are the header's${
    noHeaders === undefined ? "" : ` (skipped: ${noHeaders})`
  }`,
  ignore: noHeaders !== undefined,
  fn: async () => {
    const expected: Record<string, number> = { ...HEADER, ...KINDS };
    for (
      const [what, oldest, fields] of [["Kernel", 9, KERNEL], ["Memcpy", 5, COPY], [
        "Memset",
        4,
        FILL,
      ]] as const
    ) {
      const last = newest(what);
      assert.ok(last >= oldest, `${what}${last}`);
      for (let n = oldest; n <= last; n++) {
        for (const [field, offset] of Object.entries(fields)) {
          expected[`offsetof(CUpti_Activity${what}${n}, ${field})`] = offset;
        }
      }
    }
    const copies = { HTOD: 1, DTOH: 2, DTOD: 8, HTOH: 9, PTOP: 10 };
    for (const [name, value] of Object.entries(copies)) {
      expected[`CUPTI_ACTIVITY_MEMCPY_KIND_${name}`] = value;
    }
    const memories = {
      PAGEABLE: 1,
      PINNED: 2,
      DEVICE: 3,
      ARRAY: 4,
      MANAGED: 5,
      DEVICE_STATIC: 6,
      MANAGED_STATIC: 7,
    };
    for (const [name, value] of Object.entries(memories)) {
      expected[`CUPTI_ACTIVITY_MEMORY_KIND_${name}`] = value;
    }
    assert.equal(await compareWithHeaders(["cuda.h", "cupti.h"], expected), undefined);
    assert.match(await compareWithHeaders(["cuda.h", "cupti.h"], { CUPTI_SUCCESS: 1 }) ?? "", /is not 1/);
  },
});

const installed = takeInventory().libraries.find(({ name }) => name === "CUPTI")!;
// The newest say nothing, not even their version, without a driver.
const noLibrary = installed.problem ?? (installed.version === undefined ? "it tells no version" : undefined);
Deno.test({
  name: `cupti: the real library opens, and walks records of the lengths that its version has${
    noLibrary === undefined ? "" : ` (skipped: ${noLibrary})`
  }`,
  ignore: noLibrary !== undefined,
  fn: () => {
    using cupti = new Cupti(13);
    const [major, minor] = cupti.version.split(".").map(Number);
    // Of what sizeof() says in each version's header; those between are not known here.
    const kernel = { "12": 208, "13.0": 216, "13.5": 248 }[major === 12 ? "12" : `${major}.${minor}`];
    const fill = { "12": 88, "13.0": 88, "13.5": 104 }[major === 12 ? "12" : `${major}.${minor}`];
    if (kernel === undefined || fill === undefined) return;
    const { CUPTI_ACTIVITY_KIND_MEMSET, CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL } = KINDS;
    const lengths = [kernel, fill, kernel, kernel, fill];
    const buffer = new Uint8Array(lengths.reduce((sum, length) => sum + length));
    lengths.reduce((start, length) => {
      const kind = length === kernel ? CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL : CUPTI_ACTIVITY_KIND_MEMSET;
      new DataView(buffer.buffer).setUint32(start, kind, true);
      return start + length;
    }, 0);
    const { records, complete } = cupti.recordsOf(buffer);
    assert.deepEqual(records.map(({ byteLength }) => byteLength), lengths);
    assert.equal(complete, true);
    for (const record of records) assert.ok(readRecord(record));
  },
});

// -- the binding, over a stand-in --

/** Issues a launch of a kernel that does nothing. */
function launch(device: CudaDevice, name: string, grid: number): void {
  device.launch(device.kernel(SOURCE, name), { grid, block: [32, 2], shared: 64 }, []);
}

function testProfiler(
  title: string,
  profiler: FakeOptions["profiler"],
  body: Parameters<typeof testFakeDevice>[2],
): void {
  testFakeDevice(`cupti: ${title}`, profiler === undefined ? {} : { profiler }, body);
}

testProfiler("kernels, copies and fills, in their order and with their times", {}, async (device) => {
  await using profiler = await device.openProfiler();
  const x = Tensor.fromInt32(device, [1, 2, 3, 4], [4]);
  launch(device, "before", 1);
  const before = performance.now();
  const { activities, lost } = await profiler.profile(async () => {
    launch(device, "_Z5scaleIfEvPT_i", 132);
    await device.download(x);
    launch(device, "second", 7);
  });
  const after = performance.now();
  launch(device, "after", 1);
  assert.equal(lost, 0);
  assert.deepEqual(activities.map(({ kind, name }) => `${kind} ${name}`), [
    "kernel void scale<float>(float*, int)",
    "copy copy device to device",
    "kernel second",
  ]);
  assert.deepEqual(activities[0].details, {
    grid: "132x1x1",
    block: "32x2x1",
    "registers per thread": 40,
    "static shared memory": 1024,
    "dynamic shared memory": 64,
  });
  assert.equal(activities[1].details.bytes, 16);
  assert.equal(new Set(activities.map(({ stream }) => stream)).size, 1);
  // The two clocks are not read at the same instant.
  let last = before - 1;
  for (const { start, end } of activities) {
    assert.ok(start >= last && end >= start, `${start} to ${end} after ${last}`);
    last = end;
  }
  assert.ok(last <= after + 1, `${last} is later than ${after}`);
});

// Whoever calls for buffers, in the middle of a call of ours or beside it, gets them.
for (const threads of ["same", "waited for", "goes on"] as const) {
  testProfiler(
    `a hundred buffers, when the thread that asks for them is: ${threads}`,
    { threads, recordsPerBuffer: 6 },
    async (device, fake) => {
      await using profiler = await device.openProfiler();
      for (const count of [1, 3, 300]) {
        const { requested, completed } = fake.profiler;
        const { activities, lost } = await profiler.profile(() => {
          for (let i = 0; i < count; i++) launch(device, `kernel_${i % 5}`, i + 1);
        });
        assert.equal(lost, 0);
        assert.deepEqual(
          activities.map(({ name, details }) => `${name} ${details.grid}`),
          Array.from({ length: count }, (_, i) => `kernel_${i % 5} ${i + 1}x1x1`),
        );
        assert.equal(fake.profiler.requested - requested, Math.ceil(count / 3));
        assert.equal(fake.profiler.completed - completed, Math.ceil(count / 3));
      }
    },
  );
}

testProfiler("CUDA 12's records are shorter", { version: 28 }, async (device) => {
  await using profiler = await device.openProfiler();
  const { activities } = await profiler.profile(() => {
    for (let i = 0; i < 5; i++) launch(device, "kernel", i + 1);
  });
  assert.deepEqual(activities.map(({ details }) => details.grid), [1, 2, 3, 4, 5].map((x) => `${x}x1x1`));
});

testProfiler("each replay of a graph shows its kernels", {}, async (device) => {
  await using profiler = await device.openProfiler();
  using graph = device.record(() => {
    launch(device, "first", 1);
    launch(device, "second", 2);
  });
  const { activities } = await profiler.profile(() => {
    for (let i = 0; i < 3; i++) graph.replay();
  });
  const once = ["first", "second"];
  assert.deepEqual(activities.map(({ name }) => name), [...once, ...once, ...once]);
});

testProfiler("what there was no room for is counted", {}, async (device, fake) => {
  await using profiler = await device.openProfiler();
  fake.profiler.drop(5); // before: nobody's
  const profile = await profiler.profile(() => {
    launch(device, "seen", 1);
    launch(device, "timeless", 1);
    fake.profiler.drop(3);
  });
  assert.deepEqual([profile.activities.map(({ name }) => name), profile.lost], [["seen"], 4]);
  const spoiled = await profiler.profile(async () => {
    launch(device, "seen", 1);
    await device.synchronize();
    fake.profiler.spoil();
  });
  assert.deepEqual([spoiled.activities.map(({ name }) => name), spoiled.lost], [["seen"], 1]);
  assert.equal((await profiler.profile(() => {})).lost, 0);
});

testProfiler("nothing is recorded before and after, and it opens again", {}, async (device, fake) => {
  for (let i = 0; i < 3; i++) {
    launch(device, "unseen", 1);
    await device.synchronize();
    assert.equal(fake.profiler.enabled, 0);
    const profiler = await device.openProfiler();
    assert.equal(fake.profiler.enabled, 3);
    const { activities } = await profiler.profile(() => launch(device, "seen", 1));
    assert.deepEqual(activities.map(({ name }) => name), ["seen"]);
    await profiler[Symbol.asyncDispose]();
    await profiler[Symbol.asyncDispose]();
    await assert.rejects(profiler.profile(() => {}), new FfiError("cupti: the profiler was disposed"));
  }
});

testProfiler("there is one at a time; the device's end is its end", {}, async (device, fake) => {
  const other = openCuda(0);
  const profiler = await other.openProfiler();
  await assert.rejects(
    device.openProfiler(),
    new FfiError("cupti: a profiler is open already: dispose it first"),
  );
  other[Symbol.dispose]();
  assert.equal(fake.profiler.enabled, 0);
  await profiler[Symbol.asyncDispose]();
  await using next = await device.openProfiler();
  assert.equal(fake.profiler.enabled, 3);
  const { activities } = await next.profile(() => launch(device, "seen", 1));
  assert.equal(activities.length, 1);
});

testProfiler("what the body throws is thrown, and the profiler goes on", {}, async (device) => {
  await using profiler = await device.openProfiler();
  await assert.rejects(
    profiler.profile(() => {
      launch(device, "lost with the error", 1);
      throw new RangeError("mine");
    }),
    new RangeError("mine"),
  );
  const { activities } = await profiler.profile(() => launch(device, "seen", 1));
  assert.deepEqual(activities.map(({ name }) => name), ["seen"]);
});

testFakeCuda("cupti: an error that ends the context is told as it is", {}, async (fake) => {
  using device = openCuda(0);
  await assert.rejects(
    async () => {
      await using profiler = await device.openProfiler();
      fake.fail("cuptiActivityFlushAll", 999, 1); // as all calls may, from then on
      await profiler.profile(() => launch(device, "fault", 1));
    },
    (error) => {
      assert.ok(error instanceof FfiError, `${error}`);
      assert.match(error.message, /CUDA_ERROR_ILLEGAL_ADDRESS/);
      return true;
    },
  );
  assert.equal(fake.profiler.enabled, 0);
});

testProfiler(
  "a status that is not success names the call, and tells what to do",
  {},
  async (device, fake) => {
    fake.fail("cuptiActivityEnable", 39, 1);
    await assert.rejects(device.openProfiler(), (error) => {
      assert.ok(error instanceof FfiError);
      assert.equal(
        error.message,
        "cupti: cuptiActivityEnable of CUPTI_ACTIVITY_KIND_MEMSET failed: " +
          "CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED (39)",
      );
      assert.match(error.hint ?? "", /nsys/);
      return true;
    });
    assert.equal(fake.profiler.enabled, 0);
    for (const call of ["cuptiActivityRegisterCallbacks", "cuptiActivityFlushAll", "cuptiGetTimestamp"]) {
      fake.fail(call, 7);
      await assert.rejects(
        async () => {
          await using profiler = await device.openProfiler();
          await profiler.profile(() => {});
        },
        new FfiError(`cupti: ${call} failed: CUPTI_ERROR_INVALID_OPERATION (7)`),
      );
      assert.equal(fake.profiler.enabled, 0);
    }
    await using profiler = await device.openProfiler();
    for (const call of ["cuptiActivityGetNextRecord", "cuptiActivityGetNumDroppedRecords"]) {
      fake.fail(call, 999);
      await assert.rejects(profiler.profile(() => launch(device, "x", 1)), (error) => {
        assert.ok(error instanceof FfiError);
        assert.equal(error.message, `cupti: ${call} failed: no text (999)`);
        assert.match(error.hint ?? "", /newer than the driver/);
        return true;
      });
    }
  },
);

testFakeCuda("cupti: versions before CUDA 12's are refused", { profiler: { version: 17 } }, async () => {
  using device = openCuda(0);
  await assert.rejects(device.openProfiler(), (error) => {
    assert.ok(error instanceof FfiError);
    assert.match(error.message, /^CUPTI API 17 \(.*libcupti\.so\.13\) is older than CUDA 12's/);
    assert.match(error.hint ?? "", /pip install nvidia-cuda-cupti/);
    return true;
  });
});

testFakeCuda(
  "cupti: a library that does not open is named, and the device goes on",
  {},
  (fake) =>
    inFolder(async (folder) => {
      Deno.writeTextFileSync(join(folder, "libcupti.so.13"), "no library");
      Deno.env.set("FLUX_LIB_PATH", `${folder}:${fake.folder}`);
      using device = openCuda(0);
      await assert.rejects(device.openProfiler(), (error) => {
        assert.ok(error instanceof FfiError);
        assert.match(error.message, /^CUPTI was found but could not be opened: .*libcupti\.so\.13/);
        return true;
      });
      launch(device, "works", 1);
      await device.synchronize();
    }),
);

// -- names --

Deno.test("demangle: C++ names are readable, others stay", () => {
  for (const name of ["silu", "", "_Zx", "_Znot a name", "nvjet_tst_128x256_64x4_1x2_h_bz_TNN"]) {
    assert.equal(demangle(name), name);
  }
  const readable = demangle("_Z5scaleIfEvPT_i");
  assert.ok(["void scale<float>(float*, int)", "_Z5scaleIfEvPT_i"].includes(readable), readable);
});
