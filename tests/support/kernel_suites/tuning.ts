/** Whatever launch parameters tuning finds, the results are the same. */
import assert from "node:assert/strict";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { add } from "../../../kernels/add.ts";
import { adaLayerNormFused } from "../../../kernels/ada_layer_norm.ts";
import { layerNorm } from "../../../kernels/layer_norm.ts";
import { quantizeRows } from "../../../kernels/quantize_float8.ts";
import { silu } from "../../../kernels/silu.ts";
import { assertClose } from "../compare.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import { sample } from "./samples.ts";

/** All tests of tuned launches on the GPU of this process's tests. */
export function tuningSuite(): void {
  forEachGpu("launch parameters", (test) => {
    test("change nothing in what kernels give", async (device) => {
      const measured = device.fastest;
      const plain = await results(device);
      for (const pick of [1, 2, 3]) {
        let asked = 0;
        device.fastest = (_key, ways) => {
          asked++;
          for (const way of ways) way(); // as measuring does
          return pick % ways.length;
        };
        const tuned = await results(device);
        assert.ok(asked >= plain.length, `${asked} questions`);
        for (const [i, values] of tuned.entries()) assertClose(values, plain[i], 1e-6, `kernel ${i}`);
      }
      device.fastest = measured;
    });
  });
}

/** Rows that are large enough to be tuned, through several kernels. */
async function results(device: GpuDevice): Promise<Float32Array[]> {
  const outs = device.scope(() => {
    const [x, y] = [1, 2].map((seed) => sample(device, [1, 1024, 1032], "f32", noise(seed)).tensor);
    const [scale, shift] = [3, 4].map((seed) => sample(device, [1, 1032], "f32", noise(seed)).tensor);
    const quantized = quantizeRows(sample(device, [4096, 1032], "bf16", noise(5)).tensor);
    return [
      add(x, y),
      silu(x),
      layerNorm(x, 1e-6),
      adaLayerNormFused(x, scale, shift, 1e-6),
      new Tensor(quantized.memory, "f32", [4096], undefined, quantized.scales.offset),
    ];
  });
  const values: Float32Array[] = [];
  for (const out of outs) {
    values.push(new Float32Array((await device.download(out)).buffer));
    out.dispose();
  }
  return values;
}
