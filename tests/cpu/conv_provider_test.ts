import assert from "node:assert/strict";
import fc from "fast-check";
import { convBands } from "../../ffi/cpu/bands.ts";
import type { CpuDevice } from "../../ffi/cpu/device.ts";
import type { Memory } from "../../ffi/device.ts";
import { Tensor } from "../../ffi/tensor.ts";
import {
  assertAccurate,
  forEachProvider,
  noise,
  type Placement,
  poisoned,
  readBack,
  sample,
} from "../support/providers.ts";

const NCHW = [0, 1, 2, 3];
const NHWC = [0, 2, 3, 1];

interface Case {
  images: number;
  channels: number;
  outChannels: number;
  height: number;
  width: number;
  kernel: number;
  stride: number;
  padding: readonly [number, number, number, number];
  order: readonly number[];
  weightOrder: readonly number[];
  dtype: "f32" | "bf16";
  weightDtype: "f32" | "bf16";
  bias: boolean;
  /** Where the picture is cut into bands; not at all when left out. */
  bandBytes?: number | undefined;
  seed: number;
}

const channels = fc.constantFrom(1, 3, 16, 33);
const cases: fc.Arbitrary<Case> = fc.record({
  images: fc.integer({ min: 1, max: 2 }),
  channels,
  outChannels: channels,
  height: fc.integer({ min: 3, max: 14 }),
  width: fc.integer({ min: 3, max: 21 }),
  kernel: fc.constantFrom(1, 3),
  stride: fc.constantFrom(1, 2),
  padding: fc.constantFrom<[number, number, number, number]>([0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [
    2,
    0,
    1,
    1,
  ]),
  order: fc.constantFrom(NCHW, NHWC),
  weightOrder: fc.constantFrom(NCHW, NHWC),
  dtype: fc.constantFrom("f32", "bf16"),
  weightDtype: fc.constantFrom("f32", "bf16"),
  bias: fc.boolean(),
  bandBytes: fc.constantFrom(undefined, 1, 3000, 20_000),
  seed: fc.nat(),
});

function check(device: CpuDevice, drawn: Case): void {
  const { images, channels, outChannels, height, width, kernel, stride, padding, dtype, seed } = drawn;
  const [top, left, bottom, right] = padding;
  const outHeight = Math.floor((height + top + bottom - kernel) / stride) + 1;
  const outWidth = Math.floor((width + left + right - kernel) / stride) + 1;
  const before = device.memoryUse().current;
  const lies = (order: readonly number[], where: "device" | "placed" = "device"): Placement => ({
    order,
    gap: 0,
    where,
  });
  const x = sample(device, [images, channels, height, width], dtype, lies(drawn.order), noise(seed));
  const weightShape = [outChannels, channels, kernel, kernel];
  const weight = sample(
    device,
    weightShape,
    drawn.weightDtype,
    lies(drawn.weightOrder, "placed"),
    noise(seed + 1),
  );
  const bias = drawn.bias
    ? sample(device, [outChannels], drawn.weightDtype, lies([0], "placed"), noise(seed + 2))
    : undefined;
  const shape = [images, outChannels, outHeight, outWidth];
  const expected = new Float64Array(images * outChannels * outHeight * outWidth);
  const magnitude = new Float64Array(expected.length);
  let at = 0;
  for (let image = 0; image < images; image++) {
    for (let o = 0; o < outChannels; o++) {
      for (let oy = 0; oy < outHeight; oy++) {
        for (let ox = 0; ox < outWidth; ox++, at++) {
          expected[at] = bias?.values[o] ?? 0;
          magnitude[at] = Math.abs(expected[at]);
          for (let c = 0; c < channels; c++) {
            for (let dy = 0; dy < kernel; dy++) {
              for (let dx = 0; dx < kernel; dx++) {
                const y = oy * stride - top + dy;
                const z = ox * stride - left + dx;
                if (y < 0 || z < 0 || y >= height || z >= width) continue;
                const product = x.values[((image * channels + c) * height + y) * width + z] *
                  weight.values[((o * channels + c) * kernel + dy) * kernel + dx];
                expected[at] += product;
                magnitude[at] += Math.abs(product);
              }
            }
          }
        }
      }
    }
  }
  for (let round = 0; round < 2; round++) {
    const out = poisoned(device, shape, dtype, lies(drawn.order));
    const plan = { x: x.tensor, weight: weight.tensor, bias: bias?.tensor, out, stride, padding };
    for (const band of convBands(plan, drawn.bandBytes)) device.conv(band);
    assertAccurate(readBack(out), expected, magnitude, dtype);
    out.dispose();
  }
  for (const tensor of [x.tensor, weight.tensor, ...(bias ? [bias.tensor] : [])]) tensor.dispose();
  assert.equal(device.memoryUse().current, before, "memory was not given back");
}

Deno.test("conv: bands cover a large picture, with input and output of about the size that was asked for", () => {
  const tensor = (...shape: number[]) => new Tensor(NOWHERE, "f32", shape);
  const plan = {
    x: tensor(2, 256, 1024, 1024),
    weight: tensor(128, 256, 3, 3),
    out: tensor(2, 128, 1024, 1024),
    stride: 1,
    padding: [1, 1, 1, 1],
  } as const;
  const bands = convBands(plan, 64 * 2 ** 20);
  assert.equal(bands.reduce((sum, { out }) => sum + out.size, 0), plan.out.size);
  for (const { x, out } of bands) assert(4 * (x.size + out.size) <= 1.1 * 64 * 2 ** 20);
  assert(new Set(bands.map(({ x, padding }) => `${x.shape} ${padding}`)).size <= 4, "layouts come again");
});

/** For plans that nobody executes. */
const NOWHERE = {} as Memory;

forEachProvider("conv", (test) => {
  test("agrees with float64 at any shape, layout, padding and dtype", (device) => {
    fc.assert(fc.property(cases, (drawn) => check(device, drawn)), { numRuns: 80 });
  });

  test("more pixels than one chunk of patches holds", (device) => {
    check(device, {
      images: 1,
      channels: 33,
      outChannels: 3,
      height: 90,
      width: 91,
      kernel: 3,
      stride: 1,
      padding: [1, 1, 1, 1],
      order: NCHW,
      weightOrder: NCHW,
      dtype: "f32",
      weightDtype: "f32",
      bias: true,
      seed: 1,
    });
  });
});
