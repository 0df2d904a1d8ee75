/** The elementwise and copying kernels on the emulated GPU, and how they are launched at FLUX's sizes. */
import assert from "node:assert/strict";
import { type DType, dtypeBytes } from "../../ffi/dtype.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { adaLayerNormFloat8, adaLayerNormFused } from "../../kernels/ada_layer_norm.ts";
import { add } from "../../kernels/add.ts";
import { addRmsNormFused } from "../../kernels/add_rms_norm.ts";
import { cast } from "../../kernels/cast.ts";
import { concat } from "../../kernels/concat.ts";
import { contiguous } from "../../kernels/contiguous.ts";
import { gatedAdaLayerNormFloat8, gatedAdaLayerNormFused } from "../../kernels/gated_ada_layer_norm.ts";
import { gatedResidual } from "../../kernels/gated_residual.ts";
import { groupNormSiluFused } from "../../kernels/group_norm_silu.ts";
import { NCHW } from "../../kernels/layout.ts";
import { geluTanhFloat8 } from "../../kernels/gelu_float8.ts";
import { geluTanh } from "../../kernels/gelu_tanh.ts";
import { jointQkNormRopeFused } from "../../kernels/joint_qk_norm_rope.ts";
import { modulate } from "../../kernels/modulate.ts";
import { multiply } from "../../kernels/multiply.ts";
import { silu } from "../../kernels/silu.ts";
import { toPixels } from "../../kernels/to_pixels.ts";
import { upsampleNearest } from "../../kernels/upsample_nearest.ts";
import { copySuite } from "../support/kernel_suites/copies.ts";
import { elementwiseSuite } from "../support/kernel_suites/elementwise.ts";
import { type Launched, openNullGpu } from "../support/null_gpu.ts";

elementwiseSuite();
copySuite();

/** The launches of `body` at sizes that nothing here could compute. */
function launchesOf(
  body: (tensor: (shape: readonly number[], dtype: DType) => Tensor) => void,
): readonly Launched[] {
  const { gpu, launches } = openNullGpu();
  body((shape, dtype) => Tensor.empty(gpu, shape, dtype));
  return launches;
}

for (const dtype of ["bf16", "f32"] as const) {
  Deno.test(`FLUX's shapes in ${dtype} move 16 bytes at a time and fill the GPU`, () => {
    const tokens = [1, 4352, 3072];
    const wide = [1, 4352, 12288];
    const picture = [1, 128, 1024, 1024];
    const launches = launchesOf((tensor) => {
      silu(tensor(wide, dtype));
      silu(tensor(picture, dtype));
      add(tensor(picture, dtype), tensor(picture, dtype));
      multiply(tensor([1, 512, 10240], dtype), tensor([1, 512, 10240], dtype));
      cast(tensor(wide, dtype), dtype === "f32" ? "bf16" : "f32");
      toPixels(tensor([1, 3, 1024, 1024], dtype));
      const [shift, scale, gate] = tensor([1, 3 * 3072], dtype).chunk(3, 1);
      modulate(tensor(tokens, dtype), scale, shift);
      gatedResidual(tensor(tokens, dtype), tensor(tokens, dtype), gate);
      adaLayerNormFused(tensor(tokens, dtype), scale, shift, 1e-6);
      gatedAdaLayerNormFused(tensor(tokens, dtype), tensor(tokens, dtype), gate, scale, shift, 1e-6);
      adaLayerNormFloat8(tensor(tokens, dtype), scale, shift, 1e-6);
      gatedAdaLayerNormFloat8(tensor(tokens, dtype), tensor(tokens, dtype), gate, scale, shift, 1e-6);
      const text = [1, 256, 4096];
      addRmsNormFused(tensor(text, dtype), tensor(text, dtype), tensor([4096], dtype), 1e-6);
      // A single block's product: q, k, v and the MLP.
      const product = tensor([1, 4352, 21504], dtype);
      const [q, k, v] = product.narrow(2, 0, 9216).chunk(3, 2).map((x) => x.reshape([1, 4352, 24, 128]));
      const norm = tensor([128], dtype);
      const table = tensor([4352, 128], "f32");
      jointQkNormRopeFused([{ q, k, v, normQ: norm, normK: norm }], table, table, 1e-6);
      geluTanh(product.narrow(2, 9216, 12288), tensor([1, 4352, 15360], dtype).narrow(2, 3072, 12288));
      geluTanhFloat8(product.narrow(2, 9216, 12288), tensor(tokens, dtype));
      geluTanhFloat8(tensor(wide, dtype));
    });
    for (const { constants, blocks, threads } of launches) {
      // cast's pieces are 16 bytes of the wider dtype, f32.
      const width = 16 / dtypeBytes(dtype);
      assert.ok(constants.N === width || constants.N === 4, `N is ${constants.N}`);
      assert.ok(blocks >= 132 && threads >= 128, `${blocks} blocks of ${threads} threads`);
    }
    assert.equal(launches.length, 17);

    const [upsampled] = launchesOf((tensor) => void upsampleNearest(tensor([1, 256, 512, 512], dtype)));
    assert.equal(2 * upsampled.constants.N * dtypeBytes(dtype), 16);
    const channelsLast = launchesOf((tensor) => {
      const picture = tensor([1, 512, 512, 256], dtype).permute(NCHW);
      upsampleNearest(picture);
      add(picture, picture);
      groupNormSiluFused(picture, 32, tensor([256], dtype), tensor([256], dtype), 1e-6);
    });
    assert.equal(channelsLast.length, 5); // three of them the norm's
    for (const { constants, blocks } of channelsLast) {
      assert.ok(
        constants.N * dtypeBytes(dtype) === 16 && (blocks >= 1000 || blocks === 32),
        `${blocks} blocks`,
      );
    }
    const copies = launchesOf((tensor) => {
      concat([tensor(tokens, dtype), tensor(wide, dtype)], 2);
      concat([tensor([1, 256, 24, 128], dtype), tensor([1, 4096, 24, 128], dtype)], 1);
    });
    assert.deepEqual(copies.map(({ constants }) => constants.BYTES), [16, 16, 16, 16]);
    // All but the 256 text tokens, 1.5 MB.
    assert.ok(copies.toSpliced(2, 1).every(({ blocks }) => blocks >= 132));
    const transposes = launchesOf((tensor) => {
      contiguous(tensor(picture, dtype).permute([0, 2, 3, 1]));
      contiguous(tensor([1, 1024, 1024, 128], dtype).permute([0, 3, 1, 2]));
    });
    assert.ok(transposes.every(({ constants }) => constants.E * dtypeBytes(dtype) === 4));
  });
}

Deno.test("what has more elements than an int counts is launched with 64-bit sizes", () => {
  const size = 2 ** 32 + 8;
  const [activated, copied] = launchesOf((tensor) => {
    silu(tensor([size], "bf16"));
    contiguous(tensor([2 ** 20, 8192], "bf16").narrow(1, 0, 4096));
  });
  assert.equal(activated.args[2], BigInt(size / 8));
  assert.ok(activated.blocks * activated.threads * 4 >= size / 8 && activated.blocks < 2 ** 31);
  assert.equal(copied.args[5], 16n);
  assert.ok(copied.blocks < 2 ** 31);
});
