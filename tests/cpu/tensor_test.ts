/** Views, strided copies and memory scopes, against indexing by hand. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { FfiError } from "../../ffi/errors.ts";
import { contiguousStrides, elementCount, Tensor } from "../../ffi/tensor.ts";
import { concat } from "../../kernels/concat.ts";
import { contiguous } from "../../kernels/contiguous.ts";
import { readFloat32 } from "../../kernels/cpu.ts";
import { openReference } from "../support/reference_provider.ts";

const shapes = fc.array(fc.integer({ min: 1, max: 5 }), { minLength: 1, maxLength: 4 });

/** A tensor that counts up from 0. */
function counting(device: ReturnType<typeof openReference>, shape: readonly number[]): Tensor {
  return Tensor.fromFloat32(device, Float32Array.from({ length: elementCount(shape) }, (_, i) => i), shape);
}

/** A strided tensor's element numbers in row-major order, by walking its strides. */
function elements(tensor: Tensor): number[] {
  return Array.from({ length: tensor.size }, (_, index) => {
    let at = tensor.offset;
    for (let dim = tensor.rank - 1; dim >= 0; dim--) {
      at += (index % tensor.shape[dim]) * tensor.strides[dim];
      index = Math.floor(index / tensor.shape[dim]);
    }
    return at;
  });
}

Deno.test("permute, narrow and contiguous agree with walking the strides", () => {
  using device = openReference();
  fc.assert(fc.property(
    shapes.chain((shape) =>
      fc.record({
        shape: fc.constant(shape),
        order: fc.shuffledSubarray(shape.map((_, dim) => dim), { minLength: shape.length }),
        dim: fc.nat(shape.length - 1),
        cut: fc.tuple(
          fc.double({ min: 0, max: 0.99, noNaN: true }),
          fc.double({ min: 0, max: 1, noNaN: true }),
        ),
      })
    ),
    ({ shape, order, dim, cut }) =>
      device.scope(() => {
        const permuted = counting(device, shape).permute(order);
        const start = Math.floor(cut[0] * permuted.shape[dim]);
        const length = 1 + Math.floor(cut[1] * (permuted.shape[dim] - start - 1));
        const view = permuted.narrow(dim, start, length);
        assert.deepEqual([...readFloat32(view)], elements(view));
        const dense = contiguous(view);
        assert.ok(dense.isContiguous);
        assert.deepEqual(dense.shape, view.shape);
        assert.deepEqual([...readFloat32(dense)], elements(view));
      }),
  ));
});

Deno.test("reshape keeps row-major order, or refuses what strides forbid", () => {
  using device = openReference();
  let refused = 0;
  fc.assert(fc.property(
    shapes.chain((shape) =>
      fc.record({
        shape: fc.constant(shape),
        order: fc.shuffledSubarray(shape.map((_, dim) => dim), { minLength: shape.length }),
        split: fc.nat(shape.length),
      })
    ),
    ({ shape, order, split }) =>
      device.scope(() => {
        const view = counting(device, shape).permute(order);
        const target = [elementCount(view.shape.slice(0, split)), elementCount(view.shape.slice(split))];
        const expected = elements(view);
        try {
          assert.deepEqual(elements(view.reshape(target)), expected);
        } catch (error) {
          if (!(error instanceof FfiError)) throw error;
          refused++;
          assert.ok(!view.isContiguous, "a dense tensor can always be reshaped");
        }
      }),
  ));
  assert.ok(refused > 0, "no strided view was refused");
  assert.throws(() => counting(device, [6]).reshape([4]), FfiError);
  assert.throws(() => counting(device, [6]).reshape([-1, 4]), FfiError);
  assert.deepEqual(counting(device, [2, 3]).reshape([-1]).shape, [6]);
});

Deno.test("chunk and concat are inverse along every dimension", () => {
  using device = openReference();
  fc.assert(
    fc.property(
      shapes,
      fc.nat(3),
      fc.integer({ min: 1, max: 4 }),
      (base, dimension, parts) =>
        device.scope(() => {
          const dim = dimension % base.length;
          const x = counting(device, base.with(dim, base[dim] * parts));
          assert.deepEqual([...readFloat32(concat(x.chunk(parts, dim), dim))], [...readFloat32(x)]);
          assert.deepEqual([...readFloat32(concat(x.chunk(parts, dim), dim - base.length))], [
            ...readFloat32(x),
          ]);
        }),
    ),
  );
});

Deno.test("views outside the tensor are refused", () => {
  using device = openReference();
  const x = counting(device, [2, 3]);
  for (const [dim, start, length] of [[0, 0, 3], [1, 2, 2], [1, -1, 1], [1, 0, -1]]) {
    assert.throws(() => x.narrow(dim, start, length), FfiError);
  }
  assert.throws(() => x.chunk(2, 1), FfiError);
  assert.throws(() => Tensor.fromBytes(device, new Uint8Array(3), [1], "f32"), FfiError);
});

Deno.test("a scope frees what it does not return, nested and after errors", () => {
  using device = openReference();
  const used = () => device.memoryUse().current;
  const start = used();
  const kept = device.scope(() => {
    Tensor.empty(device, [1000], "f32");
    const { deep } = device.scope(() => {
      Tensor.empty(device, [1000], "f32");
      return { deep: [Tensor.empty(device, [16], "f32")] };
    });
    return deep[0].reshape([4, 4]).permute([1, 0]); // a view keeps its memory
  });
  assert.equal(used() - start, 64);
  kept.dispose();
  assert.equal(used(), start);
  assert.throws(() => kept.dispose(), FfiError, "freeing twice is refused");
  assert.throws(() =>
    device.scope(() => {
      Tensor.empty(device, [1000], "f32");
      throw new Error("inside");
    }), /inside/);
  assert.equal(used(), start);
  assert.throws(() => device.scope(() => Promise.resolve()), TypeError);
});

Deno.test("memory that was freed is used again", () => {
  using device = openReference();
  const first = Tensor.empty(device, [1 << 16], "f32");
  const { pointer } = first;
  first.dispose();
  const second = Tensor.empty(device, [1 << 16], "f32");
  assert.equal(second.pointer, pointer);
  assert.throws(() => first.dispose(), FfiError, "the same place, but not the same memory");
  assert.equal(device.memoryUse().peak, device.memoryUse().current);
});

Deno.test("contiguousStrides", () => {
  assert.deepEqual(contiguousStrides([2, 3, 4]), [12, 4, 1]);
  assert.deepEqual(contiguousStrides([]), []);
});
