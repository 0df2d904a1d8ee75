/** The binding of the CUDA driver: its constants against the header, and what its errors say. */
import assert from "node:assert/strict";
import { type Driver, openDriver } from "../../ffi/cuda/driver.ts";
import { HEADER } from "../../ffi/cuda/driver_header.ts";
import { cudaIncludeFolders } from "../../ffi/cuda/nvrtc.ts";
import { FfiError, OutOfMemoryError } from "../../ffi/errors.ts";
import { candidatePaths } from "../../ffi/library.ts";
import { packStruct } from "../../ffi/struct.ts";
import { compile, missingCompiler, testFakeCuda } from "../support/fake_cuda.ts";

/** A folder with cuda.h: a toolkit's, or a wheel's. */
function headerFolder(): string | undefined {
  const places = candidatePaths(
    ["libnvrtc.so.13", "libnvrtc.so.12"],
    (name) => Deno.env.get(name),
    listFolder,
  );
  const found = places.flatMap(({ paths }) => paths).flatMap((path) => cudaIncludeFolders(path, [13, 0]));
  return found.find((folder) => listFolder(folder)?.includes("cuda.h"));
}

function listFolder(folder: string): string[] | undefined {
  try {
    return Array.from(Deno.readDirSync(folder), ({ name }) => name);
  } catch {
    return undefined;
  }
}

const folder = headerFolder();
const skip = missingCompiler() ?? (folder === undefined ? "no cuda.h" : undefined);

Deno.test({
  name: `cuda driver: constants, sizes and offsets are the header's${skip ? ` (skipped: ${skip})` : ""}`,
  ignore: skip !== undefined,
  fn() {
    const asserts = Object.entries(HEADER).map(([name, value]) =>
      `_Static_assert(${name} == ${value}, "${name}");`
    );
    const path = Deno.makeTempFileSync({ suffix: ".c" });
    try {
      const check = (lines: readonly string[]) => {
        Deno.writeTextFileSync(path, ["#include <stddef.h>", "#include <cuda.h>", ...lines].join("\n"));
        return compile(["-std=c11", "-fsyntax-only", `-I${folder}`, path]);
      };
      assert.deepEqual(check(asserts), { success: true, text: "" });
      // And it is seen when one is wrong.
      assert.match(
        check([...asserts, `_Static_assert(CU_STREAM_NON_BLOCKING == 2, "wrong");`]).text,
        /wrong/,
      );
    } finally {
      Deno.removeSync(path);
    }
  },
});

Deno.test("packStruct: integers at their offsets, zeros elsewhere", () => {
  const bytes = packStruct(16, [[4, -2], [12, 258]]);
  assert.deepEqual([...bytes], [0, 0, 0, 0, 254, 255, 255, 255, 0, 0, 0, 0, 2, 1, 0, 0]);
});

Deno.test("cuda driver: without libcuda the error names the driver and how to get it", async () => {
  // Whatever this machine has: a folder with a file that is no library comes first, and ends the search.
  const empty = Deno.makeTempDirSync();
  const before = Deno.env.get("FLUX_LIB_PATH");
  try {
    Deno.env.set("FLUX_LIB_PATH", empty);
    await Deno.writeTextFile(`${empty}/libcuda.so.1`, "no library");
    assert.throws(() => openDriver(), /the NVIDIA driver \(libcuda\) was found but could not be opened/);
  } finally {
    if (before === undefined) Deno.env.delete("FLUX_LIB_PATH");
    else Deno.env.set("FLUX_LIB_PATH", before);
    Deno.removeSync(empty, { recursive: true });
  }
});

testFakeCuda("cuda driver: a failed call names itself, the error and a way out", {}, (fake) => {
  using driver = openDriver();
  driver.retainContext(driver.deviceGet(0));
  const cases:
    readonly (readonly [call: string, status: number, () => unknown, RegExp, RegExp | undefined])[] = [
      [
        "cuStreamCreate",
        1,
        () => driver.streamCreate(),
        /^cuda: cuStreamCreate failed: CUDA_ERROR_INVALID_VALUE \(1\)$/,
        undefined,
      ],
      [
        "cuMemAlloc_v2",
        2,
        () => driver.memAlloc(10),
        /^cuda: cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY \(2\)$/,
        /nvidia-smi/,
      ],
      [
        "cuModuleLoadData",
        209,
        () => driver.moduleLoadData(new Uint8Array(8), "a.cu"),
        /cuModuleLoadData of a.cu failed: error 209 \(209\)$/,
        /driver as new/,
      ],
      [
        "cuDeviceGet",
        101,
        () => driver.deviceGet(0),
        /cuDeviceGet failed: error 101/,
        /CUDA_VISIBLE_DEVICES/,
      ],
      ["cuDeviceGetCount", 803, () => driver.deviceGetCount(), /cuDeviceGetCount failed/, /reboot/],
    ];
  for (const [call, status, body, message, hint] of cases) {
    fake.fail(call, status);
    assert.throws(body, (error: unknown) => {
      assert(error instanceof FfiError);
      assert.equal(error instanceof OutOfMemoryError, status === 2);
      assert.match(error.message, message);
      if (hint === undefined) assert.equal(error.hint, undefined);
      else assert.match(error.hint!, hint);
      return true;
    });
    body(); // none of these is the end
  }
  assert(!driver.isLost);
  fake.fail("cuStreamQuery", 719);
  const stream = driver.streamCreate();
  assert.throws(() => driver.streamQuery(stream), /cuStreamQuery failed: error 719/);
  assert(driver.isLost);
  assert.throws(() => driver.checkAlive(), /lost earlier: cuda: cuStreamQuery failed: error 719 \(719\)$/);
});

testFakeCuda("cuda driver: memory without a device around it", {}, (fake) => {
  using driver = openDriver();
  assert.deepEqual(driver.driverGetVersion(), [13, 0]);
  const device = driver.deviceGet(0);
  assert.equal(driver.deviceGetName(device), "Fake GPU 0");
  assert.throws(() => driver.streamCreate(), /no context was taken/);
  driver.retainContext(device);
  const stream = driver.streamCreate();
  const pointer = driver.memAlloc(1000);
  assert.deepEqual(driver.memGetInfo(), { free: 2 ** 30 - 1000, total: 2 ** 30 });
  driver.memsetD8Async(pointer, 1, 8, stream);
  driver.memsetD32Async(pointer + 4n, 0x02030405, 1, stream);
  driver.memcpyDtoDAsync(pointer + 8n, pointer, 8, stream);
  const host = driver.memHostAlloc(16);
  driver.memcpyDtoHAsync(host, pointer, 16, stream);
  const event = driver.eventCreate(false);
  driver.eventRecord(event, stream);
  waitFor(driver, event);
  const bytes = new Uint8Array(Deno.UnsafePointerView.getArrayBuffer(Deno.UnsafePointer.create(host)!, 16));
  assert.deepEqual([...bytes], [1, 1, 1, 1, 5, 4, 3, 2, 1, 1, 1, 1, 5, 4, 3, 2]);
  driver.streamBeginCapture(stream);
  assert(driver.streamIsCapturing(stream));
  driver.memsetD8Async(pointer, 2, 8, stream);
  driver.memsetD8Async(pointer, 3, 4, stream);
  const graph = driver.streamEndCapture(stream);
  assert(!driver.streamIsCapturing(stream));
  assert.equal(driver.graphNodeCount(graph), 2);
  driver.graphDestroy(graph);
  driver.eventDestroy(event);
  driver.memFreeHost(host);
  driver.memFree(pointer);
  driver.streamDestroy(stream);
  driver[Symbol.dispose]();
  driver[Symbol.dispose]();
  assert.equal(fake.alive, 0);
});

/** What is issued runs piece by piece while somebody asks. */
function waitFor(driver: Driver, event: bigint): void {
  let questions = 0;
  while (!driver.eventQuery(event)) questions++;
  assert(questions > 0);
}
