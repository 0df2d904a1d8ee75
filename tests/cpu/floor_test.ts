/** The rate of large products: measured on each device and in each dtype, with nothing left behind. */
import assert from "node:assert/strict";
import type { Device } from "../../ffi/device.ts";
import { openDevice } from "../../ffi/open.ts";
import { measureFloor, type ProductDType, productRate } from "../../recipes/base/floor.ts";
import { openEmulatedGpu } from "../support/emulated_gpu.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { testOn } from "../support/test_device.ts";

async function checkRates(device: Device): Promise<void> {
  for (const dtype of ["f32", "bf16", "f8e4m3"] as const satisfies readonly ProductDType[]) {
    const rate = await productRate(device, dtype, 32);
    assert.ok(rate > 0 && Number.isFinite(rate), `${dtype}: ${rate}`);
    assert.equal(device.memoryUse().current, 0);
  }
}

Deno.test("products have a rate on the CPU", async () => {
  using device = await openDevice("cpu");
  await checkRates(device);
});

testOn(TEST_GPU, "products have a rate", checkRates);

testOn(TEST_GPU, "there is no floor where memory does not suffice for the products", async () => {
  using small = openEmulatedGpu({ memoryBytes: 2 ** 20 });
  const dtypes = { linear: "bf16", attention: "bf16" } as const;
  assert.equal(await measureFloor(small, { linear: 1e12, attention: 1e12 }, dtypes), undefined);
  assert.equal(small.memoryUse().current, 0);
});
