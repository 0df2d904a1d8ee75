/** torch's generator: golden bits of 20 seeds (tests/golden/random.json), then properties. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import fc from "fast-check";
import { Generator } from "../../recipes/base/random.ts";
import { UsageError } from "../../recipes/base/errors.ts";

interface Digest {
  sha256: string;
  first: string;
  last: string;
}
type Draws = Record<string, string | string[] | Digest>;
interface Golden {
  draws: Array<Record<string, unknown> & { seed: string; float32: Draws; bfloat16: Draws }>;
}

type Draw = (generator: Generator, count: number) => Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer>;
const KINDS: Record<"float32" | "bfloat16", Draw> = {
  float32: (generator, count) => generator.randn(count),
  bfloat16: (generator, count) => generator.randnBfloat16(count),
};

const hex = (values: Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer>): string => {
  const { BYTES_PER_ELEMENT: width } = values;
  const words = width === 4 ? new Uint32Array(values.buffer) : values as Uint16Array;
  return Array.from(words, (word) => word.toString(16).padStart(2 * width, "0")).join("");
};

Deno.test("randn: torch's bits for 20 seeds, both dtypes, all sizes and sequences", () => {
  const path = new URL("../golden/random.json", import.meta.url);
  const golden = JSON.parse(Deno.readTextFileSync(path)) as Golden;
  assert.ok(golden.draws.length >= 20);
  let compared = 0;
  for (const entry of golden.draws) {
    const seed = BigInt(entry.seed);
    for (const [dtype, draw] of Object.entries(KINDS)) {
      for (const [sizes, expected] of Object.entries(entry[dtype as keyof typeof KINDS])) {
        const generator = new Generator(seed);
        const counts = sizes.split("+").map((shape) => shape.split("x").reduce((a, b) => a * Number(b), 1));
        const drawn = counts.map((count) => draw(generator, count));
        const what = `seed ${seed}, ${dtype} [${sizes}]`;
        if (Array.isArray(expected)) {
          assert.deepEqual(drawn.map(hex), expected, what);
        } else if (typeof expected === "string") {
          assert.equal(hex(drawn[0]), expected, what);
        } else {
          const [values] = drawn;
          assert.ok(hex(values).startsWith(expected.first) && hex(values).endsWith(expected.last), what);
          const digest = createHash("sha256").update(new Uint8Array(values.buffer)).digest("hex");
          assert.equal(digest, expected.sha256, what);
        }
        compared += 1;
      }
    }
    const mixed = entry["mixed 5 float32, 5 bfloat16, 3 float32"];
    const generator = new Generator(seed);
    const drawn = [generator.randn(5), generator.randnBfloat16(5), generator.randn(3)].map(hex);
    assert.deepEqual(drawn, mixed, `seed ${seed}, mixed`);
  }
  assert.ok(compared >= 400);
});

Deno.test("randn: torch's bits for 2^20 values of six seeds", () => {
  // sha256 of torch.manual_seed(seed); torch.randn(1 << 20).numpy().tobytes(), torch 2.13, AVX2.
  const digests = [
    "a64b21e3148993fa3457e801fb793d25b39a5f4234aa29735e1c9d6405f75f44",
    "8d0976b5c9b1dd63ef88c1ca085ad69c0a10699f22be85d30c79327b52f9244b",
    "fdacfd665ff972889f7451fbca0e3bec2c4634ec19fba41051ec0100c73f9131",
    "5d1d37575a8aabd3a006220a69313d69d56e39429c8c95d22093d9144a83d7a3",
    "e198291dacbe6798810c153e481d3d019c9339d03dbd07f775e1e2abc5123b76",
    "8b6c3524e868f0b8547c9f9c0fa62a9d47e46483d2e0db2204446cc8dbb26d6d",
  ];
  digests.forEach((expected, seed) => {
    const values = new Generator(seed).randn(1 << 20);
    assert.equal(
      createHash("sha256").update(new Uint8Array(values.buffer)).digest("hex"),
      expected,
      `seed ${seed}`,
    );
  });
});

const anySeed = fc.bigInt({ min: -(2n ** 63n), max: 2n ** 64n - 1n });

Deno.test("randn: one seed gives one stream, and only its low 32 bits matter", () => {
  fc.assert(
    fc.property(anySeed, fc.integer({ min: 0, max: 200 }), (seed, count) => {
      const values = hex(new Generator(seed).randn(count));
      assert.equal(hex(new Generator(seed).randn(count)), values);
      assert.equal(hex(new Generator(BigInt.asUintN(32, seed)).randn(count)), values);
      if (count > 0) assert.notEqual(hex(new Generator(seed ^ 1n).randn(count)), values);
    }),
    { numRuns: 100 },
  );
});

Deno.test("randn: whole blocks of 16 are one stream however they are split", () => {
  const blocks = fc.array(fc.integer({ min: 1, max: 6 }), { minLength: 1, maxLength: 5 });
  fc.assert(
    fc.property(anySeed, blocks, (seed, lengths) => {
      for (const draw of Object.values(KINDS)) {
        const split = new Generator(seed);
        const parts = lengths.map((length) => hex(draw(split, 16 * length)));
        const whole = draw(new Generator(seed), 16 * lengths.reduce((a, b) => a + b));
        assert.equal(parts.join(""), hex(whole));
      }
    }),
    { numRuns: 50 },
  );
});

Deno.test("randn: an incomplete block redraws the last 16 and leaves the rest", () => {
  fc.assert(
    fc.property(anySeed, fc.integer({ min: 17, max: 200 }), (seed, count) => {
      const kept = Math.floor((count - 16) / 16) * 16;
      const values = new Generator(seed).randn(count);
      const longer = new Generator(seed).randn(count + 16 - count % 16);
      assert.deepEqual(values.slice(0, kept), longer.slice(0, kept));
    }),
    { numRuns: 50 },
  );
});

Deno.test("randn: bfloat16 of whole blocks is float32 rounded to nearest even", () => {
  const words = new Uint32Array(new Generator(11).randn(4096).buffer);
  const rounded = new Generator(11).randnBfloat16(4096);
  words.forEach((word, i) => {
    const below = word >>> 16;
    const rest = word & 0xffff;
    const up = rest > 0x8000 || (rest === 0x8000 && (below & 1) === 1);
    assert.equal(rounded[i], up ? below + 1 : below);
  });
});

Deno.test("randn: a million values are finite with mean 0 and variance 1", () => {
  const values = new Generator(3).randn(1_000_000);
  let sum = 0;
  let squares = 0;
  for (const value of values) {
    sum += value;
    squares += value * value;
  }
  assert.ok(Math.abs(sum / values.length) <= 0.005); // 5 standard errors; NaN fails
  assert.ok(Math.abs(squares / values.length - 1) <= 0.0075);
});

Deno.test("Generator: seeds and counts that torch would refuse are usage errors", () => {
  for (const seed of [0.5, NaN, Infinity, 2 ** 53, 2n ** 64n, -(2n ** 63n) - 1n]) {
    assert.throws(() => new Generator(seed), UsageError, String(seed));
  }
  for (const count of [-1, 1.5, NaN]) assert.throws(() => new Generator(0).randn(count), UsageError);
  assert.equal(new Generator(0).randn(0).length, 0);
  assert.equal(new Generator(5).seed, 5n);
});
