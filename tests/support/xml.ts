import assert from "node:assert/strict";

/** An element of an XML document. */
export interface XmlElement {
  readonly name: string;
  readonly attributes: Readonly<Record<string, string>>;
  readonly children: readonly XmlElement[];
  /** The text directly in it. */
  readonly text: string;
}

interface OpenElement extends XmlElement {
  readonly children: XmlElement[];
  text: string;
}

const TAG = /<(?:\/([A-Za-z][\w.-]*)\s*|([A-Za-z][\w.-]*)((?:\s+[A-Za-z][\w:.-]*="[^"<]*")*)\s*(\/?))>/y;
const ENTITIES: Readonly<Record<string, string>> = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'" };

/** Parses well-formed XML without comments, processing instructions and CDATA; anything else is an assertion error. */
export function parseXml(source: string): XmlElement {
  const root: OpenElement = { name: "", attributes: {}, children: [], text: "" };
  const open = [root];
  for (let at = 0; at < source.length;) {
    const here = open[open.length - 1];
    const next = source.indexOf("<", at);
    const end = next < 0 ? source.length : next;
    here.text += unescape(source.slice(at, end));
    at = end;
    if (at === source.length) break;
    TAG.lastIndex = at;
    const tag = TAG.exec(source);
    assert.ok(tag !== null, `no tag: ${source.slice(at, at + 60)}`);
    const [whole, closing, name, attributes, empty] = tag;
    if (closing !== undefined) {
      assert.equal(closing, here.name, "closes what is not open");
      open.pop();
    } else {
      const pairs = [...attributes.matchAll(/([\w:.-]+)="([^"]*)"/g)].map((
        [, key, value],
      ) => [key, unescape(value)]);
      assert.equal(new Set(pairs.map(([key]) => key)).size, pairs.length, `an attribute twice: ${whole}`);
      const element: OpenElement = { name, attributes: Object.fromEntries(pairs), children: [], text: "" };
      here.children.push(element);
      if (empty === "") open.push(element);
    }
    at += whole.length;
  }
  assert.deepEqual(open, [root], "an element is not closed");
  assert.equal(root.text.trim(), "", "text outside the root element");
  assert.equal(root.children.length, 1, "one root element");
  return root.children[0];
}

function unescape(text: string): string {
  // deno-lint-ignore no-control-regex
  assert.doesNotMatch(text, /[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]/, "no character of XML");
  return text.replaceAll(/&([^;]*)(;?)/g, (whole, name, semicolon) => {
    assert.ok(semicolon === ";" && Object.hasOwn(ENTITIES, name), `no entity: ${whole}`);
    return ENTITIES[name];
  });
}
