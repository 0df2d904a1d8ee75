/** A bar chart as an SVG file (SVG 1.1), on a white ground. */
import { escapeXml } from "./xml.ts";

/** One bar. */
export interface Bar {
  /** Stands before it. */
  readonly label: string;
  /** Its length, 0 or more; undefined for what could not be measured. */
  readonly value: number | undefined;
  /** What stands behind it. */
  readonly note: string;
  /** Drawn in the second colour. */
  readonly accent: boolean;
}

/** What a chart shows. */
export interface BarChart {
  /** Its heading. */
  readonly title: string;
  /** A line below the title. */
  readonly subtitle: string;
  /** From top to bottom. */
  readonly bars: readonly Bar[];
}

const WIDTH = 860;
const LEFT = 200;
/** Room for the notes behind the longest bar. */
const RIGHT = 210;
const TOP = 64;
const ROW = 30;
const BAR = 20;
const COLOURS = { plain: "#4477aa", accent: "#cc6677" } as const; // Tol's bright and muted sets, told apart by all

/** Bars below one another, the longest as wide as there is room. */
export function barChart({ title, subtitle, bars }: BarChart): string {
  const longest = Math.max(0, ...bars.map(({ value }) => value ?? 0));
  const height = TOP + bars.length * ROW + 12;
  const rows = bars.flatMap(({ label, value, note, accent }, i) => {
    const top = TOP + i * ROW;
    const middle = top + BAR / 2 + 5;
    const width = value === undefined || longest === 0 ? 0 : (WIDTH - LEFT - RIGHT) * value / longest;
    return [
      `  <text x="${LEFT - 10}" y="${middle}" text-anchor="end">${escapeXml(label)}</text>`,
      `  <rect x="${LEFT}" y="${top}" width="${width.toFixed(1)}" height="${BAR}" fill="${
        accent ? COLOURS.accent : COLOURS.plain
      }"/>`,
      `  <text x="${(LEFT + width + 8).toFixed(1)}" y="${middle}">${escapeXml(note)}</text>`,
    ];
  });
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${height}" ` +
    `viewBox="0 0 ${WIDTH} ${height}" font-family="sans-serif" font-size="14">`,
    `  <title>${escapeXml(title)}</title>`,
    `  <rect width="${WIDTH}" height="${height}" fill="#ffffff"/>`,
    `  <text x="16" y="26" font-size="18">${escapeXml(title)}</text>`,
    `  <text x="16" y="46" fill="#555555">${escapeXml(subtitle)}</text>`,
    ...rows,
    "</svg>",
    "",
  ].join("\n");
}
