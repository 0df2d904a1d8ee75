/**
 * E4M3 as AMD's MI300 has it ("FNUZ": bias 8, largest 240, -0's code is NaN): the conversions in TypeScript, the kernels'
 * by architecture.cuh against them, and float8 recipes on an emulated gfx942.
 */
import assert from "node:assert/strict";
import fc from "fast-check";
import { float32ToFloat8, FLOAT8_LARGEST, float8FormatOf, float8ToFloat32 } from "../../ffi/float8.ts";
import type { GpuDevice } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { cast } from "../../kernels/cast.ts";
import { linearFloat8 } from "../../kernels/linear_float8.ts";
import { quantizeReference, quantizeRows, quantizeTensor } from "../../kernels/quantize_float8.ts";
import type { ComponentWeights } from "../../recipes/base/component_weights.ts";
import { placeWeights } from "../../recipes/base/weights.ts";
import { missingCompiler } from "../support/emulated_compiler.ts";
import { openEmulatedGpu } from "../support/emulated_gpu.ts";
import { float8RecipeSuite } from "../support/golden_suite_float8.ts";
import { valuesOf } from "../support/golden.ts";
import { noise } from "../support/providers.ts";
import { ownDevice, testOn } from "../support/test_device.ts";

const CODES = Uint8Array.from({ length: 256 }, (_, i) => i);
const VALUES = new Float32Array(256);
float8ToFloat32(CODES, VALUES, "f8e4m3", "fnuz");

function rounded(...xs: number[]): number[] {
  const out = new Uint8Array(xs.length);
  float32ToFloat8(Float32Array.from(xs), out, "fnuz");
  return [...out];
}

Deno.test("FNUZ: values by their definition, (-1)^s 2^(e - 8) (1 + m / 8)", () => {
  assert.equal(VALUES[0x7f], 240);
  assert.equal(VALUES[0xff], -240);
  assert.equal(VALUES[0x40], 1);
  assert.equal(VALUES[0x08], 2 ** -7);
  assert.equal(VALUES[0x01], 2 ** -10);
  assert.equal(VALUES[0xb8], -0.5);
  assert.ok(Object.is(VALUES[0], 0) && Number.isNaN(VALUES[0x80]));
  assert.equal(VALUES.filter(Number.isNaN).length, 1);
  // All codes but those of NaN and the largest mean half of what they mean in the OCP's format.
  const ocp = new Float32Array(256);
  float8ToFloat32(CODES, ocp, "f8e4m3");
  for (const code of CODES) {
    if (code % 128 !== 127 && code !== 0x80) assert.equal(VALUES[code], ocp[code] / 2);
  }
});

Deno.test("FNUZ: rounding is to nearest, ties to even, ends at 240 and has no -0", () => {
  const finite = CODES.filter((code) => code !== 0x80);
  assert.deepEqual(rounded(...finite.values().map((code) => VALUES[code])), [...finite]);
  const [next, previous] = [1 + 2 ** -20, 1 - 2 ** -20];
  for (let code = 0; code < 0x7f; code++) {
    const half = (VALUES[code] + VALUES[code + 1]) / 2;
    const even = code + code % 2;
    assert.deepEqual(rounded(half * previous, half, half * next), [code, even, code + 1]);
    assert.deepEqual(
      rounded(-half * previous, -half, -half * next),
      [code, even, code + 1].map((c) => c === 0 ? 0 : c | 0x80),
    );
  }
  assert.deepEqual(rounded(240, 247, 249, 448, 3e38, Infinity), Array(6).fill(0x7f));
  assert.deepEqual(rounded(-241, -Infinity, -1e-30, -0, -1e-44), [0xff, 0xff, 0, 0, 0]);
  assert.deepEqual(rounded(NaN, -NaN), [0x80, 0x80]);
  fc.assert(fc.property(fc.float({ noNaN: true, min: -240, max: 240 }), (x) => {
    const [code] = rounded(x);
    const error = Math.abs(VALUES[code] - x);
    assert.ok(VALUES.every((value) => !(Math.abs(value - x) < error)), `${x} became ${VALUES[code]}`);
  }));
});

Deno.test("which GPUs have which format", () => {
  assert.deepEqual(
    ["gfx940", "gfx941", "gfx942", "gfx950", "gfx90a", "gfx1201", "sm_90a"].map(float8FormatOf),
    ["fnuz", "fnuz", "fnuz", "ocp", "ocp", "ocp", "ocp"],
  );
  assert.deepEqual(FLOAT8_LARGEST, { ocp: 448, fnuz: 240 });
});

const MI300 = ownDevice(
  "emulated gfx942",
  () => openEmulatedGpu({ architecture: "gfx942" }),
  missingCompiler(),
);

testOn(
  MI300,
  "architecture.cuh: all bfloat16 and float16 become FNUZ bit for bit, and all codes are read",
  async (device) => {
    const patterns = new Uint8Array(Uint16Array.from({ length: 65536 }, (_, i) => i).buffer);
    for (const dtype of ["bf16", "f16"] as const) {
      const x = Tensor.fromBytes(device, patterns, [65536], dtype);
      const expected = new Uint8Array(65536);
      float32ToFloat8(await valuesOf(cast(x, "f32")), expected, "fnuz");
      assert.deepEqual(await device.download(cast(x, "f8e4m3")), expected);
    }
    const codes = Tensor.fromBytes(device, CODES, [256], "f8e4m3");
    assert.deepEqual(await valuesOf(cast(codes, "f32")), VALUES);
    assert.deepEqual(await codes.toFloat32(), VALUES, "read on the host");
  },
);

testOn(MI300, "quantization and products in FNUZ", async (device) => {
  for (const [rows, k] of [[1, 16], [5, 1040]]) {
    const values = new Float32Array(rows * k).map((_, i) => 30 * noise(k)(i));
    const x = Tensor.fromFloat32(device, values, [rows, k]);
    const ways = [[quantizeRows, k, 28, 0x66], [quantizeTensor, rows * k, 240, 0x7f]] as const;
    for (const [quantize, group, largest, code] of ways) {
      const result = quantize(x);
      const [codes, scales] = [new Uint8Array(rows * k), new Float32Array(rows * k / group)];
      quantizeReference(codes, scales, values, group, largest, "fnuz");
      assert.deepEqual(await device.download(result.values), codes);
      assert.deepEqual(await valuesOf(result.scales), scales);
      assert.ok(codes.some((found) => (found & 0x7f) === code), `the largest is ${largest}`);
    }
    const weights = new Float32Array(32 * k).map((_, i) => noise(7)(i));
    const y = await valuesOf(linearFloat8(x, quantizeRows(Tensor.fromFloat32(device, weights, [32, k]))));
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < 32; column++) {
        let [sum, magnitude] = [0, 0];
        for (let i = 0; i < k; i++) {
          const product = values[row * k + i] * weights[column * k + i];
          sum += product;
          magnitude += Math.abs(product);
        }
        // Each operand is off by 1/16 at most, or by a part of its row's largest.
        assert.ok(
          Math.abs(y[row * 32 + column] - sum) < 0.15 * magnitude + 0.5,
          `${y[row * 32 + column]}, ${sum}`,
        );
      }
    }
  }
});

testOn(
  MI300,
  "a checkpoint's own float8, which is the OCP's, is refused on this GPU alone",
  async (device) => {
    const checkpoint = {
      folder: "transformer",
      get: () => ({ dtype: "f8e4m3", shape: [4], bytes: Uint8Array.of(1, 2, 3, 4) }),
    } as unknown as ComponentWeights;
    const place = (gpu: GpuDevice) => placeWeights(gpu, [{ checkpoint, names: ["a.weight"] }]);
    await assert.rejects(place(device), {
      name: "ModelError",
      message:
        /^transformer: weight a\.weight is f8e4m3, whose numbers hip:gfx942 emulated \(gfx942\) does not multiply/,
      hint: /checkpoint in bfloat16/,
    });
    using other = openEmulatedGpu({ architecture: "gfx950" });
    assert.equal((await place(other))[0].get("a.weight").dtype, "f8e4m3");
  },
);

float8RecipeSuite(MI300);
