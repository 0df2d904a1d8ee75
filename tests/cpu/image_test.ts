/** PNG and its text: read back by our reader and by imagescript. */

import assert from "node:assert/strict";
import fc from "fast-check";
import { Image } from "imagescript";
import { encodePng, parametersText, readPngText } from "../../recipes/base/image.ts";
import { PngEncoder } from "../../recipes/base/png_encoder.ts";
import { FileError, UsageError } from "../../recipes/base/errors.ts";

const gradient = (width: number, height: number) =>
  Uint8Array.from({ length: width * height * 3 }, (_, i) => (i * 37 + (i >> 5)) & 255);

const chunkTypes = (png: Uint8Array): string[] => {
  const types: string[] = [];
  const view = new DataView(png.buffer, png.byteOffset, png.byteLength);
  for (let offset = 8; offset < png.length; offset += 12 + view.getUint32(offset)) {
    types.push(String.fromCharCode(...png.subarray(offset + 4, offset + 8)));
  }
  return types;
};

Deno.test("encodePng: pixels survive, opaque, in the right place", async () => {
  for (const [width, height] of [[1, 1], [7, 3], [64, 48]]) {
    const rgb = gradient(width, height);
    const decoded = await Image.decode(await encodePng(rgb, width, height, { parameters: "é 猫" })) as Image;
    assert.deepEqual([decoded.width, decoded.height], [width, height]);
    decoded.bitmap.forEach((value, i) => {
      const expected = i % 4 === 3 ? 255 : rgb[(i >> 2) * 3 + i % 4];
      assert.equal(value, expected);
    });
  }
});

Deno.test("encodePng: Latin-1 in tEXt, the rest in iTXt, after IHDR, and nothing that changes between runs", async () => {
  const metadata = {
    parameters: "a cat\nSteps: 4",
    Author: "Zoë",
    prompt: "猫 🐈",
    empty: "",
    control: "\x85\x01",
  };
  const png = await encodePng(gradient(4, 4), 4, 4, metadata);
  assert.deepEqual(readPngText(png), metadata);
  const types = chunkTypes(png);
  assert.deepEqual(types.slice(0, 6), ["IHDR", "tEXt", "tEXt", "iTXt", "tEXt", "iTXt"]);
  assert.equal(types.at(-1), "IEND");
  assert.deepEqual(await encodePng(gradient(4, 4), 4, 4, metadata), png);
  assert.deepEqual(readPngText(await encodePng(gradient(4, 4), 4, 4)), {});
});

Deno.test("encodePng: any text comes back (NUL and lone surrogates as U+FFFD)", async () => {
  const text = fc.string({
    unit: fc.oneof(fc.string({ unit: "binary", maxLength: 1 }), fc.constant("\ud800")),
  });
  await fc.assert(
    fc.asyncProperty(text, async (value) => {
      const read = readPngText(await encodePng(gradient(1, 1), 1, 1, { parameters: value }));
      assert.equal(read.parameters, value.toWellFormed().replaceAll("\0", "\ufffd"));
    }),
    { numRuns: 200 },
  );
});

Deno.test("encodePng: wrong sizes and keywords are usage errors", async () => {
  await assert.rejects(encodePng(new Uint8Array(11), 2, 2), UsageError);
  await assert.rejects(encodePng(new Uint8Array(0), 0, 2), UsageError);
  for (const keyword of ["", " a", "a ", "a  b", "猫", "a\nb", "a\0", "x".repeat(80)]) {
    await assert.rejects(
      encodePng(gradient(1, 1), 1, 1, { [keyword]: "" }),
      UsageError,
      JSON.stringify(keyword),
    );
  }
});

Deno.test("readPngText: foreign, cut and changed bytes are file errors, never a wrong answer", async () => {
  assert.throws(() => readPngText(new TextEncoder().encode("not a picture")), FileError);
  const metadata = { parameters: "a cat", prompt: "猫" };
  const png = await encodePng(gradient(3, 3), 3, 3, metadata);
  fc.assert(fc.property(fc.integer({ min: 0, max: png.length - 1 }), (length) => {
    assert.throws(() => readPngText(png.subarray(0, length)), FileError);
  }));
  fc.assert(fc.property(fc.nat(png.length - 1), fc.integer({ min: 1, max: 255 }), (at, flip) => {
    const changed = png.slice();
    changed[at] ^= flip;
    assert.throws(() => readPngText(changed), FileError);
  }));
});

Deno.test("parametersText: AUTOMATIC1111's two lines, with quoting", () => {
  const base = { prompt: "A cat, playing", steps: 4, seed: 2n ** 64n - 1n, width: 512, height: 768 };
  assert.equal(
    parametersText({ ...base, model: "FLUX.1-schnell" }),
    "A cat, playing\nSteps: 4, Sampler: Euler, CFG scale: 1, Seed: 18446744073709551615, Size: 512x768, " +
      "Model: FLUX.1-schnell",
  );
  assert.equal(
    parametersText({
      ...base,
      seed: 1,
      model: "a,b",
      guidance: 3.5,
      extra: { Note: 'x: "y"', dtype: "bf16" },
    }),
    "A cat, playing\nSteps: 4, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 1, Size: 512x768, " +
      'Model: "a,b", Note: "x: \\"y\\"", dtype: bf16',
  );
});

Deno.test("a PNG encoder gives the same bytes from a thread of its own, and its errors", async () => {
  using encoder = new PngEncoder();
  const rgb = Uint8Array.from({ length: 64 * 48 * 3 }, (_, i) => i * 7);
  for (const metadata of [{}, { parameters: "a red apple", Title: "\u4e00" }]) {
    assert.deepEqual(await encoder.encode(rgb, 64, 48, metadata), await encodePng(rgb, 64, 48, metadata));
  }
  assert.equal(rgb[5], 35, "the pixels are still the caller's");
  await assert.rejects(
    encoder.encode(rgb, 64, 47),
    /^FluxError: encoding a picture failed: .*bytes for 64x47/,
  );
  let turns = 0;
  const timer = setInterval(() => turns++, 1);
  await encoder.encode(new Uint8Array(1024 * 1024 * 3), 1024, 1024);
  clearInterval(timer);
  assert.ok(turns > 2, "this thread went on meanwhile");
});
