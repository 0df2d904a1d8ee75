/** Tensors on the host and in notebooks; pictures, drawings and progress bars there. */
import assert from "node:assert/strict";
import fc from "fast-check";
import { float32ToBfloat16 } from "../../ffi/bfloat16.ts";
import type { Device } from "../../ffi/device.ts";
import { heatMap } from "../../ffi/heat_map.ts";
import { openDevice } from "../../ffi/open.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { displayTensor, JUPYTER_DISPLAY, tensorStatistics } from "../../ffi/tensor_display.ts";
import { valuesFromBytes } from "../../ffi/values.ts";
import { cast } from "../../kernels/cast.ts";
import { quantizeRows } from "../../kernels/quantize_float8.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { progressContent, showPicture, showPictures, showSvg } from "../../recipes/base/notebook.ts";
import { decodePicture } from "../../recipes/base/read_picture.ts";
import { forEachGpu } from "../support/gpu_devices.ts";
import { parseXml } from "../support/xml.ts";

const range = (count: number) => Float32Array.from({ length: count }, (_, i) => i);

Deno.test("valuesFromBytes reads every dtype, at any byte offset", () => {
  const numbers = [0, 1, -2, 3];
  const bits = new Uint16Array(4);
  float32ToBfloat16(Float32Array.from(numbers), bits);
  const arrays = {
    f64: Float64Array.from(numbers),
    f32: Float32Array.from(numbers),
    f16: Float16Array.from(numbers),
    bf16: bits,
    i64: BigInt64Array.from(numbers, BigInt),
    i32: Int32Array.from(numbers),
    f8e4m3: Uint8Array.of(0x00, 0x38, 0xc0, 0x44), // OCP: exponent bias 7, 3 bits of mantissa
    f8e5m2: Uint8Array.of(0x00, 0x3c, 0xc0, 0x42), // bias 15, 2 bits
  } as const;
  for (const [dtype, array] of Object.entries(arrays)) {
    const bytes = new Uint8Array(array.buffer);
    const moved = new Uint8Array(bytes.length + 3);
    moved.set(bytes, 3);
    for (const place of [bytes, moved.subarray(3)]) {
      assert.deepEqual([...valuesFromBytes(place, dtype as keyof typeof arrays)], numbers, dtype);
    }
  }
  assert.deepEqual([...valuesFromBytes(Uint8Array.of(0, 255), "u8")], [0, 255]);
});

/** Views of one tensor, with what their elements are. */
async function checkViews(device: Device): Promise<void> {
  const x = Tensor.fromFloat32(device, range(24), [2, 3, 4]);
  const half = cast(x, "bf16");
  for (const tensor of [x, half]) {
    assert.deepEqual(await tensor.toFloat32(), range(24));
    assert.deepEqual([...await tensor.narrow(1, 1, 2).toFloat32()], [
      4,
      5,
      6,
      7,
      8,
      9,
      10,
      11,
      16,
      17,
      18,
      19,
      20,
      21,
      22,
      23,
    ]);
    assert.deepEqual([...await tensor.narrow(2, 3, 1).toFloat32()], [3, 7, 11, 15, 19, 23]);
    const turned = await tensor.permute([2, 0, 1]).toFloat32();
    assert.deepEqual([...turned.subarray(0, 6)], [0, 4, 8, 12, 16, 20]);
    assert.deepEqual([...await tensor.narrow(0, 0, 0).toFloat32()], []);
  }
}

Deno.test("toFloat32 reads views (cpu)", async () => {
  using device = await openDevice("cpu");
  await checkViews(device);
});

forEachGpu("toFloat32", (test) => {
  test("reads views", checkViews);
  test("and a display shows what was quantized", async (device) => {
    const quantized = quantizeRows(Tensor.fromFloat32(device, range(32), [2, 16]));
    const { "text/plain": text } = await displayTensor(quantized);
    assert.match(text, new RegExp(`^f8e4m3 \\[2, 16\\] on ${device.name}\nmin 0 {3}max 28 `));
  });
});

Deno.test("statistics are of the finite elements, and count the others", () => {
  assert.deepEqual(tensorStatistics(Float32Array.of(1, 2, 3, 4, NaN, Infinity, -Infinity)), {
    min: 1,
    max: 4,
    mean: 2.5,
    std: Math.sqrt(1.25),
    nan: 1,
    infinite: 2,
  });
  const none = { min: NaN, max: NaN, mean: NaN, std: NaN, nan: 1, infinite: 0 };
  assert.deepEqual(tensorStatistics(Float32Array.of(NaN)), none);
});

/** Colours of a map's cells, row by row; fails where one has two or none. */
function cellsOf({ paths, rows, columns }: ReturnType<typeof heatMap>, cell: number): string[] {
  const cells = new Array<string>(rows * columns);
  for (const { attributes: { fill, d } } of parseXml(`<g>${paths}</g>`).children) {
    for (const [, x, y, width] of d.matchAll(/M(\d+) (\d+)h(\d+)v\d+h-\d+z/g)) {
      for (let i = 0; i < Number(width) / cell; i++) {
        const at = Number(y) / cell * columns + Number(x) / cell + i;
        assert.equal(cells[at], undefined, "a cell has two colours");
        cells[at] = fill;
      }
    }
  }
  assert.ok(!cells.includes(undefined as never), "a cell has no colour");
  return cells;
}

Deno.test("a heat map is white at 0, red above, blue below, and black where a number is missing", () => {
  const map = heatMap(Float32Array.of(0, 4, -4, NaN, 2, Infinity), 2, 3, 5);
  assert.equal(map.limit, 4);
  assert.deepEqual(cellsOf(map, 5), ["#f7f7f7", "#b2182b", "#2166ac", "#000000", "#d58891", "#000000"]);
  assert.deepEqual(cellsOf(heatMap(new Float32Array(4), 2, 2, 5), 5), Array(4).fill("#f7f7f7"));
});

Deno.test("each cell of a large matrix is the mean of its own elements, and none is left out", () => {
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 300 }), fc.integer({ min: 1, max: 300 }), (rows, columns) => {
      const map = heatMap(new Float32Array(rows * columns).fill(3), rows, columns, 5);
      assert.deepEqual([map.rows, map.columns], [Math.min(rows, 64), Math.min(columns, 128)]);
      assert.equal(map.limit, 3);
      assert.ok(cellsOf(map, 5).every((colour) => colour === "#b2182b"));
    }),
  );
  const halves = Float32Array.from({ length: 2 * 256 }, (_, i) => i % 256 < 128 ? 1 : -1);
  const colours = cellsOf(heatMap(halves, 2, 256, 5), 5);
  assert.deepEqual(colours.slice(0, 128), [...Array(64).fill("#b2182b"), ...Array(64).fill("#2166ac")]);
});

Deno.test("a tensor shows itself: text, statistics, a map of its last two dimensions", async () => {
  using device = await openDevice("cpu");
  const x = Tensor.fromFloat32(device, Float32Array.from(range(24), (v) => v === 5 ? NaN : v - 12), [
    2,
    3,
    4,
  ]);
  const { "text/plain": text, "image/svg+xml": svg } = await x[JUPYTER_DISPLAY]();
  assert.equal(text, "f32 [2, 3, 4] on cpu\nmin -12   max 11   mean -0.2174   std 6.934   1 NaN");
  const drawing = parseXml(svg);
  assert.equal(drawing.name, "svg");
  const texts = drawing.children.filter(({ name }) => name === "text").map(({ text }) => text);
  assert.deepEqual(texts, [...text.split("\n"), "[0, :, :], 3 x 4, blue -12 to red 12"]);
  assert.match(
    (await displayTensor(x.permute([2, 1, 0])))["text/plain"],
    /^f32 \[4, 3, 2\] on cpu, strided\n/,
  );
});

Deno.test("scalars, rows and empty tensors show themselves, too", async () => {
  using device = await openDevice("cpu");
  for (const [shape, size] of [[[], "1 x 1"], [[5], "1 x 5"], [[2, 1], "2 x 1"]] as const) {
    const count = shape.reduce<number>((product, side) => product * side, 1);
    const x = Tensor.fromFloat32(device, new Float32Array(count).fill(2), shape);
    const { "text/plain": text, "image/svg+xml": svg } = await x[JUPYTER_DISPLAY]();
    assert.match(text, /min 2 {3}max 2 {3}mean 2 {3}std 0$/);
    assert.ok(svg.includes(`${size}, blue -2 to red 2`), svg);
    parseXml(svg);
  }
  const none = await Tensor.fromFloat32(device, [], [0, 4])[JUPYTER_DISPLAY]();
  assert.match(none["text/plain"], /^f32 \[0, 4\] on cpu\nmin NaN/);
  parseXml(none["image/svg+xml"]);
});

Deno.test("of a tensor that is too large the first elements are looked at", async () => {
  using device = await openDevice("cpu");
  const x = Tensor.empty(device, [1, 2 ** 13, 2 ** 12], "u8"); // 32 Mi elements
  const { "text/plain": text } = await x[JUPYTER_DISPLAY]();
  assert.match(text, /^u8 \[1, 8192, 4096\] on cpu\n.* {3}of the first 16777216$/);
});

Deno.test("pictures, drawings and bars have content for notebooks", async () => {
  const picture = { width: 2, height: 1, rgb: Uint8Array.of(1, 2, 3, 4, 5, 6) };
  const { "image/png": png } = await showPicture(picture)[JUPYTER_DISPLAY]();
  assert.deepEqual(await decodePicture(Uint8Array.fromBase64(png), "png"), picture);
  const { "text/html": html } = await showPictures([picture, picture], ["a < b", `"c"`])[JUPYTER_DISPLAY]();
  const captions = parseXml(html).children.map(({ children }) => children[1].text);
  assert.deepEqual(captions, ["a < b", `"c"`]);
  assert.throws(() => showPictures([picture], []), UsageError);
  assert.deepEqual(await showSvg("<svg/>")[JUPYTER_DISPLAY](), {
    "text/plain": "drawing",
    "image/svg+xml": "<svg/>",
  });
  const bar = parseXml(progressContent("<b>", 0.25, "1/4 steps")["text/html"]);
  assert.ok(bar.text.includes("<b>") && bar.text.includes("1/4 steps"));
  assert.equal(bar.children[0].attributes.value, "25");
  assert.match(progressContent("x", NaN, "")["text/html"], /value="0"/);
});
