/** A matrix as coloured cells, in SVG 1.1: red above zero, blue below, the paler the nearer; black for NaN and infinity. */

/** Cells that a map has at most; of a larger matrix each is the mean of several elements. */
const MOST_ROWS = 64;
const MOST_COLUMNS = 128;
/** Steps from white to the full colour. */
const SHADES = 12;
const WHITE = [247, 247, 247];
/** ColorBrewer's RdBu, which is told apart by all. */
const ABOVE = [178, 24, 43];
const BELOW = [33, 102, 172];

/** A map, and what its colours mean. */
export interface HeatMap {
  /** `<path>` elements, one for each colour, in a box of `columns * cell` by `rows * cell` from the origin. */
  readonly paths: string;
  readonly rows: number;
  readonly columns: number;
  /** What the full colours stand for: the largest absolute value of a cell, 0 where all are 0 or none is finite. */
  readonly limit: number;
}

/** @param values `[rows, columns]`. @param cell the side of a cell, in the picture's units. */
export function heatMap(values: Float32Array, rows: number, columns: number, cell: number): HeatMap {
  const [down, across] = [Math.min(rows, MOST_ROWS), Math.min(columns, MOST_COLUMNS)];
  const means = Float64Array.from({ length: down * across }, (_, i) => {
    const [row, column] = [Math.floor(i / across), i % across];
    let [sum, count] = [0, 0];
    const [lastRow, lastColumn] = [edge(row + 1, down, rows), edge(column + 1, across, columns)];
    for (let r = edge(row, down, rows); r < lastRow; r++) {
      for (let c = edge(column, across, columns); c < lastColumn; c++, count++) {
        sum += values[r * columns + c];
      }
    }
    return sum / count;
  });
  const limit = means.reduce(
    (most, mean) => Number.isFinite(mean) ? Math.max(most, Math.abs(mean)) : most,
    0,
  );
  const runs = new Map<string, string>();
  for (let row = 0; row < down; row++) {
    for (let column = 0; column < across;) {
      const colour = colourOf(means[row * across + column], limit);
      let end = column + 1;
      while (end < across && colourOf(means[row * across + end], limit) === colour) end++;
      const run = `M${column * cell} ${row * cell}h${(end - column) * cell}v${cell}h${
        (column - end) * cell
      }z`;
      runs.set(colour, (runs.get(colour) ?? "") + run);
      column = end;
    }
  }
  const paths = [...runs].map(([colour, d]) => `<path fill="${colour}" d="${d}"/>`).join("\n");
  return { paths, rows: down, columns: across, limit };
}

/** Where part `index` of `parts` begins in `length` elements. */
function edge(index: number, parts: number, length: number): number {
  return Math.floor(index * length / parts);
}

function colourOf(value: number, limit: number): string {
  if (!Number.isFinite(value)) return "#000000";
  const share = limit === 0 ? 0 : Math.round(Math.abs(value) / limit * SHADES) / SHADES;
  const full = value < 0 ? BELOW : ABOVE;
  const channels = WHITE.map((white, i) => Math.round(white + (full[i] - white) * share));
  return `#${channels.map((channel) => channel.toString(16).padStart(2, "0")).join("")}`;
}
