/** How a notebook shows a tensor: dtype, shape, device, statistics, and a heat map. */
import { heatMap } from "./heat_map.ts";
import type { Tensor } from "./tensor.ts";

/** Where Deno's Jupyter kernel looks for how a value shows itself: a function that gives content by MIME type. */
export const JUPYTER_DISPLAY: unique symbol = Symbol.for("Jupyter.display");

/** Elements that are looked at; of a larger tensor the first ones. */
const MOST_ELEMENTS = 2 ** 24;
const CELL = 5;
const MARGIN = 12;
const LINE = 18;
/** Room for the two lines of text. */
const LEAST_WIDTH = 560;

/** What a tensor's elements have in common. */
export interface TensorStatistics {
  /** Of the finite elements; NaN where there is none. */
  readonly min: number;
  readonly max: number;
  readonly mean: number;
  /** Standard deviation of the finite elements, divided by their number. */
  readonly std: number;
  readonly nan: number;
  readonly infinite: number;
}

/** Statistics of values. */
export function tensorStatistics(values: Float32Array): TensorStatistics {
  let [min, max, sum, finite, nan] = [Infinity, -Infinity, 0, 0, 0];
  for (const value of values) {
    if (Number.isNaN(value)) nan++;
    if (!Number.isFinite(value)) continue;
    min = Math.min(min, value);
    max = Math.max(max, value);
    sum += value;
    finite++;
  }
  const infinite = values.length - finite - nan;
  if (finite === 0) return { min: NaN, max: NaN, mean: NaN, std: NaN, nan, infinite };
  const mean = sum / finite;
  let squares = 0;
  for (const value of values) if (Number.isFinite(value)) squares += (value - mean) ** 2;
  return { min, max, mean, std: Math.sqrt(squares / finite), nan, infinite };
}

/**
 * A tensor by MIME type: `text/plain`, two lines, and `image/svg+xml`, these over a heat map of its last two dimensions (at
 * the first index of all others). Waits for the work so far. Of more than 16 million elements the first ones are looked at.
 */
export async function displayTensor(tensor: Tensor): Promise<Record<string, string>> {
  const part = firstPart(tensor);
  const values = await part.toFloat32();
  const { min, max, mean, std, nan, infinite } = tensorStatistics(values);
  const title = `${tensor} on ${tensor.device.name}${tensor.isContiguous ? "" : ", strided"}`;
  const statistics = [
    ...Object.entries({ min, max, mean, std }).map(([name, value]) => `${name} ${short(value)}`),
    ...(nan > 0 ? [`${nan} NaN`] : []),
    ...(infinite > 0 ? [`${infinite} infinite`] : []),
    ...(part === tensor ? [] : [`of the first ${part.size}`]),
  ].join("   ");
  return {
    "text/plain": `${title}\n${statistics}`,
    "image/svg+xml": picture(title, statistics, values, part),
  };
}

function picture(title: string, statistics: string, values: Float32Array, { shape, size }: Tensor): string {
  const columns = shape.at(-1) ?? 1;
  const rows = Math.min(shape.at(-2) ?? 1, size / Math.max(1, columns));
  const lines = [title, statistics];
  let map = { paths: "", rows: 0, columns: 0 };
  if (size > 0) {
    const drawn = heatMap(values.subarray(0, rows * columns), rows, columns, CELL);
    map = drawn;
    const where = shape.length > 2 ? `[${shape.slice(0, -2).map(() => "0").join(", ")}, :, :], ` : "";
    lines.push(`${where}${rows} x ${columns}, blue ${short(-drawn.limit)} to red ${short(drawn.limit)}`);
  }
  const top = MARGIN + lines.length * LINE;
  const width = Math.max(LEAST_WIDTH, map.columns * CELL + 2 * MARGIN);
  const height = top + map.rows * CELL + MARGIN;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" ` +
    `font-family="monospace" font-size="12">`,
    `<rect width="${width}" height="${height}" fill="#ffffff"/>`,
    ...lines.map((line, i) =>
      `<text x="${MARGIN}" y="${MARGIN + i * LINE + 8}" xml:space="preserve"${
        i === 0 ? ' font-weight="bold"' : ""
      }>${line}</text>`
    ),
    `<g transform="translate(${MARGIN} ${top})">${map.paths}</g>`,
    "</svg>",
  ].join("\n");
}

/** The tensor, or as many of its first elements as are looked at: whole slices of the first dimensions. */
function firstPart(tensor: Tensor): Tensor {
  let part = tensor;
  for (let dim = 0; dim < tensor.rank && part.size > MOST_ELEMENTS; dim++) {
    const slice = part.size / part.shape[dim];
    part = part.narrow(dim, 0, Math.max(1, Math.floor(MOST_ELEMENTS / slice)));
  }
  return part;
}

function short(value: number): string {
  return Number.isFinite(value) ? String(Number(value.toPrecision(4))) : String(value);
}
