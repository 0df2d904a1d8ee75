/** Weights on a GPU: a recipe with another dtype takes them over one by one. */
import assert from "node:assert/strict";
import type { Device, Memory } from "../../ffi/device.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { eagerOps, type Ops } from "../../recipes/base/ops.ts";
import { castWeights, under, type Weights, weightsFrom } from "../../recipes/base/weights.ts";

/** A device that only counts its memory, and a cast that writes down what was in use when it was issued. */
function counting(kind: "cpu" | "cuda") {
  const live = new Set<Memory>();
  let next = 0x1000n;
  const device = {
    kind,
    name: kind,
    alloc(byteLength: number): Memory {
      const memory = { device: device as unknown as Device, pointer: next, byteLength };
      next += BigInt(byteLength);
      live.add(memory);
      return memory;
    },
    free: (memory: Memory) => assert.ok(live.delete(memory), "freed twice"),
  };
  const inUse = () => [...live].reduce((sum, { byteLength }) => sum + byteLength, 0);
  const issued: number[] = [];
  const ops: Ops = {
    ...eagerOps,
    cast(x, dtype, memory) {
      assert.ok(live.has(x.memory), "the weight was freed before its cast was issued");
      issued.push(inUse());
      return new Tensor(memory!, dtype, x.shape);
    },
  };
  const tensor = (size: number) => new Tensor(device.alloc(2 * size), "bf16", [size]);
  return { ops, tensor, live, inUse, issued };
}

function named(tensors: Record<string, Tensor>): Weights {
  return weightsFrom(new Map(Object.entries(tensors)));
}

Deno.test("on a GPU each weight is freed when its cast is issued, and asking for it is a clear error", () => {
  const { ops, tensor, inUse, issued } = counting("cuda");
  const weights = named({ "m.a": tensor(100), "m.b": tensor(100), "m.c": tensor(100) });
  const wide = castWeights(weights, "f32", ops);
  assert.deepEqual(issued, [600 + 400, 400 + 800, 200 + 1200], "never all of both");
  assert.equal(inUse(), 1200);
  assert.equal(wide.get("m.a").dtype, "f32");
  for (
    const use of [
      () => weights.get("m.a"),
      () => under(weights, "m").get("b"),
      () => castWeights(weights, "f32", ops),
    ]
  ) {
    assert.throws(
      use,
      (error: unknown) =>
        error instanceof UsageError &&
        /m\.[ab] is gone from cuda: a recipe with another dtype/.test(error.message) &&
        /load the model once for each dtype/.test(error.hint ?? ""),
    );
  }
  assert.ok(weights.has("m.a"), "it is still known, so that nothing takes another path without it");
});

Deno.test("what one owner of shared weights frees is gone for the others, and is freed once", () => {
  const { ops, tensor, live } = counting("cuda");
  const model = named({ a: tensor(4), b: tensor(4) });
  const plan = castWeights(model, "bf16", ops);
  plan.free("a");
  assert.throws(() => model.get("a"), UsageError);
  assert.equal(model.get("b"), plan.get("b"));
  model.free("a");
  model.free("b");
  assert.throws(() => plan.get("b"), UsageError);
  assert.equal(live.size, 0);
});

Deno.test("on a GPU weights that have the dtype are shared, tied ones are cast and freed once", () => {
  const { ops, tensor, live, issued } = counting("cuda");
  const tied = tensor(50);
  const kept = new Tensor(tensor(8).memory, "f32", [4]);
  const weights = named({ shared: tied, alias: tied, kept });
  const wide = castWeights(weights, "f32", ops);
  assert.equal(issued.length, 1);
  assert.equal(wide.get("shared"), wide.get("alias"));
  assert.equal(wide.get("kept"), weights.get("kept"));
  assert.deepEqual([live.has(tied.memory), live.size], [false, 2]);
  for (const name of wide.names) wide.free(name);
  assert.equal(live.size, 0);
  wide.free("shared");
  assert.throws(() => wide.get("alias"), UsageError);
});

Deno.test("on the CPU the weights stay: another plan may want them as they are", () => {
  const { ops, tensor, live } = counting("cpu");
  const weights = named({ a: tensor(10) });
  castWeights(weights, "f32", ops);
  castWeights(weights, "f32", ops);
  assert.equal(weights.get("a").dtype, "bf16");
  assert.equal(live.size, 3);
});
