import assert from "node:assert/strict";
import fc from "fast-check";
import { ShapeError } from "../../ffi/errors.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { rope, ropeReference } from "../../kernels/rope.ts";
import { rotaryTables } from "../../recipes/base/rotary.ts";
import { openReference } from "../support/reference_provider.ts";

const AXES = [4, 6, 6];
const HEAD_DIM = 16;
const positions = fc.integer({ min: 0, max: 4096 });
const head = fc.array(fc.float({ min: -8, max: 8, noNaN: true, noDefaultInfinity: true }), {
  minLength: HEAD_DIM,
  maxLength: HEAD_DIM,
});

/** One head at one position. */
function rotate(x: readonly number[], position: readonly number[]): Float32Array {
  const { cos, sin } = rotaryTables(Float32Array.from(position), AXES);
  const out = new Float32Array(HEAD_DIM);
  ropeReference(out, Float32Array.from(x), cos, sin, 1, HEAD_DIM);
  return out;
}

const dot = (a: Float32Array, b: Float32Array) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const norm = (a: Float32Array) => Math.sqrt(dot(a, a));

Deno.test("RoPE at the origin changes nothing", () => {
  fc.assert(fc.property(head, (x) => rotate(x, [0, 0, 0]).forEach((value, i) => assert.ok(value === x[i]))));
});

Deno.test("RoPE keeps the length of every head", () => {
  fc.assert(fc.property(head, fc.tuple(positions, positions, positions), (x, position) => {
    const before = norm(Float32Array.from(x));
    assert.ok(Math.abs(norm(rotate(x, position)) - before) <= 1e-5 * before + 1e-30);
  }));
});

Deno.test("RoPE: the product of a query and a key depends on the difference of their positions only", () => {
  const small = fc.integer({ min: 0, max: 200 });
  const triple = fc.tuple(small, small, small);
  fc.assert(fc.property(head, head, triple, triple, triple, (q, k, at, to, shift) => {
    const moved = (p: readonly number[]) => p.map((value, axis) => value + shift[axis]);
    const here = dot(rotate(q, at), rotate(k, to));
    const there = dot(rotate(q, moved(at)), rotate(k, moved(to)));
    const scale = norm(Float32Array.from(q)) * norm(Float32Array.from(k));
    assert.ok(Math.abs(here - there) <= 1e-5 * scale + 1e-30, `${here} and ${there}`);
  }));
});

Deno.test("RoPE turns a pair as a complex number", () => {
  const x = new Array(HEAD_DIM).fill(0).with(0, 1).with(5, 2);
  const out = rotate(x, [3, 7, 0]);
  const close = (a: number, b: number) => assert.ok(Math.abs(a - b) <= 1e-6, `${a} and ${b}`);
  close(out[0], Math.cos(3)); // axis 0, first frequency 1
  close(out[1], Math.sin(3));
  close(out[4], -2 * Math.sin(7)); // axis 1, first frequency 1
  close(out[5], 2 * Math.cos(7));
});

Deno.test("rope checks its tables", () => {
  using device = openReference();
  const x = Tensor.empty(device, [1, 3, 2, 8], "f32");
  const table = (tokens: number, headDim: number) => Tensor.empty(device, [tokens, headDim], "f32");
  assert.throws(() => rope(x, table(2, 8), table(3, 8)), ShapeError);
  assert.throws(() => rope(x, table(3, 8), table(3, 6)), ShapeError);
});
