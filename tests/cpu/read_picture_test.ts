/** Pictures from files, and in another size, against what Pillow reads and resizes. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { resizeLanczos } from "../../recipes/base/lanczos.ts";
import { FileError, UsageError } from "../../recipes/base/errors.ts";
import { decodePicture, readPicture } from "../../recipes/base/read_picture.ts";
import { inFolder } from "../support/folders.ts";
import { goldenPath } from "../support/golden.ts";
import { SafetensorsFile } from "../../recipes/base/safetensors.ts";

using golden = SafetensorsFile.open(goldenPath("pictures.safetensors"));
const expected = new Map(
  golden.names.map((name) => [name, { shape: golden.info(name).shape, rgb: golden.bytes(name).slice() }]),
);
const FILES = [...expected.keys()].filter((name) => /\.(png|jpg)$/.test(name));

/** How far decoders of JPEG may be from libjpeg: its inverse transform and its upsampling of colours round in their own way. */
const JPEG_LIMIT = 3;

for (const name of FILES) {
  const exact = name.endsWith(".png");
  Deno.test(`readPicture reads ${name} as Pillow does${exact ? "" : `, within ${JPEG_LIMIT}/255`}`, async () => {
    const { shape: [height, width], rgb } = expected.get(name)!;
    const picture = await readPicture(goldenPath(`pictures/${name}`));
    assert.deepEqual([picture.width, picture.height], [width, height]);
    assert.equal(picture.rgb.length, rgb.length);
    let worst = 0;
    let sum = 0;
    picture.rgb.forEach((value, i) => {
      worst = Math.max(worst, Math.abs(value - rgb[i]));
      sum += Math.abs(value - rgb[i]);
    });
    assert.ok(worst <= (exact ? 0 : JPEG_LIMIT), `a pixel differs by ${worst}/255`);
    assert.ok(sum / rgb.length <= 0.25, `pixels differ by ${sum / rgb.length}/255 on average`);
  });
}

Deno.test("resizeLanczos gives Pillow's pixels, bit for bit", () => {
  const { rgb } = expected.get("photo.png")!;
  const sizes = [...expected.keys()].filter((name) => /^\d+x\d+$/.test(name));
  assert.ok(sizes.length >= 6);
  for (const name of sizes) {
    const [width, height] = name.split("x").map(Number);
    assert.deepEqual(resizeLanczos(rgb, 60, 44, width, height), expected.get(name)!.rgb, name);
  }
});

Deno.test("resizeLanczos keeps one colour, and turns with the picture", () => {
  const side = fc.integer({ min: 1, max: 40 });
  fc.assert(fc.property(side, side, side, side, fc.nat(255), (width, height, toWidth, toHeight, level) => {
    const flat = new Uint8Array(width * height * 3).fill(level);
    const resized = resizeLanczos(flat, width, height, toWidth, toHeight);
    assert.equal(resized.length, toWidth * toHeight * 3);
    assert.ok(resized.every((value) => value === level));
  }));
  // A picture that is mirrored before or after is the same one.
  const [width, height] = [23, 9];
  const mirrored = (rgb: Uint8Array, columns: number) =>
    rgb.map((_, i) => {
      const [row, column, channel] = [Math.floor(i / 3 / columns), Math.floor(i / 3) % columns, i % 3];
      return rgb[(row * columns + columns - 1 - column) * 3 + channel];
    });
  const rgb = Uint8Array.from({ length: width * height * 3 }, (_, i) => (i * 71 + (i * i >> 3)) & 255);
  for (const toWidth of [7, 23, 50]) {
    const once = mirrored(resizeLanczos(rgb, width, height, toWidth, 5), toWidth);
    assert.deepEqual(resizeLanczos(mirrored(rgb, width), width, height, toWidth, 5), once);
  }
});

Deno.test("readPicture refuses what is no picture, and says which file and why", async () => {
  const png = Deno.readFileSync(goldenPath("pictures/photo.png"));
  const jpeg = Deno.readFileSync(goldenPath("pictures/photo.jpg"));
  const huge = png.slice();
  new DataView(huge.buffer).setUint32(16, 100_000);
  new DataView(huge.buffer).setUint32(20, 100_000);
  const empty = png.slice();
  new DataView(empty.buffer).setUint32(16, 0);
  const cases: [Uint8Array, typeof UsageError | typeof FileError, RegExp][] = [
    [new Uint8Array(), UsageError, /a\.img is neither a PNG nor a JPEG/],
    [new TextEncoder().encode("GIF89a............"), UsageError, /neither a PNG nor a JPEG/],
    [huge, UsageError, /a\.img has 100000 x 100000 pixels: give one of at most/],
    [empty, FileError, /a\.img is damaged: it tells no size/],
    [png.subarray(0, 20), FileError, /a\.img is damaged: it tells no size/],
    [png.subarray(0, png.length >> 1), FileError, /a\.img/],
    [jpeg.subarray(0, 30), FileError, /a\.img is damaged: it tells no size/],
  ];
  for (const [bytes, type, message] of cases) {
    await assert.rejects(decodePicture(bytes, "a.img"), (error: Error) => {
      assert.ok(error instanceof type, `${error}`);
      assert.match(error.message, message);
      return true;
    });
  }
  await inFolder(async (folder) => {
    await assert.rejects(readPicture(`${folder}/none.png`), {
      name: "FileError",
      message: /none\.png cannot be read: there is no such file/,
    });
    await assert.rejects(readPicture(folder), { name: "FileError" });
  });
});

Deno.test("readPicture reads damaged files or says so, and never anything else", async () => {
  const files = ["photo.png", "turned6.png", "turned3.jpg", "progressive.jpg"]
    .map((name) => Deno.readFileSync(goldenPath(`pictures/${name}`)));
  const damage = fc.tuple(
    fc.constantFrom(...files),
    fc.array(fc.tuple(fc.nat(), fc.nat(255)), { maxLength: 4 }),
    fc.nat(),
  );
  await fc.assert(
    fc.asyncProperty(damage, async ([file, changes, cut]) => {
      const bytes = file.slice(0, file.length - cut % 8 * (cut % 200));
      for (const [at, value] of changes) bytes[at % bytes.length] = value;
      try {
        const { width, height, rgb } = await decodePicture(bytes, "a");
        assert.equal(rgb.length, width * height * 3);
      } catch (error) {
        assert.ok(error instanceof FileError || error instanceof UsageError, `${error}`);
      }
    }),
    { numRuns: 150 },
  );
});
