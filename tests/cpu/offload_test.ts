/** Recipe 12_offload on the emulated GPU; deposits of the CUDA device over a driver that needs no GPU. */
import assert from "node:assert/strict";
import { FfiError, OutOfMemoryError } from "../../ffi/errors.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { openEmulatedGpu } from "../support/emulated_gpu.ts";
import { testFakeDevice } from "../support/fake_cuda.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { littleMemorySuite, offloadSuite } from "../support/offload_suite.ts";
import { ownDevice } from "../support/test_device.ts";

const MIB = 2 ** 20;

offloadSuite(TEST_GPU);
littleMemorySuite(
  ownDevice("emulated GPU", () => openEmulatedGpu({ memoryBytes: 1_300_000 }), TEST_GPU.skip),
);

/** Bytes that differ from place to place and, by `start`, from call to call. */
const counting = (length: number, start = 0) =>
  Uint8Array.from({ length }, (_, i) => (i * 7 + (i >> 8) + start) & 255);

testFakeDevice(
  "cuda: a deposit's weights come back to the same addresses, and take no memory while they are away",
  { memory: 1024 * MIB },
  async (device, fake) => {
    const sizes = [1, 300, 70 * MIB, 5 * MIB, 0];
    device.free(device.alloc(80 * MIB, "weights")); // that much stays mapped
    const { alive } = fake;
    const deposit = device.deposit();
    const moved = sizes.map((size, i) => {
      const memory = device.alloc(size, "weights");
      if (size > 0) device.upload(counting(Math.min(size, 5000), i), memory);
      return deposit.add(memory);
    });
    assert.equal(device.memoryUse().weights, 0);
    const { used } = fake;
    const pointers = moved.map(({ pointer }) => pointer);
    assert.ok(pointers.every((pointer) => pointer % 256n === 0n));
    for (let time = 0; time < 3; time++) {
      deposit.bring();
      assert.ok(fake.used - used >= 75 * MIB && fake.used - used < 80 * MIB, `${fake.used - used} bytes`);
      assert.ok(device.memoryUse().weights >= 75 * MIB);
      for (const [i, memory] of moved.entries()) {
        const length = Math.min(sizes[i], 5000);
        const found = await device.download(new Tensor(memory, "u8", [length]));
        assert.deepEqual(found, counting(length, i), `block ${i}, time ${time}`);
      }
      deposit.leave();
      assert.equal(fake.used, used);
      assert.equal(device.memoryUse().weights, 0);
      assert.deepEqual(moved.map(({ pointer }) => pointer), pointers);
    }
    for (const memory of moved) device.free(memory);
    assert.equal(fake.alive, alive, "addresses and locked memory are given back");
    assert.throws(() => device.free(moved[0]), /freed twice/);
  },
);

testFakeDevice(
  "cuda: a deposit that does not fit says so, and fits when there is room again",
  { memory: 512 * MIB },
  async (device) => {
    const deposit = device.deposit();
    const weight = device.alloc(200 * MIB, "weights");
    device.upload(counting(1000), weight);
    const moved = deposit.add(weight);
    const other = device.alloc(400 * MIB, "weights");
    assert.throws(() => deposit.bring(), (error) => {
      assert.ok(error instanceof OutOfMemoryError);
      assert.match(error.message, /weights that were offloaded/);
      return true;
    });
    device.free(other);
    deposit.bring(); // what is unused at the ends of the segments is given back for it
    assert.deepEqual(await device.download(new Tensor(moved, "u8", [1000])), counting(1000));
    assert.throws(() => deposit.add(device.alloc(1, "weights")), FfiError);
  },
);

testFakeDevice("cuda: a deposit on the GPU goes with the device", {}, (device) => {
  const deposit = device.deposit();
  deposit.add(device.alloc(1000, "weights"));
  deposit.bring();
  device.deposit(); // an empty one, too
});
