/** Tables of text for terminals and for Markdown. */

/** Lines with aligned columns; the last one may be long. */
export function tableLines(rows: readonly (readonly string[])[]): string[] {
  const widths = columnWidths(rows);
  return rows.map((row) =>
    `  ${row.map((cell, column) => cell.padEnd(widths[column])).join("  ")}`.trimEnd()
  );
}

/** A table of numbers under a heading: the first column to the left, the others to the right. */
export function numberLines(heading: readonly string[], rows: readonly (readonly string[])[]): string[] {
  const all = [heading, ...rows];
  const widths = columnWidths(all);
  return all.map((row) =>
    `  ${row.map((cell, i) => i === 0 ? cell.padEnd(widths[i]) : cell.padStart(widths[i])).join("  ")}`
      .trimEnd()
  );
}

/** The same in Markdown (GitHub's tables). */
export function markdownLines(heading: readonly string[], rows: readonly (readonly string[])[]): string[] {
  const line = (cells: readonly string[]) =>
    `| ${cells.map((cell) => cell.replaceAll("|", "\\|").replaceAll("\n", " ")).join(" | ")} |`;
  return [line(heading), `|${heading.map((_, i) => i === 0 ? "---" : "--:").join("|")}|`, ...rows.map(line)];
}

function columnWidths(rows: readonly (readonly string[])[]): number[] {
  return (rows[0] ?? []).map((_, column) => Math.max(...rows.map((row) => row[column].length)));
}
