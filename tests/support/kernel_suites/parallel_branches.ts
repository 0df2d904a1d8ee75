/** The body of a single-stream block on a GPU: the fused one against the one of primitives. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../../ffi/errors.ts";
import type { GpuDevice } from "../../../ffi/gpu.ts";
import { Tensor } from "../../../ffi/tensor.ts";
import { jointAttentionFused } from "../../../kernels/joint_attention.ts";
import { joinedLinears } from "../../../kernels/joined_linears.ts";
import { linearGeluFused } from "../../../kernels/linear_gelu.ts";
import {
  parallelBranches,
  parallelBranchesFused,
  type ParallelLayers,
} from "../../../kernels/parallel_branches.ts";
import { eagerOps } from "../../../recipes/base/ops.ts";
import { assertClose } from "../compare.ts";
import { valuesOf } from "../golden.ts";
import { forEachGpu } from "../gpu_devices.ts";
import { noise } from "../providers.ts";
import { dtypes, EPS, type Float, sample, seeds } from "./samples.ts";

/** All tests of a single-stream block's body on the GPU of this process's tests. */
export function parallelBranchesSuite(): void {
  /** Layers that lie apart, or joined as 03_fuse_qkv joins them. */
  const block = (
    device: GpuDevice,
    sizes: { heads: number; headDim: number; mlpHidden: number; joined: boolean; dtype: Float; seed: number },
  ): ParallelLayers => {
    const { heads, headDim, mlpHidden, joined, dtype, seed } = sizes;
    const hidden = heads * headDim;
    const draw = (shape: readonly number[], i: number) =>
      sample(device, shape, dtype, (at) => noise(seed + i)(at) / Math.sqrt(shape.at(-1)!)).tensor;
    const rows = [hidden, hidden, hidden, mlpHidden];
    const layers = rows.map((count, i) => ({
      weight: draw([count, hidden], i),
      bias: draw([count], 10 + i),
    }));
    const [q, k, v, mlp] = joined
      ? [draw([3 * hidden + mlpHidden, hidden], 20)].flatMap((weight) => {
        const bias = draw([3 * hidden + mlpHidden], 21);
        return rows.map((count, i) => ({
          weight: weight.narrow(0, i * hidden, count),
          bias: bias.narrow(0, i * hidden, count),
        }));
      })
      : layers;
    const out = { weight: draw([hidden, hidden + mlpHidden], 4), bias: draw([hidden], 14) };
    const [normQ, normK] = [5, 6].map((i) =>
      sample(device, [headDim], dtype, (at) => 1 + noise(seed + i)(at) / 4).tensor
    );
    return { q, k, v, mlp, out, normQ, normK, heads };
  };

  forEachGpu("parallelBranchesFused", (test) => {
    test("equals its primitives, whichever way is the faster", async (device) => {
      const measured = device.fastest;
      const drawn = fc.record({
        batch: fc.integer({ min: 1, max: 2 }),
        tokens: fc.constantFrom(1, 5, 24, 77),
        heads: fc.integer({ min: 1, max: 3 }),
        headDim: fc.constantFrom(2, 8, 20, 64),
        mlpHidden: fc.constantFrom(1, 7, 24, 512),
        joined: fc.boolean(),
        way: fc.constantFrom(0, 1),
        dtype: dtypes,
        seed: seeds,
      });
      await fc.assert(
        fc.asyncProperty(drawn, async (one) => {
          const { batch, tokens, heads, headDim, dtype, seed } = one;
          device.fastest = (_key, ways) => one.way % ways.length;
          const [fused, composite] = device.scope(() => {
            const layers = block(device, one);
            const x = sample(device, [batch, tokens, heads * headDim], dtype, noise(seed + 30)).tensor;
            const [cos, sin] = [1, 2].map((i) =>
              sample(device, [tokens, headDim], "f32", noise(seed + 40 + i)).tensor
            );
            const ops = { ...eagerOps, linears: joinedLinears };
            const fusedOps = { ...ops, linearGelu: linearGeluFused, jointAttention: jointAttentionFused };
            return [
              parallelBranchesFused(x, layers, cos, sin, EPS, fusedOps),
              parallelBranches(x, layers, cos, sin, EPS, ops),
            ];
          });
          assertClose(
            await valuesOf(fused),
            await valuesOf(composite),
            dtype === "f32" ? 1e-5 : 2e-2,
            "parallel branches",
          );
          for (const tensor of [fused, composite]) tensor.dispose();
        }),
        { numRuns: 30 },
      );
      device.fastest = measured;
    });

    test("refuses an output projection that does not fit", (device) =>
      device.scope(() => {
        const layers = block(device, {
          heads: 2,
          headDim: 8,
          mlpHidden: 24,
          joined: false,
          dtype: "f32",
          seed: 1,
        });
        const x = Tensor.empty(device, [1, 4, 16], "f32");
        const table = Tensor.empty(device, [4, 8], "f32");
        const wrong = { ...layers, out: { weight: layers.out.weight.narrow(1, 0, 39) } };
        assert.throws(() => parallelBranchesFused(x, wrong, table, table, EPS, eagerOps), ShapeError);
      }));
  });
}
