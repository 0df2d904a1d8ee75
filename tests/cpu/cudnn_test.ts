/**
 * cuDNN without a GPU: the constants against an installed header, and plans that the real library makes for an H100
 * that is not there, which proves descriptors, attributes and values.
 */
import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import type { CudaContext } from "../../ffi/cuda/context.ts";
import { Cudnn } from "../../ffi/cuda/cudnn.ts";
import { CudnnBackend, CudnnError, HEADER, int64 } from "../../ffi/cuda/cudnn_backend.ts";
import {
  type ConvLayouts,
  CudnnPlanner,
  type ExecutionPlan,
  ID,
  type Layout,
  variantPack,
} from "../../ffi/cuda/cudnn_plan.ts";
import type { DType } from "../../ffi/dtype.ts";
import { FfiError } from "../../ffi/errors.ts";
import { contiguousStrides, Tensor } from "../../ffi/tensor.ts";
import { channelsLast } from "../../recipes/04_channels_last.ts";
import { compareWithHeaders, compileC, missingHeaders } from "../support/cuda_headers.ts";
import { issueAutoencoder } from "../support/flux_autoencoder.ts";
import { H100 } from "../support/h100.ts";
import STAND_IN from "../support/libcuda_on_cpu.c" with { type: "text" };
import { ATTENTION_CASES } from "../support/plan_attention.ts";

const noHeaders = await missingHeaders("cudnn.h");
Deno.test({
  name: `cuDNN's constants are those of cudnn.h${noHeaders === undefined ? "" : ` (skipped: ${noHeaders})`}`,
  ignore: noHeaders !== undefined,
  fn: async () => assert.equal(await compareWithHeaders(["cudnn.h"], HEADER), undefined),
});

function missingLibrary(): string | undefined {
  try {
    using backend = new CudnnBackend();
    backend.openCompiler();
    return undefined;
  } catch (error) {
    if (error instanceof FfiError) return error.message.split(". ")[0];
    throw error;
  }
}

const noLibrary = missingLibrary();
const cudnnTest = (name: string, fn: () => void | Promise<void>, skip = noLibrary) =>
  Deno.test({
    name: `cuDNN: ${name}${skip === undefined ? "" : ` (skipped: ${skip})`}`,
    ignore: skip !== undefined,
    fn,
  });

type Order = "NCHW" | "NHWC";
const DIMENSIONS: Readonly<Record<Order, readonly number[]>> = { NCHW: [0, 1, 2, 3], NHWC: [0, 2, 3, 1] };

function layout(dtype: DType, shape: readonly number[], order: Order, alignment = 16): Layout {
  const strides: number[] = [];
  let step = 1;
  for (const dim of DIMENSIONS[order].toReversed()) {
    strides[dim] = step;
    step *= shape[dim];
  }
  return { dtype, shape, strides, alignment };
}

interface Conv {
  readonly batch?: number;
  readonly channels: number;
  readonly size: number;
  readonly out: number;
  readonly kernel: number;
  readonly stride?: number;
  readonly bias?: boolean;
  readonly alignment?: number;
}

/** A convolution as the autoencoder has them: same size, or half of it with zeros below and to the right only. */
function convLayouts(dtype: DType, order: Order, conv: Conv): ConvLayouts {
  const { batch = 1, channels, size, out, kernel, stride = 1, bias = true, alignment = 16 } = conv;
  const edge = kernel >> 1;
  return {
    x: layout(dtype, [batch, channels, size, size], order, alignment),
    weight: layout(dtype, [out, channels, kernel, kernel], order, alignment),
    residual: undefined,
    bias: bias ? { dtype, shape: [out], strides: [1], alignment } : undefined,
    out: layout(dtype, [batch, out, size / stride, size / stride], order, alignment),
    stride,
    padding: stride === 2 ? [0, 0, 1, 1] : [edge, edge, edge, edge],
  };
}

/** What cuDNN has made of a graph, from the plan's own JSON. */
// deno-lint-ignore no-explicit-any -- the schema is cuDNN's and undocumented
function jsonOf(plan: ExecutionPlan): any {
  return JSON.parse(new TextDecoder().decode(plan.json()).replace(/\0+$/, ""));
}

function withPlanner(body: (planner: CudnnPlanner, backend: CudnnBackend) => void): void {
  using backend = new CudnnBackend();
  using planner = new CudnnPlanner(backend, { deviceProperties: H100 });
  body(planner, backend);
}

cudnnTest("plans the autoencoder's convolutions in every dtype and order", () =>
  withPlanner((planner) => {
    const convs: Conv[] = [
      { channels: 16, size: 128, out: 512, kernel: 3 },
      { channels: 512, size: 128, out: 512, kernel: 3 },
      { channels: 512, size: 256, out: 256, kernel: 1 },
      { channels: 128, size: 1024, out: 3, kernel: 3 },
      { channels: 3, size: 1024, out: 128, kernel: 3 },
      { channels: 128, size: 1024, out: 128, kernel: 3, stride: 2 },
      { channels: 256, size: 512, out: 256, kernel: 3, bias: false },
      // The small model's and odd ones.
      { batch: 2, channels: 16, size: 16, out: 112, kernel: 3 },
      { channels: 5, size: 7, out: 3, kernel: 3 },
      { channels: 1, size: 7, out: 3, kernel: 3 },
      { channels: 8, size: 1, out: 8, kernel: 1 },
      { channels: 64, size: 32, out: 64, kernel: 3, alignment: 4 },
    ];
    for (const dtype of ["f32", "bf16", "f16"] as const) {
      for (const order of ["NCHW", "NHWC"] as const) {
        for (const conv of convs) {
          using plan = planner.conv(convLayouts(dtype, order, conv));
          const what = `${dtype} ${order} ${JSON.stringify(conv)}: engine ${plan.engine}`;
          assert(plan.workspaceBytes <= 2 ** 31, `${what} wants ${plan.workspaceBytes} bytes`);
          const note = (name: "TENSOR_CORE" | "DOWN_CONVERT_INPUTS" | "REDUCED_PRECISION_REDUCTION") =>
            plan.numericalNotes.includes(HEADER[`CUDNN_NUMERICAL_NOTE_${name}`]);
          assert(!note("REDUCED_PRECISION_REDUCTION"), what);
          if (dtype === "f32") assert(!note("TENSOR_CORE") && !note("DOWN_CONVERT_INPUTS"), what);
          else if (conv.channels >= 128) assert(note("TENSOR_CORE"), what);
        }
      }
    }
  }));

for (const direction of ["decode", "encode"] as const) {
  cudnnTest(
    `plans FLUX.1's autoencoder with its channels last (${direction})`,
    () =>
      withPlanner((planner) => {
        const layoutOf = ({ dtype, shape, strides }: Tensor): Layout => ({
          dtype,
          shape,
          strides,
          alignment: 16,
        });
        for (const dtype of ["bf16", "f32"] as const) {
          const { convs } = issueAutoencoder(direction, dtype, [channelsLast]);
          for (const { x, weight, residual, bias, out, stride, padding } of convs) {
            using plan = planner.conv({
              x: layoutOf(x),
              weight: layoutOf(weight),
              residual: residual && layoutOf(residual),
              bias: layoutOf(bias!),
              out: layoutOf(out),
              stride,
              padding,
            });
            const what = `x ${x}, weight ${weight}: engine ${plan.engine} wants ${plan.workspaceBytes} bytes`;
            const tensorCores = plan.numericalNotes.includes(HEADER.CUDNN_NUMERICAL_NOTE_TENSOR_CORE);
            assert.equal(tensorCores, dtype === "bf16", what);
            // No room for a copy of a picture, except where 3 channels are made 8. In f32 only NCHW has fast engines.
            const few = x.shape[1] === 3 || out.shape[1] === 3;
            const most = dtype === "f32" ? 2 ** 31 : few ? 2 ** 25 : 2 ** 21;
            assert.ok(plan.workspaceBytes <= most, what);
          }
        }
      }),
  );
}

cudnnTest("a residual is added by the engine that a convolution has without", () =>
  withPlanner((planner) => {
    for (const [channels, size] of [[512, 128], [512, 256], [256, 512], [128, 1024], [24, 9]]) {
      const layouts = convLayouts("bf16", "NHWC", { channels, size, out: channels, kernel: 3 });
      using plain = planner.conv(layouts);
      using added = planner.conv({ ...layouts, residual: layouts.out });
      assert.equal(added.engine, plain.engine);
      const { operationGraph: { tensors, nodes } } = jsonOf(added);
      for (const id of [ID.product, ID.sum]) {
        const { isVirtual, dataType } = tensors.find(({ name }: { name: string }) => name === String(id));
        assert.deepEqual([isVirtual, dataType], [true, "CUDNN_DATA_FLOAT"]);
      }
      const [conv, first, second] = nodes;
      assert.equal(conv.Y, String(ID.product));
      assert.deepEqual([first.X, first.B, first.Y], [ID.product, ID.residual, ID.sum].map(String));
      assert.deepEqual([second.X, second.B, second.Y], [ID.sum, ID.bias, ID.out].map(String));
    }
  }));

cudnnTest("an f32 plan leaves out engines that would use TF32", () =>
  withPlanner((planner) => {
    // The same sizes in bf16 show that tensor cores are what cuDNN prefers here.
    const conv: Conv = { channels: 512, size: 128, out: 512, kernel: 3 };
    using narrow = planner.conv(convLayouts("bf16", "NHWC", conv));
    using exact = planner.conv(convLayouts("f32", "NHWC", conv));
    assert(narrow.numericalNotes.includes(HEADER.CUDNN_NUMERICAL_NOTE_TENSOR_CORE));
    assert(!exact.numericalNotes.includes(HEADER.CUDNN_NUMERICAL_NOTE_TENSOR_CORE));
  }));

cudnnTest(
  "a plan says what was asked for, also when all else is gone",
  () =>
    withPlanner((planner) => {
      const down: Conv = { channels: 128, size: 64, out: 256, kernel: 3, stride: 2 };
      using plan = planner.conv(convLayouts("bf16", "NHWC", down));
      const { operationGraph: { tensors, nodes } } = jsonOf(plan);
      const tensor = (id: number) => tensors.find(({ name }: { name: string }) => name === String(id));
      assert.deepEqual(tensor(ID.x).dim, [1, 128, 64, 64]);
      assert.deepEqual(tensor(ID.x).stride, [128 * 64 * 64, 1, 128 * 64, 128]);
      assert.deepEqual(tensor(ID.weight).dim, [256, 128, 3, 3]);
      assert.deepEqual(tensor(ID.bias).dim, [1, 256, 1, 1]);
      assert.deepEqual(tensor(ID.out).dim, [1, 256, 32, 32]);
      assert.equal(tensor(ID.product).isVirtual, true);
      assert.equal(tensor(ID.product).dataType, "CUDNN_DATA_FLOAT");
      assert.equal(tensor(ID.out).dataType, "CUDNN_DATA_BFLOAT16");
      const [conv, add] = nodes;
      assert.equal(conv.mode, "CUDNN_CROSS_CORRELATION");
      assert.equal(conv.mathPrec, "CUDNN_DATA_FLOAT");
      assert.deepEqual(conv.stride, [2, 2]);
      assert.deepEqual([conv.X, conv.W, conv.Y], [ID.x, ID.weight, ID.product].map(String));
      assert.deepEqual([conv.pad_lower, conv.pad_upper], [[0, 0], [1, 1]]); // "lower" is in front: top, left
      assert.equal(add.pointwiseMode, "CUDNN_POINTWISE_ADD");
      assert.deepEqual([add.X, add.B, add.Y], [ID.product, ID.bias, ID.out].map(String));
    }),
);

cudnnTest("a plan is restored from its JSON, and damaged JSON is an error", () =>
  withPlanner((planner) => {
    for (const order of ["NCHW", "NHWC"] as const) {
      using plan = planner.conv(convLayouts("bf16", order, { channels: 128, size: 64, out: 3, kernel: 3 }));
      const json = plan.json();
      using restored = planner.restore(json);
      assert.equal(restored.workspaceBytes, plan.workspaceBytes);
      assert.deepEqual(restored.json(), json);
      for (const damaged of [json.slice(0, 500), json.with(2, 0x41), new Uint8Array(1)]) {
        assert.throws(() => planner.restore(damaged), CudnnError);
      }
    }
  }));

cudnnTest("addresses make a pack", () => {
  using backend = new CudnnBackend();
  using _pack = variantPack(backend, [[ID.x, 0x1000n], [ID.weight, 0x2000n], [ID.out, 0x3000n]], 0n);
});

cudnnTest(
  "what it refuses is an error with the call, the attribute and its own words",
  () =>
    withPlanner((planner, backend) => {
      assert.throws(
        () =>
          backend.make("CUDNN_BACKEND_TENSOR_DESCRIPTOR", { CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS: int64(2) }),
        /cudnnBackendSetAttribute\(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS\) failed: CUDNN_STATUS_\w+ \(\d+\), \S/,
      );
      const layouts = convLayouts("bf16", "NHWC", { channels: 8, size: 8, out: 8, kernel: 3 });
      assert.throws(
        () => planner.conv({ ...layouts, out: layout("bf16", [1, 8, 5, 8], "NHWC") }),
        (error) => error instanceof CudnnError && !error.unsupported && /BAD_PARAM/.test(error.message),
      );
      // Kept unsupported by the library: a bias of another dtype than bf16 and f32.
      assert.throws(
        () => planner.conv({ ...layouts, bias: { dtype: "i32", shape: [8], strides: [1], alignment: 16 } }),
        /cuDNN: no i32 here/,
      );
    }),
);

cudnnTest("attention says no to what it does not do, without a handle", () => {
  const context = { driver: { enter: () => assert.fail("no call was due") } } as unknown as CudaContext;
  using cudnn = new Cudnn(context);
  assert.match(cudnn.version, /^9\.\d+\.\d+$/);
  const memory = { device: undefined as never, pointer: 0n, byteLength: 0 };
  const plan = (dtype: DType, headDim: number, outDtype = dtype) => {
    const shape = [1, 16, 2, headDim];
    const tensor = (dtype: DType) => new Tensor(memory, dtype, shape, contiguousStrides(shape));
    return { q: tensor(dtype), k: tensor(dtype), v: tensor(dtype), out: tensor(outDtype), scale: 1 };
  };
  assert.equal(cudnn.attention(plan("f32", 64)), false);
  assert.equal(cudnn.attention(plan("bf16", 64, "f32")), false);
  assert.equal(cudnn.attention(plan("bf16", 100)), false);
  assert.equal(cudnn.attention(plan("bf16", 512)), false);
});

cudnnTest("a residual in f32 is for others to add, without a handle", () => {
  const context = { driver: { enter: () => assert.fail("no call was due") } } as unknown as CudaContext;
  using cudnn = new Cudnn(context);
  const memory = { device: undefined as never, pointer: 0n, byteLength: 0 };
  const tensor = (...shape: number[]) => new Tensor(memory, "f32", shape);
  const [x, weight, bias] = [tensor(1, 8, 4, 4), tensor(8, 8, 3, 3), tensor(8)];
  const options = { stride: 1, padding: [1, 1, 1, 1] } as const;
  assert.equal(cudnn.convAdd({ x, weight, bias, residual: x, out: x, ...options }), false);
});

cudnnTest("plans attention, in a process with a stand-in for the driver", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const driver = `${folder}/libcuda.so.1`;
    const args = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", driver];
    assert.equal(await compileC(STAND_IN, args), undefined);
    const program = fileURLToPath(new URL("../support/plan_attention.ts", import.meta.url));
    const { success, stdout, stderr } = await new Deno.Command("deno", {
      args: ["run", "--no-prompt", "--allow-ffi", "--allow-read", "--allow-env", program, driver],
    }).output();
    const said = new TextDecoder().decode(stderr);
    assert(success, said);
    const plans = new TextDecoder().decode(stdout).trim().split("\n").map((line) => JSON.parse(line));
    assert.equal(plans.length, ATTENTION_CASES.length, said);
    for (const [i, { headDim }] of ATTENTION_CASES.entries()) {
      const { error, workspaceBytes, notes, restored } = plans[i];
      if (headDim % 8 === 0) {
        assert.equal(error, undefined);
        assert.equal(restored, workspaceBytes);
        assert(workspaceBytes <= 2 ** 20, `${workspaceBytes} bytes`);
        assert.deepEqual(notes, [HEADER.CUDNN_NUMERICAL_NOTE_TENSOR_CORE]);
      } else {
        assert.match(error, /no engine takes this/);
      }
    }
    // With the kernels in the JSON nothing is compiled again: milliseconds instead of half a second.
    const total = (what: "planning" | "restoring") =>
      plans.reduce((sum, { milliseconds }) => sum + (milliseconds?.[what] ?? 0), 0);
    assert.ok(total("restoring") < total("planning") / 4, `${total("restoring")} of ${total("planning")} ms`);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}, noLibrary ?? noHeaders);
