/** A page of results in one HTML file that needs nothing else: no network, no script. */
import { escapeXml } from "./xml.ts";

/** A picture and what stands below it. */
export interface ReportPicture {
  readonly png: Uint8Array<ArrayBuffer>;
  readonly width: number;
  readonly height: number;
  readonly caption: string;
}

export interface ReportPage {
  readonly title: string;
  /** A line below the title. */
  readonly subtitle: string;
  /** SVG elements, complete. */
  readonly charts: readonly string[];
  /** Heading and rows; the first column to the left, the others to the right. */
  readonly table: readonly [heading: readonly string[], rows: readonly (readonly string[])[]];
  readonly pictures: readonly ReportPicture[];
  /** More numbers, as a program has printed them; none where undefined. */
  readonly printed?: string | undefined;
  readonly environment: Readonly<Record<string, string>>;
  /** What to type for the same, each with a line that says what it does. */
  readonly commands: readonly { readonly what: string; readonly line: string }[];
}

const STYLE = `
:root { color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --faint: #666; --line: #ddd; --panel: #f5f5f3; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #161616; --ink: #e8e8e6; --faint: #9a9a96; --line: #3a3a38; --panel: #222220; }
}
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
.subtitle, figcaption { color: var(--faint); margin: .25rem 0 0; }
figure { margin: 0; } .chart svg { max-width: 100%; height: auto; border-radius: 6px; margin-bottom: .75rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } thead th { color: var(--faint); font-weight: 500; }
.environment th { font-weight: 500; color: var(--faint); } .environment td { text-align: left; white-space: normal; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1.25rem; }
.pictures img { width: 100%; height: auto; border-radius: 6px; background: var(--panel); }
pre { background: var(--panel); padding: .75rem 1rem; border-radius: 6px; overflow-x: auto; font-size: 13px; }
@media print { body { max-width: none; } }`;

/** The page, UTF-8. */
export function reportPage(page: ReportPage): string {
  const { title, subtitle, charts, table: [heading, rows], pictures, printed, environment, commands } = page;
  const cells = (tag: "td" | "th", row: readonly string[]) =>
    `<tr>${row.map((cell) => `<${tag}>${escapeXml(cell)}</${tag}>`).join("")}</tr>`;
  const sections = [
    [
      "Times",
      ...charts.map((svg) => `<figure class="chart">${svg.trim()}</figure>`),
      `<div class="scroll"><table><thead>${cells("th", heading)}</thead>`,
      `<tbody>${rows.map((row) => cells("td", row)).join("\n")}</tbody></table></div>`,
      ...(printed === undefined ? [] : [`<pre>${escapeXml(printed)}</pre>`]),
    ],
    ["Pictures", `<div class="pictures">`, ...pictures.map(figure), "</div>"],
    [
      "Environment",
      `<table class="environment"><tbody>`,
      ...Object.entries(environment).map(([name, value]) =>
        `<tr><th>${escapeXml(name)}</th><td>${escapeXml(value)}</td></tr>`
      ),
      "</tbody></table>",
    ],
    [
      "Commands",
      ...commands.map(({ what, line }) => `<p>${escapeXml(what)}</p>\n<pre>${escapeXml(line)}</pre>`),
    ],
  ];
  return [
    "<!doctype html>",
    '<html lang="en">',
    "<head>",
    '<meta charset="utf-8">',
    // Whatever a prompt or a path says, nothing is loaded and nothing runs.
    `<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">`,
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    `<title>${escapeXml(title)}</title>`,
    `<style>${STYLE}\n</style>`,
    "</head>",
    "<body>",
    `<h1>${escapeXml(title)}</h1>`,
    `<p class="subtitle">${escapeXml(subtitle)}</p>`,
    ...sections.map(([name, ...content]) => `<section>\n<h2>${name}</h2>\n${content.join("\n")}\n</section>`),
    "</body>",
    "</html>",
    "",
  ].join("\n");
}

function figure({ png, width, height, caption }: ReportPicture): string {
  const text = escapeXml(caption);
  return `<figure><img src="data:image/png;base64,${png.toBase64()}" width="${width}" height="${height}" ` +
    `alt="${text}"><figcaption>${text}</figcaption></figure>`;
}

/** A command line that a POSIX shell takes apart into these words again. */
export function shellLine(words: readonly string[]): string {
  return words.map((word) => /^[\w./:=@%+,-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`)
    .join(" ");
}
